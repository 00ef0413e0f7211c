"""Calibration of policies that are calibrated, or wrong by a known amount."""

from __future__ import annotations

import numpy as np
import pytest
from measurements import measured

from posttrain.core.errors import ConfigError
from posttrain.measure.calibration import _gaps
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.readings import read
from posttrain.measure.voting import answers_column


def drawn(
    said: np.ndarray, right: np.ndarray, rng: np.random.Generator, n: int = 64
) -> TaskMeasurement:
    """Two answers per prompt: the first with probability ``said``, right where ``right``."""
    answers = (rng.random((len(said), n)) >= said[:, None]).astype(int)
    return measured((answers == 0) == right[:, None], answers=answers)


def test_a_calibrated_policy_is_not_found_guilty() -> None:
    # The first answer has probability q, and is the right one for a share q of prompts; the second
    # has 1 − q, and is right in the others: both are right as often as they are said.
    rng = np.random.default_rng(0)
    values, covered = [], []
    for _ in range(60):
        said = rng.choice([0.6, 0.75, 0.9], 32)
        r = read("calibration_error", drawn(said, rng.random(32) < said, rng))
        values.append(r.value)
        covered.append(r.low == 0)
    assert np.mean(covered) >= 0.95
    assert np.median(values) < 0.08


def test_the_gaps_of_a_calibrated_policy_have_expectation_zero_in_every_bin() -> None:
    rng = np.random.default_rng(3)
    said = rng.choice([0.55, 0.65, 0.75, 0.9], 6000)
    task = drawn(said, rng.random(6000) < said, rng, n=8)
    gaps = _gaps(task.need(answers_column), task.successes)
    error = gaps.std(axis=0) / np.sqrt(6000)
    assert (np.abs(gaps.mean(axis=0)) < 4 * error).all()
    assert (error > 0).all()


def test_a_known_error_is_found() -> None:
    # 0.9 sure of an answer that is right for half of the prompts: samples of the first answer are
    # right by 0.4 too seldom, those of the second (a tenth) by 0.4 too often.
    rng = np.random.default_rng(1)
    found = [
        read("calibration_error", drawn(np.full(64, 0.9), rng.random(64) < 0.5, rng))
        for _ in range(25)
    ]
    assert np.mean([r.value for r in found]) == pytest.approx(0.4, abs=0.05)
    assert all(r.low > 0.05 for r in found)
    assert np.mean([r.low <= 0.4 <= r.high for r in found]) >= 0.92


def test_the_word_says_in_which_direction() -> None:
    rng = np.random.default_rng(2)
    over = read("calibration_error", drawn(np.full(40, 0.95), rng.random(40) < 0.3, rng))
    assert "less often" in over.words
    with pytest.raises(ConfigError, match="at least 4"):
        read("calibration_error", drawn(np.full(8, 0.9), np.ones(8, bool), rng, n=3))
