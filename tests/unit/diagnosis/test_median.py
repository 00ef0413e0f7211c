"""The interval of a median: exact coverage, with uncertain values too."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from posttrain.core.errors import ConfigError
from posttrain.diagnosis.median import median_interval


@pytest.mark.parametrize("num", [6, 7, 20, 65])
def test_bounds_are_the_order_statistics_of_the_sign_test(num: int) -> None:
    got = median_interval(np.arange(num))
    rank = max(k for k in range(num) if stats.binom.cdf(k, num, 0.5) <= 0.025) + 1
    assert (got.low, got.high) == (rank - 1, num - rank)
    assert got.value == (num - 1) / 2


def test_too_few_prompts_have_no_bound() -> None:
    got = median_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (got.low, got.value, got.high) == (-math.inf, 3.0, math.inf)
    assert median_interval(np.arange(5), confidence=0.9).low == 0.0


def test_covers_when_every_value_is_noisy() -> None:
    # Values are normal around 0; each bound is off by its own noise, wrong with chance 0.1.
    rng, hits, reach = np.random.default_rng(4), [], stats.norm.ppf(0.9)
    for _ in range(400):
        seen = rng.normal(0, 1, 15) + rng.normal(0, 1, 15)
        got = median_interval(seen, lows=seen - reach, highs=seen + reach, tail=0.1)
        hits.append(got.low <= 0 <= got.high)
    assert np.mean(hits) >= 0.95


def test_infinite_values_are_findings() -> None:
    got = median_interval([-math.inf] * 5 + [1.0, 2.0])
    assert (got.value, got.low) == (-math.inf, -math.inf)
    assert median_interval([-math.inf, -math.inf, 1.0, 2.0]).value == -math.inf


@pytest.mark.parametrize("call", [([],), ([math.nan],), ([[1.0]],)])
def test_nothing_to_sort_is_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        median_interval(*call)
