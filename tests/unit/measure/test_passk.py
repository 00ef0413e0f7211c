"""pass@k, pass^k and best@k against enumeration of all subsets, and exact unbiasedness."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from measurements import measured

from posttrain.core.errors import ConfigError
from posttrain.measure.passk import best_at_k, curve, pass_at_k, pass_hat_k, pass_interval


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_against_every_subset(n: int) -> None:
    for k in range(1, n + 1):
        for c in range(n + 1):
            subsets = list(combinations([1] * c + [0] * (n - c), k))
            any_, all_ = (sum(map(f, subsets)) / len(subsets) for f in (any, all))
            assert pass_at_k([c], n, k)[0] == pytest.approx(any_, abs=1e-14)
            assert pass_hat_k([c], n, k)[0] == pytest.approx(all_, abs=1e-14)


@pytest.mark.parametrize(("n", "k"), [(6, 1), (6, 3), (6, 6), (9, 4)])
def test_best_at_k_against_every_subset(n: int, k: int) -> None:
    scores = np.random.default_rng(n * k).normal(size=(3, n))
    expected = [np.mean([max(s) for s in combinations(row, k)]) for row in scores]
    assert best_at_k(scores, k) == pytest.approx(expected, abs=1e-13)


def test_best_at_k_of_successes_is_pass_at_k() -> None:
    rows = np.tri(17, 16, -1)  # row c has c successes
    for k in (1, 3, 8, 16):
        assert best_at_k(rows, k) == pytest.approx(pass_at_k(np.arange(17), 16, k), abs=1e-13)


@pytest.mark.parametrize("p", [0.03, 0.4, 0.9])
def test_the_expectation_over_binomial_counts_is_the_true_value(p: float) -> None:
    n = 12
    weights = np.array([comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
    counts = np.arange(n + 1)
    for k in (1, 2, 5, 12):
        assert weights @ pass_at_k(counts, n, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-14)
        assert weights @ pass_hat_k(counts, n, k) == pytest.approx(p**k, abs=1e-14)


@pytest.mark.parametrize("k", [1, 64, 4096, 8191, 8192])
def test_precise_at_8192_samples(k: int) -> None:
    n = 8192
    for c in (0, 1, 2, 100, 4000, 8191, 8192):
        exact = float(1 - Fraction(comb(n - c, k), comb(n, k)))
        assert pass_at_k([c], n, k)[0] == pytest.approx(exact, rel=1e-11, abs=0)
        hat = float(Fraction(comb(c, k), comb(n, k)))
        assert pass_hat_k([c], n, k)[0] == pytest.approx(hat, rel=1e-9, abs=1e-300)
    ones = np.ones((1, n))
    assert best_at_k(ones, k)[0] == pytest.approx(1.0, abs=1e-10)


def test_exact_ends() -> None:
    assert pass_at_k([0, 5, 6, 8], 8, 4).tolist()[0] == 0.0
    assert pass_at_k([5, 6, 8], 8, 4).tolist() == [1.0, 1.0, 1.0]  # n − c < k
    assert not np.signbit(pass_at_k([0], 8, 4)[0])
    assert pass_hat_k([3, 8], 8, 4).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("k", [0, 9])
def test_k_outside_the_samples_is_refused(k: int) -> None:
    for call in (lambda: pass_at_k([1], 8, k), lambda: pass_hat_k([1], 8, k)):
        with pytest.raises(ConfigError, match="8 samples"):
            call()
    with pytest.raises(ConfigError, match="8 samples"):
        best_at_k(np.zeros((1, 8)), k)


@pytest.mark.parametrize("counts", [[9], [-1], [0.5]])
def test_impossible_counts_are_refused(counts: list[float]) -> None:
    with pytest.raises(ConfigError, match="success counts"):
        pass_at_k(counts, 8, 1)


def test_curve_rises_inside_its_band_and_repeats() -> None:
    rng = np.random.default_rng(0)
    task = measured(rng.random((24, 20)) < rng.beta(0.4, 1.0, (24, 1)))
    c = curve(task, seed=3)
    assert c.ks == (1, 2, 4, 8, 16)
    assert c.value[0] == pytest.approx(task.counts.mean() / 20)
    assert np.all(np.diff(c.value) > 0)
    assert all(a < v < b for a, v, b in zip(c.low, c.value, c.high, strict=True))
    assert c == curve(task, seed=3)
    assert c.low != curve(task, seed=4).low


def test_the_interval_of_one_k_is_that_of_the_curve() -> None:
    rng = np.random.default_rng(1)
    task = measured(rng.random((24, 20)) < rng.beta(0.4, 1.0, (24, 1)))
    c, four = curve(task), pass_interval(task, 4)
    got = (four.value, four.low, four.high)
    assert got == pytest.approx((c.value[2], c.low[2], c.high[2]), abs=1e-12)


def test_a_curve_at_its_ceiling_is_not_certain() -> None:
    c = curve(measured(np.ones((24, 8))))
    assert c.value == (1.0,) * 4
    assert c.high == (1.0,) * 4
    assert c.low == pytest.approx([0.025 ** (1 / 24)] * 4)
