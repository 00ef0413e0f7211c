"""A few of the hostile rewards of the fuzz: each is refused in words, or answers with numbers."""

from __future__ import annotations

import os

import pytest
from fuzz import rewards
from fuzz.frame import Tally, run_trials


@pytest.mark.parametrize("seed", range(3))
def test_hostile_rewards_end_in_words_or_in_numbers(tmp_path, seed):
    tally = Tally()
    before = os.getcwd()
    run_trials(rewards.trials(tmp_path, num=20, seed=100 + seed), tally)
    assert tally.faults == []
    assert set(tally.outcomes) == {"done", "refused"}
    assert os.getcwd() == before


def test_a_number_names_a_case():
    first, again = ([c for _, c in zip(range(30), rewards.cases(4), strict=False)] for _ in "ab")
    assert first == again
    assert len({case.content for case in first}) > 20
