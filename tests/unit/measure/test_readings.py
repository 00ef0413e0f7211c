"""All readings of a measurement together: names, bounds, what is missing and why."""

from __future__ import annotations

import numpy as np
import pytest
from measurements import drawn, measured, policy

from posttrain.core.errors import ConfigError, RunError
from posttrain.measure.passk import pass_interval
from posttrain.measure.reading import FEWEST, Reading
from posttrain.measure.readings import (
    answer_room,
    not_taken,
    paired_change,
    require_prompts,
    take,
    take_change,
)
from posttrain.measure.registry import Estimation

HOW = Estimation(epsilon=1 - 0.05 ** (1 / 64))


def by_name(readings: tuple[Reading, ...]) -> dict[str, Reading]:
    assert len({r.name for r in readings}) == len(readings)
    return {r.name: r for r in readings}


def test_every_reading_of_a_full_measurement() -> None:
    task = drawn(0.3)
    found = by_name(take(task, HOW))
    expected = (
        "pass@1 pass@2 pass@4 pass@8 pass@16 pass@32 pass@64 pass^4 pass^8 pass^64 "
        "cover@0.1 cover@0.5 cover@0.9 in_share out_share undetermined_share all_wrong@64 "
        "band_share "
        "informative@4 informative@8 informative@16 needed_group efficiency_gap truncated "
        "tokens_per_answer self_bleu repetition token_entropy answer_entropy single_answer "
        "distinct_answers maj@16 calibration_error verifier_disagreement"
    )
    assert set(found) == set(expected.split())
    assert not not_taken(task)
    for r in found.values():
        assert (r.task, r.confidence) == ("sums", 0.95)
        assert r.units == 24
        assert r.words
    one = pass_interval(task, 1)
    assert (found["pass@1"].value, found["pass@1"].low) == (one.value, one.low)


def test_old_files_give_fewer_readings_and_say_why() -> None:
    bare = measured(np.random.default_rng(0).random((24, 8)) < 0.5, nll=np.full((24, 8), np.nan))
    found = by_name(take(bare, Estimation(epsilon=0.4)))
    assert "pass@8" in found
    assert not {"answer_entropy", "maj@16", "token_entropy", "self_bleu"} & set(found)
    assert not_taken(bare) == (
        "answers were not kept: no maj@16, answer_entropy, calibration_error",
        "8 samples per prompt: no informative@16",
        "texts were not looked at: no self_bleu, repetition",
        "no finite log-probs: no token_entropy",
        "no answer was scored twice, so the verifier may not be deterministic: no "
        "verifier_disagreement",
    )
    assert "informative@16" not in found
    few = drawn(0.5, n=8)
    assert not_taken(few) == ("8 samples per prompt: no maj@16, informative@16",)


def test_room_is_asked_of_known_answers_and_of_the_way_the_policy_takes() -> None:
    right = np.zeros((6, 4), bool)
    right[1, :3] = right[2, :3] = True
    lengths = np.full((6, 4), 8)
    lengths[1], lengths[2] = (2, 3, 8, 8), (5, 6, 3, 8)  # the median of the right ones: 3 and 5
    task = measured(right, lengths=lengths)
    keys = task.prompts
    room = answer_room(task, {keys[i]: 2 for i in (0, 1, 2)} | {keys[3]: 5}, budget=8)
    assert room is not None
    assert (room.value, room.units) == (0.5, 4)  # prompts 0 and 1 of 4; of the others none is known
    assert 0.06 < room.low < 0.07  # Clopper and Pearson: 2 of 4, [0.068, 0.932]
    assert answer_room(task, {keys[0]: 4}, budget=8).value == 1  # half of the budget still fits
    assert answer_room(task, {}, budget=8) is None


def test_changes() -> None:
    before, after = drawn(0.3), drawn(0.6, seed=1)
    found = by_name(take_change(before, after, HOW))
    assert set(found) == {
        "expanded_share",
        "shrunk_share",
        "retention",
        "crossover",
        "sharpening_tax",
    }
    assert found["retention"].value > 0.9
    none = by_name(take_change(drawn(0.0), drawn(0.0, seed=1), HOW))
    assert "retention" not in none


def test_paired_changes_of_diversity_and_cost() -> None:
    before, after = drawn(0.3), drawn(0.9, seed=1)
    entropy = paired_change("answer_entropy", before, after)
    assert entropy is not None
    assert entropy.high < 0
    tokens = paired_change("tokens_per_answer", before, after)
    assert tokens is not None
    assert tokens.value == pytest.approx(after.lengths.mean() - before.lengths.mean())
    assert paired_change("answer_entropy", before, measured(np.zeros((24, 64)))) is None
    for name in ("in_share", "retention", "kl_prior"):
        with pytest.raises(ConfigError, match=f"the change of {name}"):
            paired_change(name, before, after)
    with pytest.raises(RunError, match="24 and 23 prompts"):
        paired_change("tokens_per_answer", before, drawn(0.3, prompts=23))


def test_too_few_prompts_are_named() -> None:
    require_prompts(policy(drawn(0.5, prompts=FEWEST)))
    with pytest.raises(ConfigError, match=r"too few prompts to judge by: sums \(4\)"):
        require_prompts(policy(drawn(0.5, prompts=FEWEST - 1)))
    # The probes themselves answer for any number, with intervals that are wide for few.
    wide = by_name(take(drawn(0.5, prompts=2), HOW))
    assert wide["pass@1"].high - wide["pass@1"].low > 0.5
