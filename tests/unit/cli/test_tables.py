"""Tables fit a terminal of 100 columns, show what was measured, and warn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from measurements import drawn, measured, policy

from posttrain.cli.tables import (
    WIDTH,
    change_table,
    comparison_table,
    measurement_table,
    readings_table,
    readings_words,
    support_table,
)
from posttrain.measure.attribution import attribute_changes
from posttrain.measure.measurement import Measurement
from posttrain.measure.reading import Reading
from posttrain.measure.spec import Measure
from posttrain.measure.support import support_change

SPEC = Measure(samples=64)
LONG = "/a/very/long/path/to/a/run/of/many/words/that/goes/on/stages/student-f89fc47c/model"


def named(*rates: float, name: str = LONG) -> Measurement:
    tasks = (replace(drawn(r, seed=i), taskset=f"task-{i}") for i, r in enumerate(rates))
    return policy(*tasks, name=name)


def fits(text: str) -> bool:
    return all(len(line.rstrip()) <= WIDTH for line in text.splitlines()) and "…" not in text


def row(text: str, task: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [task])


def test_the_measurement_table() -> None:
    text = measurement_table(named(0.3, 1.0), SPEC)
    assert fits(text)
    assert text.startswith("student-f89fc47c/model: 64 samples per prompt")
    first, second = row(text, "task-0"), row(text, "task-1")
    assert first[-3:] == ["24", "0", "0"]
    assert second[1:4] == ["1.00", "[0.86,", "1.00]"]
    assert "1.00 right" in text
    assert "!" not in text


def test_every_reading_has_a_line() -> None:
    text = readings_table(named(0.3), SPEC)
    assert fits(text)
    for name in ("pass@1", "needed_group", "calibration_error", "verifier_disagreement"):
        assert any(line.split()[:1] == [name] for line in text.splitlines())
    old = policy(measured(np.random.default_rng(0).random((24, 64)) < 0.5))
    assert "missing: answers were not kept" in readings_table(old, SPEC)


def test_an_old_measurement_shows_dashes() -> None:
    old = policy(measured(np.random.default_rng(0).random((24, 64)) < 0.5))
    assert "–" in row(measurement_table(old, SPEC), "sums")


def test_what_cannot_be_trusted_is_said() -> None:
    task = drawn(0.5, prompts=3)
    cut = np.zeros((3, 64), bool)
    cut[:, :16] = True
    recheck = np.zeros((3, 4), bool)
    recheck[0, 0] = True
    raw = {**task.raw, "recheck": recheck, "repetition": np.full((3, 64), 0.5)}
    shaky = replace(task, truncated=cut, raw=raw)
    text = measurement_table(policy(shaky), SPEC)
    for words in (
        "3 prompts are too few to judge by",
        "the verifier is not deterministic: of 12 answers that were scored twice, 1 got",
        "25% of samples were cut off",
        "50% of the 4-grams of samples repeat",
    ):
        assert words in text


def test_comparison_and_change() -> None:
    before, after = named(0.1, 0.5), named(0.6, 0.5, name="grpo")
    text = comparison_table(attribute_changes(before, after, epsilon=SPEC.threshold))
    assert fits(text)
    assert "student-f89fc47c/model → grpo" in text
    beside = change_table(before, after)
    assert fits(beside)
    old, new = before.tasks[0], after.tasks[0]
    ends = f"{old.lengths.mean():.2f} → {new.lengths.mean():.2f}"
    assert ends in beside


@pytest.mark.parametrize("rates", [(0.0, 0.9), (0.9, 0.0)])
def test_a_star_marks_a_change_that_is_certain(rates: tuple[float, float]) -> None:
    before, after = named(rates[0]), named(rates[1], name="after")
    entropy = change_table(before, after).splitlines()
    stars = [line for line in entropy if "*" in line and "[" in line]
    assert len(stars) == 1
    same = change_table(before, replace(before, policy="again"))
    assert not [line for line in same.splitlines() if "*" in line and "[" in line]


def test_the_support_table_counts_every_prompt_once() -> None:
    text = support_table(named(0.9), named(0.5), SPEC)
    assert fits(text)
    preserved, expanded, shrunk, out, unclear = map(int, row(text, "task-0")[1:6])
    assert preserved + expanded + shrunk + out + unclear == 24
    old, new = (support_change(side.tasks[0], side.tasks[0], epsilon=SPEC.threshold)
                for side in (named(0.9), named(0.5)))  # fmt: skip
    assert preserved <= min(old.preserved, new.preserved)
    assert expanded == 0


def test_bounds_without_an_end_are_shown_and_not_read_as_markup() -> None:
    never = Reading("crossover", "sums", math.inf, math.inf, math.inf, 24, 64, "never behind")
    assert "[none, none]" in readings_words("sums", [never])
