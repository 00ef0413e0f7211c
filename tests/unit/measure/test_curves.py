"""Curves of policies whose success probabilities are known."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from measurements import counted, sampled

from posttrain.core.errors import ConfigError, RunError
from posttrain.measure.curves import (
    cover,
    cover_share,
    crossover,
    failed_tries,
    sharpening_tax,
)
from posttrain.measure.passk import pass_at_k
from posttrain.measure.readings import read
from posttrain.measure.support import clopper_pearson


@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_pass_at_k_is_the_integral_of_cover(k: int) -> None:
    """pass@k = ∫ Cover@t · k(1−t)^(k−1) dt, with Cover a step function of the rates."""
    rates = np.array([0.0, 0.1, 0.1, 0.4, 0.9, 1.0])
    edges = np.unique(np.concatenate([[0.0], rates]))
    integral = sum(
        cover_share(rates, high) * ((1 - low) ** k - (1 - high) ** k)
        for low, high in pairwise(edges)
    )
    assert integral == pytest.approx(np.mean(1 - (1 - rates) ** k), abs=1e-14)


def test_cover_of_clear_rates_and_its_bounds() -> None:
    r = read("cover@0.5", counted([0] * 20 + [64] * 20))
    assert (r.name, r.value) == ("cover@0.5", 0.5)
    assert 0.3 < r.low < 0.5 < r.high < 0.7
    # 20 of 40 surely above and 20 surely below; a hundredth of either may be mislabelled.
    surely = clopper_pearson(20, 40, confidence=0.975)[0]
    assert r.low == pytest.approx((surely - 0.01) / 0.99)
    assert r.high == pytest.approx((1 - surely) / 0.99)
    near = read(
        "cover@0.5", counted([32] * 40)
    )  # every rate lies at the threshold: nothing is known
    assert (near.low, near.high) == (0.0, 1.0)


def test_efficiency_gap() -> None:
    task = counted([0, 16, 64] * 8)
    assert read("efficiency_gap", task).value == pytest.approx(2 / 3 - (0.25 + 1) / 3)


def test_crossover_of_known_curves() -> None:
    # Before: every prompt at 0.2. After: half at 0.6, half never. 1 − 0.8^k passes
    # (1 − 0.4^k)/2 between k = 2 (0.36 and 0.42) and k = 3 (0.488 and 0.468).
    before = sampled(np.full(400, 0.2), n=32)
    after = sampled(np.tile([0.6, 0.0], 200), n=32, seed=1)
    r = crossover(before, after).interval
    assert r.value == 3.0
    assert r.low <= 3.0 <= r.high <= 5.0


def test_no_crossover_is_infinite_and_equal_policies_are_undecided() -> None:
    before, after = sampled(np.full(40, 0.2)), sampled(np.full(40, 0.5), seed=1)
    r = crossover(before, after).interval
    assert (r.value, r.high) == (math.inf, math.inf)
    assert r.low > 4
    same = crossover(before, sampled(np.full(40, 0.2), seed=2)).interval
    assert same.low == 1.0
    assert same.high == math.inf


@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 4), (6, 6)])
def test_failed_tries_against_every_order(n: int, k: int) -> None:
    """The first k of n samples in random order: failures before a success among them."""
    for c in range(n + 1):
        total = 0
        for chosen in combinations(range(n), c):  # the places of successes among the n
            total += min(chosen) if chosen and min(chosen) < k else 0
        ways = math.comb(n, c)
        assert failed_tries(n, k)[c] == pytest.approx(total / ways, abs=1e-12)


def test_sharpening_tax_by_hand() -> None:
    # Rates 1/2 at all prompts: E[A(2)] = pass@2 − pass@1. By counts c = 32 of 64:
    gain = float(pass_at_k([32], 64, 2)[0]) - 0.5
    before = counted([32] * 12)
    after = counted([0, 64] * 6)  # as often right, and a second try never helps
    r = sharpening_tax(before, after, k=2).interval
    assert r.value == pytest.approx(gain / 0.5)
    assert sharpening_tax(before, before, k=2).interval.value == 0.0
    assert sharpening_tax(after, before, k=2).interval.value == pytest.approx(-r.value)


def test_sharpening_tax_of_a_policy_that_never_fails_is_that_of_the_other() -> None:
    solved = counted([64] * 12)
    r = sharpening_tax(solved, counted([32] * 12), k=2).interval
    assert r.value == pytest.approx(-(float(pass_at_k([32], 64, 2)[0]) - 0.5) / 0.5)
    # Had one more prompt been asked that the first policy sometimes fails, its share could be 1.
    assert r.high == 1.0
    assert -1 <= r.low < r.value


def test_refusals() -> None:
    with pytest.raises(RunError, match="task set 'sums' and 'products'"):
        crossover(counted([1] * 6), counted([1] * 6, taskset="products"))
    with pytest.raises(ConfigError, match="64 samples"):
        sharpening_tax(counted([1] * 6), counted([1] * 6), k=65)
    with pytest.raises(ConfigError, match="at least two tries"):
        sharpening_tax(counted([1] * 6), counted([1] * 6), k=1)
    with pytest.raises(ConfigError, match="epsilon=1"):
        cover(counted([1] * 6), 1.0)
