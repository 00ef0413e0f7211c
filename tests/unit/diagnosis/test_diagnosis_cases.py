"""One constructed policy per bottleneck is named rightly from finitely many samples.

The whole table is `python benchmarks/diagnosis_cases.py`.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from posttrain.diagnosis.card import Bottleneck
from posttrain.diagnosis.drawing import draw_answers

ROOT = Path(__file__).parents[3]
FIXED = {
    Bottleneck.MEASUREMENT: "cut off after two letters",
    Bottleneck.RETENTION: "half lost",
    Bottleneck.AMORTISATION: "from little",
    Bottleneck.LEARNER_STATE: "slips",
    Bottleneck.DIVERSITY: "one answer each, 50% right",
    Bottleneck.SUPPORT: "never, many guesses",
    Bottleneck.ENTRY: "the first letter",
    Bottleneck.SIGNAL: "rare, few guesses",
    Bottleneck.CHOICE: "habit",
    Bottleneck.SATURATION: "nearly always",
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "diagnosis_cases", ROOT / "benchmarks/diagnosis_cases.py"
    )
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["diagnosis_cases"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_there_are_forty_cases_and_five_of_each_bottleneck(bench):
    made = bench.cases(0)
    assert len(made) >= 40
    assert all(sum(c.truth is b for c in made) >= 5 for b in bench.BUILDERS)
    assert len({(c.truth, c.name) for c in made}) == len(made)
    assert len({bench.answer(i) for i in range(bench.PROMPTS)}) == bench.PROMPTS


@pytest.mark.parametrize("truth", FIXED)
def test_the_bottleneck_is_named(bench, truth):
    (case,) = [c for c in bench.cases(0) if c.truth is truth and c.name == FIXED[truth]]
    found = bench.diagnosed(case)
    assert found.bottleneck is truth, found.headline


def test_a_case_is_what_it_says(bench):
    """Success of the built policy is the product of its steps, and 1 after a given beginning."""
    steps = [(0.25, 0.5, 1.0, 1.0)] * bench.PROMPTS
    policy = bench.table(steps, wrong=2)
    answers = dict(policy.answers("3=", longest=6))
    assert np.exp(answers[bench.answer(3)]) == pytest.approx(0.125)
    assert sum(np.exp(p) for p in answers.values()) == pytest.approx(1)
    tasks = bench.CaseTasks(0.0, np.random.default_rng(0))
    prefix = np.array([ord(c) for c in bench.answer(3)[:2]], np.int32)
    (group,) = draw_answers(
        policy, tasks, [tasks.held_out[3]], samples=8, max_new_tokens=6, seed=0, given=[prefix]
    )
    assert all(a.success for a in group)
