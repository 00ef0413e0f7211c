"""Exact bounds against scipy, labels against the bounds, and the support metrics."""

from __future__ import annotations

import numpy as np
import pytest
from measurements import measured
from scipy import stats

from posttrain.core.errors import ConfigError, RunError
from posttrain.measure.spec import Measure
from posttrain.measure.support import (
    Label,
    Solvable,
    SupportChange,
    clopper_pearson,
    cutoffs,
    incomplete_beta,
    labels,
    support_change,
)


@pytest.mark.parametrize("n", [1, 7, 64, 1000, 8192])
@pytest.mark.parametrize("confidence", [0.6, 0.95, 0.999])
def test_clopper_pearson_agrees_with_scipy(n: int, confidence: float) -> None:
    for c in sorted({0, 1, n // 3, n - 1, n}):
        low, high = clopper_pearson(c, n, confidence=confidence)
        test = stats.binomtest(c, n, alternative="greater").proportion_ci(confidence, "exact")
        assert low == pytest.approx(test.low, rel=1e-5)  # scipy's own root is no closer
        test = stats.binomtest(c, n, alternative="less").proportion_ci(confidence, "exact")
        assert high == pytest.approx(test.high, rel=1e-9)
        # The definition: so many successes or more have probability 1 − confidence at the bound.
        if c > 0:
            assert stats.binom.sf(c - 1, n, low) == pytest.approx(1 - confidence, rel=1e-9)
        if c < n:
            assert stats.binom.cdf(c, n, high) == pytest.approx(1 - confidence, rel=1e-9)


def test_bounds_at_the_ends_have_a_closed_form() -> None:
    for n in (1, 64, 8192):
        all_low = 0.05 ** (1 / n)
        assert clopper_pearson(n, n) == (pytest.approx(all_low, rel=1e-13), 1.0)
        assert clopper_pearson(0, n) == (0.0, pytest.approx(1 - all_low, rel=1e-10))
        assert clopper_pearson(1, n)[0] == pytest.approx(1 - 0.95 ** (1 / n), rel=1e-9)


def test_incomplete_beta_agrees_with_scipy() -> None:
    for a in (0.3, 1.0, 12.5, 4000.0):
        for b in (0.5, 1.0, 7.0, 3000.0):
            for x in (0.0, 1e-6, 0.2, 0.5, 0.57, 0.99, 1.0):
                oracle = stats.beta.cdf(x, a, b)
                assert incomplete_beta(x, a, b) == pytest.approx(oracle, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("p", [0.002, 0.05, 0.3, 0.93])
def test_exact_coverage_of_each_bound(p: float) -> None:
    n = 40
    weights = stats.binom.pmf(np.arange(n + 1), n, p)
    bounds = np.array([clopper_pearson(c, n, confidence=0.9) for c in range(n + 1)])
    assert weights[bounds[:, 0] <= p].sum() >= 0.9
    assert weights[bounds[:, 1] >= p].sum() >= 0.9


@pytest.mark.parametrize(
    ("c", "n", "confidence"), [(1, 0, 0.9), (5, 4, 0.9), (-1, 4, 0.9), (1, 4, 1.0)]
)
def test_impossible_bounds_are_refused(c: float, n: int, confidence: float) -> None:
    with pytest.raises(ConfigError, match="successes of"):
        clopper_pearson(c, n, confidence=confidence)


@pytest.mark.parametrize("n", [2, 13, 64, 150])
@pytest.mark.parametrize("epsilon", [0.02, 0.11, 0.5, 0.97])
def test_cutoffs_are_where_the_bounds_cross_epsilon(n: int, epsilon: float) -> None:
    bounds = [clopper_pearson(c, n, confidence=0.9) for c in range(n + 1)]
    max_out, min_in = cutoffs(n, epsilon=epsilon, confidence=0.9)
    assert max_out == max([c for c, b in enumerate(bounds) if b[1] <= epsilon], default=-1)
    assert min_in == min([c for c, b in enumerate(bounds) if b[0] >= epsilon], default=n + 1)


@pytest.mark.parametrize("samples", [2, 7, 16, 64, 100, 333, 1024, 8192])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_no_success_is_out_at_the_decidable_threshold(samples: int, confidence: float) -> None:
    spec = Measure(samples=samples, confidence=confidence)
    assert cutoffs(samples, epsilon=spec.threshold, confidence=confidence)[0] == 0
    below = spec.threshold * (1 - 1e-6)
    assert cutoffs(samples, epsilon=below, confidence=confidence)[0] == -1


def test_labels_of_the_three_kinds() -> None:
    task = measured(np.arange(64) < np.array([[0], [1], [6], [7], [64]]))
    got = labels(task, epsilon=Measure(samples=64).threshold)
    unsure = Label.UNDETERMINED
    assert got == (Label.OUT, unsure, unsure, Label.IN, Label.IN)


def change(*, preserved: int, expanded: int, shrunk: int, out: int, open_: int) -> SupportChange:
    pairs = [(Label.IN, Label.IN)] * preserved + [(Label.OUT, Label.IN)] * expanded
    pairs += [(Label.IN, Label.OUT)] * shrunk + [(Label.OUT, Label.OUT)] * out
    pairs += [(Label.IN, Label.UNDETERMINED)] * open_
    return SupportChange(
        task="sums",
        epsilon=0.05,
        confidence=0.95,
        before=tuple(b for b, _ in pairs),
        after=tuple(a for _, a in pairs),
        solvable=Solvable(both=0, before_only=0, after_only=0, neither=0),
    )


def test_support_metrics_worked_by_hand() -> None:
    c = change(preserved=6, expanded=2, shrunk=4, out=3, open_=5)
    assert (c.preserved, c.expanded, c.shrunk, c.out, c.undetermined) == (6, 2, 4, 3, 5)
    assert c.srr == 0.6
    assert c.ndr == 0.25
    assert c.sds == pytest.approx(2 * 0.6 * 0.25 / (0.6 + 0.25))
    assert c.nscr == pytest.approx(-2 / 12)


@pytest.mark.parametrize("p", range(3))
@pytest.mark.parametrize("e", range(3))
@pytest.mark.parametrize("s", range(3))
def test_metrics_are_none_exactly_where_they_are_0_over_0(p: int, e: int, s: int) -> None:
    c = change(preserved=p, expanded=e, shrunk=s, out=1, open_=1)
    assert (c.srr is None) == (p + s == 0)
    assert (c.ndr is None) == (p + e == 0)
    assert (c.nscr is None) == (p + e + s == 0)
    if c.srr is not None and c.ndr is not None and c.srr + c.ndr > 0:
        assert c.sds == pytest.approx(2 * c.srr * c.ndr / (c.srr + c.ndr))
    else:
        assert c.sds is None


def test_support_change_from_samples() -> None:
    before = measured(np.arange(64) < np.array([[0], [0], [40], [40], [3]]))
    after = measured(np.arange(64) < np.array([[30], [0], [0], [64], [0]]))
    c = support_change(before, after, epsilon=Measure(samples=64).threshold)
    counted = (c.expanded, c.out, c.shrunk, c.preserved, c.undetermined)
    assert counted == (1, 1, 1, 1, 1)
    assert c.solvable == Solvable(both=1, before_only=2, after_only=1, neither=1)
    with pytest.raises(RunError, match="64 and 32 samples"):
        support_change(before, measured(np.zeros((5, 32))), epsilon=0.1)
