"""Intervals: simulated coverage on beta-binomial prompts, and no false certainty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from posttrain.errors import ConfigError
from posttrain.probes.bootstrap import (
    mean_interval,
    mean_intervals,
    ratio_interval,
    student_quantile,
)

SETS = {
    "two peaks": (0.5, 0.5),
    "hard": (0.3, 1.2),
    "middle": (2.0, 5.0),
    "easy": (8.0, 1.0),
    "nearly none": (0.1, 2.0),
    "all or nothing": (0.05, 0.05),
}


def test_student_quantiles_agree_with_scipy() -> None:
    for degrees in (1, 2, 7, 15, 63, 2000):
        for level in (0.5, 0.9, 0.975, 0.9995):
            oracle = stats.t.ppf(level, degrees)
            got = student_quantile(level, degrees=degrees)
            assert got == pytest.approx(oracle, rel=1e-8, abs=1e-7)


@pytest.mark.parametrize("kind", SETS)
def test_95_percent_covers_between_90_and_99_percent(kind: str) -> None:
    a, b = SETS[kind]
    rng = np.random.default_rng(7)
    trials, hits = 150, []
    for prompts in (16, 32):
        for _ in range(trials):
            rates = rng.binomial(64, rng.beta(a, b, prompts)) / 64
            interval = mean_interval(rates)
            hits.append(interval.low <= a / (a + b) <= interval.high)
    assert 0.90 <= np.mean(hits) <= 0.995


def test_paired_differences_cover() -> None:
    rng = np.random.default_rng(8)
    rates = rng.beta(0.5, 1.0, 200_000)
    truth = float((rates**0.7 - rates).mean())
    hits = []
    for _ in range(200):
        p = rng.beta(0.5, 1.0, 24)
        before, after = rng.binomial(64, p) / 64, rng.binomial(64, p**0.7) / 64
        interval = mean_interval(after - before, lowest=-1.0)
        hits.append(interval.low <= truth <= interval.high)
    assert 0.90 <= np.mean(hits) <= 0.985


def test_pairing_pays() -> None:
    rng = np.random.default_rng(9)
    before = rng.beta(0.5, 0.5, 32)
    after = np.clip(before + 0.02 + rng.normal(scale=0.005, size=32), 0, 1)
    paired = mean_interval(after - before, lowest=-1.0)
    alone = mean_interval(after)
    assert paired.is_positive
    assert paired.high - paired.low < (alone.high - alone.low) / 10


@pytest.mark.parametrize("num", [1, 5, 16, 24, 300])
def test_prompts_all_alike_leave_room_for_those_not_asked(num: int) -> None:
    unseen = 1 - 0.025 ** (1 / num)  # (1 − unseen)^num = 2.5 %
    solved, failed = mean_interval(np.ones(num)), mean_interval(np.zeros(num))
    assert (solved.value, solved.high, failed.value, failed.low) == (1.0, 1.0, 0.0, 0.0)
    assert solved.low == pytest.approx(1 - unseen)
    assert failed.high == pytest.approx(unseen)
    level = mean_interval(np.zeros(num), lowest=-1.0)
    assert (level.low, level.high) == (pytest.approx(-unseen), pytest.approx(unseen))


def test_the_bound_for_prompts_all_alike_is_exact_in_the_worst_case() -> None:
    # A share q of prompts always fails, the others never do; 24 prompts all look solved with
    # probability (1 − q)^24, and only then is the interval's lower end 0.025^(1/24).
    low = mean_interval(np.ones(24)).low
    assert low**24 == pytest.approx(0.025)


def test_one_failure_among_many_does_not_bring_false_certainty() -> None:
    one_slip = np.ones(24)
    one_slip[0] = 63 / 64
    slipped, perfect = mean_interval(one_slip), mean_interval(np.ones(24))
    assert slipped.low <= perfect.low
    assert slipped.low == pytest.approx(perfect.low, abs=0.005)


def test_intervals_stay_inside_their_range_and_hold_their_value() -> None:
    rng = np.random.default_rng(3)
    for prompts in (2, 3, 5, 9, 20):
        for power in (1, 4, 30):
            x = rng.random(prompts) ** power
            interval = mean_interval(x)
            assert 0 <= interval.low <= interval.value <= interval.high <= 1
            assert interval.value == pytest.approx(x.mean())
            assert interval.low < interval.high


def test_higher_confidence_is_wider_and_seeds_repeat() -> None:
    x = np.random.default_rng(4).beta(0.5, 0.5, 20)
    wide, narrow = mean_interval(x, confidence=0.99), mean_interval(x, confidence=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert mean_interval(x, seed=1) == mean_interval(x, seed=1)
    assert mean_interval(x, seed=1).low != mean_interval(x, seed=2).low
    assert (wide.num_prompts, wide.seed, wide.confidence) == (20, 0, 0.99)


def test_columns_share_resamples_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(5).random((20, 2))
    together = mean_intervals(x, ranges=((0.0, 1.0), (0.0, 1.0)))
    for column, interval in zip(x.T, together, strict=True):
        alone = mean_interval(column)
        assert (interval.low, interval.high) == pytest.approx((alone.low, alone.high), abs=1e-12)
    monkeypatch.setattr("posttrain.probes.bootstrap.BLOCK", 20 * 300)
    in_blocks = mean_intervals(x, ranges=((0.0, 1.0), (0.0, 1.0)))
    for a, b in zip(together, in_blocks, strict=True):
        assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=1e-12)


def test_reflection_reflects_the_interval() -> None:
    x = np.random.default_rng(6).beta(0.5, 2.0, 24)
    a, b = mean_interval(x), mean_interval(1 - x)
    assert (1 - a.high, 1 - a.low) == (pytest.approx(b.low), pytest.approx(b.high))


def test_ratio_covers() -> None:
    rng = np.random.default_rng(11)
    hits = []
    for _ in range(200):
        whole = rng.beta(0.5, 1.0, 24)
        part = whole * rng.beta(8.0, 2.0, 24)  # E[part] / E[whole] = 0.8
        interval = ratio_interval(part, whole)
        hits.append(interval.low <= 0.8 <= interval.high)
    assert 0.90 <= np.mean(hits) <= 0.985


def test_ratio_counts_only_prompts_that_have_one() -> None:
    whole = np.repeat([1.0, 0.0], [12, 100])
    interval = ratio_interval(whole, whole)
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.025 ** (1 / 12))
    assert interval.num_prompts == 112


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([]),
        lambda: mean_interval([0.5, 1.5]),
        lambda: mean_interval([0.5, np.nan]),
        lambda: mean_interval([0.5, 0.6], confidence=0.4),
        lambda: mean_intervals(np.zeros((3, 2)), ranges=((0.0, 1.0),)),
        lambda: ratio_interval([0.0, 0.0], [0.0, 0.0]),
        lambda: ratio_interval([0.0], [0.0, 1.0]),
        lambda: student_quantile(0.3, degrees=4),
    ],
)
def test_what_has_no_interval_is_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        call()
