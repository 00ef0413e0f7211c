"""Scaffolds: the help of votes and verifiers by hand, and what was amortised of it."""

from __future__ import annotations

import numpy as np
import pytest
from measurements import counted, measured

from posttrain.core.errors import ConfigError, RunError
from posttrain.diagnosis.scaffold import Help, Scaffold, amortisation_gap, amortised_share
from posttrain.measure.passk import pass_at_k


def test_the_best_of_k_by_hand() -> None:
    task = counted([0, 16, 64] * 4)
    gap = amortisation_gap(task, scaffold=Scaffold(Help.BEST, 4))
    by_hand = (0 + float(pass_at_k([16], 64, 4)[0]) + 1) / 3 - (0 + 0.25 + 1) / 3
    assert gap.value == pytest.approx(by_hand)
    assert "the best of 4 by the verifier" in gap.words


def test_a_vote_helps_where_the_right_answer_leads() -> None:
    answers = (np.arange(16) >= 10).astype(int)  # ten times the right answer, six times another
    rows = np.tile(answers, (8, 1))
    task = measured(rows == 0, answers=rows)
    gap = amortisation_gap(task, scaffold=Scaffold(Help.MAJORITY, 16))
    assert gap.value == pytest.approx(1 - 10 / 16)


def test_a_measurement_with_a_hint() -> None:
    bare, hinted, after = counted([8, 16] * 8), counted([40, 64] * 8), counted([24, 40] * 8)
    gap = amortisation_gap(bare, hinted)
    assert gap.value == pytest.approx((32 + 48) / 2 / 64)
    share = amortised_share(bare, after, hinted)
    assert share is not None
    assert share.value == pytest.approx((16 + 24) / (32 + 48))
    assert share.low <= share.value <= share.high


def test_nothing_gained_leaves_nothing_to_share() -> None:
    bare = counted([8, 16] * 8)
    assert amortised_share(bare, bare, bare) is None


def test_refusals() -> None:
    bare = counted([8, 16] * 8)
    with pytest.raises(ConfigError, match="without a scaffold"):
        amortisation_gap(bare)
    with pytest.raises(RunError, match="the same questions"):
        amortisation_gap(bare, counted([8] * 8))
    with pytest.raises(ConfigError, match="64 samples"):
        amortisation_gap(bare, scaffold=Scaffold(Help.BEST, 65))
