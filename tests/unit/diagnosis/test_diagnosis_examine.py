"""What an examination reads agrees with what was written down, and costs what it says."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.core.errors import ConfigError
from posttrain.diagnosis.conditions import diagnose_task
from posttrain.diagnosis.examine import FROM_A_PREFIX, SHARES, WITH_HELP, Examination
from posttrain.diagnosis.prescribe import Supplies
from posttrain.diagnosis.rules import load_rules
from posttrain.measure.spec import Measure

ROOT = Path(__file__).parents[3]
SAMPLES, P = 64, 32


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "examined_cases", ROOT / "benchmarks/diagnosis_cases.py"
    )
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["examined_cases"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def look(bench, steps, *, budget=SAMPLES * P, **more):
    return Examination(
        policy=bench.table(steps, wrong=1, helped=more.pop("helped", None)),
        tasksets=[bench.CaseTasks(0.0, np.random.default_rng(0))],
        spec=Measure(samples=SAMPLES, max_new_tokens=bench.LENGTH + 1, seed=3),
        protocol="test",
        supplies=more.pop("supplies", Supplies()),
        budget=budget,
        references=bench.written,
        **more,
    )


def test_a_first_look_costs_exactly_its_samples_and_tokens(bench):
    """Every answer of a sure policy is four letters and the end."""
    seen = look(bench, bench.at_once([1.0] * P))
    (evidence,) = seen.evidence()
    assert seen.cost.rollouts == SAMPLES * P
    assert seen.cost.sampled_tokens == SAMPLES * P * (bench.LENGTH + 1)
    assert evidence.get("pass@1").value == 1
    assert evidence.get("out_share").value == 0


def test_a_budget_that_does_not_reach_for_a_first_look_is_refused(bench):
    with pytest.raises(ConfigError, match="at least 2048"):
        look(bench, bench.at_once([1.0] * P), budget=SAMPLES * P - 1).evidence()
    both = look(
        bench,
        bench.at_once([1.0] * P),
        budget=2 * SAMPLES * P - 1,
        before=bench.table(bench.at_once([1.0] * P), wrong=1),
    )
    with pytest.raises(ConfigError, match="at least 4096"):
        both.evidence()


def test_beginnings_are_given_only_to_prompts_that_were_never_solved(bench):
    """Half the prompts are solved; the others go on rightly from half an answer, never before."""
    by_share = (0.0, 0.0, 1.0, 1.0)
    steps = [*bench.at_once([1.0] * (P // 2)), *[by_share] * (P // 2)]
    more = (P // 2) * len(SHARES) * FROM_A_PREFIX
    seen = look(bench, steps, budget=SAMPLES * P + more)
    (evidence,) = seen.evidence()
    assert seen.cost.rollouts == SAMPLES * P + more
    found = [evidence.get(f"continue@{s:g}").value for s in SHARES]
    assert found == [0, 0, 1, 1]
    assert evidence.get("continue@0.5").units == P // 2
    poor = look(bench, steps, budget=SAMPLES * P + more - 1)
    (without,) = poor.evidence()
    assert without.get("continue@0.5") is None
    assert any("beginning" in w or "part of a right answer" in w for w in without.missing)


def test_what_is_left_goes_to_labels_and_no_further_than_the_budget(bench):
    seen = look(bench, bench.at_once([0.0] * P), budget=SAMPLES * P + 9000)
    (evidence,) = seen.evidence()
    assert SAMPLES * P < seen.cost.rollouts <= SAMPLES * P + 9000
    assert evidence.get("out_share").value == 1
    names = [r.name for r in evidence.readings]
    assert len(names) == len(set(names)), "labels sought take the place of those that came along"
    assert look(bench, bench.at_once([0.0] * P), budget=20_000, labels=False).evidence()


def test_movement_is_the_divergence_written_down(bench):
    """Only the first letter is uncertain: KL = .9 ln(.9/.6) + .1 ln(.1/.4) nats per answer."""
    seen = look(
        bench,
        bench.at_once([0.6] * P),
        budget=10_000,
        before=bench.table(bench.at_once([0.9] * P), wrong=1),
        labels=False,
    )
    (evidence,) = seen.evidence()
    exact = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    moved = evidence.get("kl_prior")
    assert moved.low < exact < moved.high
    assert evidence.get("retention").value == pytest.approx(0.6 / 0.9, abs=0.06)


def test_a_scaffold_is_compared_prompt_by_prompt(bench):
    helped = bench.at_once([1.0] * P)
    bare = bench.at_once([1.0] * (P // 2) + [0.0] * (P // 2))
    seen = look(
        bench,
        bare,
        helped=helped,
        supplies=Supplies(scaffold=bench.HELP),
        budget=10_000,
        labels=False,
    )
    (evidence,) = seen.evidence()
    assert evidence.get("amortisation_gap").value == 0.5
    beginnings = (P // 2) * len(SHARES) * FROM_A_PREFIX
    assert seen.cost.rollouts == SAMPLES * P + beginnings + P * WITH_HELP


def test_what_was_measured_before_costs_nothing(bench):
    first = look(bench, bench.at_once([1.0] * P))
    taken = first._sampled(first.policy, None)
    again = look(bench, bench.at_once([1.0] * P), measured=taken, budget=1, labels=False)
    (evidence,) = again.evidence()
    assert again.cost.rollouts == 0
    assert evidence.get("pass@64").value == 1


def test_few_prompts_are_refused(bench):
    seen = look(bench, bench.at_once([1.0] * P))
    few = bench.CaseTasks(0.0, np.random.default_rng(0))
    few.held_out = few.held_out[:4]
    with pytest.raises(ConfigError, match="4 held-out prompts"):
        replace_tasks(seen, few).evidence()


def replace_tasks(seen: Examination, tasks) -> Examination:
    return replace(seen, tasksets=[tasks])


def test_a_model_that_rambles_is_not_blamed_on_the_token_budget(bench):
    """Never right and never at an end: measurement only where right answers would not fit."""
    for longest, room, named in [(2 * bench.LENGTH + 2, 1, "support"), (bench.LENGTH, 0, None)]:
        seen = look(bench, bench.spread_over([0.0] * P), budget=10_000, labels=False)
        seen.policy = bench.table(bench.spread_over([0.0] * P), wrong=7, lost=1.0)
        seen.spec = Measure(samples=SAMPLES, max_new_tokens=longest, seed=3)
        (evidence,) = seen.evidence()
        assert evidence.get("truncated").value > 0.9
        assert evidence.get("answer_room").value == room
        found = diagnose_task(evidence, load_rules())
        assert found.bottleneck == (named or "measurement")
