"""Intervals: simulated coverage on beta-binomial prompts, and no false certainty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import (
    combined_interval,
    function_interval,
    mean_interval,
    mean_intervals,
    proportion_interval,
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


@pytest.mark.parametrize(("power", "prompts"), [(8, 32), (16, 32), (8, 64)])
def test_pass_at_k_near_its_ceiling_is_covered(power: int, prompts: int) -> None:
    """1 − (1 − p)^k of easy prompts: nearly 1, with a long tail that few prompts show."""
    rng = np.random.default_rng(power)
    truth = 1 - ((1 - rng.beta(8.0, 1.0, 400_000)) ** power).mean()
    hits = []
    for _ in range(120):
        values = 1 - (1 - rng.beta(8.0, 1.0, prompts)) ** power
        interval = mean_interval(values)
        hits.append(interval.low <= truth <= interval.high)
    assert np.mean(hits) >= 0.95


def test_skewness_moves_the_end_in_its_tail_only() -> None:
    values = np.concatenate([np.full(26, 0.9), np.linspace(0.85, 0.95, 5), [0.0]])
    skewed, limit = mean_interval(values), mean_interval(np.full(32, 0.9))
    bare = mean_interval(values[:-1])
    assert skewed.low < limit.low + 0.05
    assert skewed.high < bare.high + 0.02
    turned = mean_interval(1 - values)
    assert (1 - turned.high, 1 - turned.low) == pytest.approx((skewed.low, skewed.high), abs=0.01)


def test_proportions_are_clopper_pearson_and_cover_at_least() -> None:
    for count, num in ((0, 5), (3, 8), (31, 32), (7, 7)):
        i = proportion_interval(count, num)
        exact = stats.binomtest(count, num).proportion_ci(0.95, method="exact")
        assert (i.low, i.high) == (pytest.approx(exact.low), pytest.approx(exact.high))
    n = 24
    bounds = [proportion_interval(c, n) for c in range(n + 1)]
    for p in np.linspace(0.01, 0.99, 50):
        inside = [i.low <= p <= i.high for i in bounds]
        assert stats.binom.pmf(np.arange(n + 1), n, p) @ inside >= 0.95


def test_a_function_of_one_mean_has_the_interval_of_the_mean() -> None:
    # 20 prompts at either end carry the mean equally: the effective number is that of prompts.
    x = np.repeat([0.2, 0.8], 20)
    alone = mean_interval(x)
    through = function_interval(
        x[:, None], lambda m: m[:, 0], bounds=(0.0, 1.0), extremes=(-0.5, 0.5)
    )
    assert (through.value, through.low, through.high) == pytest.approx(
        (alone.value, alone.low, alone.high), abs=1e-12
    )


def test_a_function_of_two_means_covers() -> None:
    rng = np.random.default_rng(13)
    hits = []
    for _ in range(200):
        whole = rng.beta(2.0, 2.0, 32)
        part = whole * rng.beta(6.0, 4.0, 32)  # E[part] / E[whole] = 0.6
        interval = function_interval(
            np.stack([part, whole], axis=1),
            lambda m: m[:, 0] / m[:, 1],
            bounds=(0.0, 1.0),
            extremes=(-1.2, 0.8),  # (a − 0.6 b) / 0.5
        )
        hits.append(interval.low <= 0.6 <= interval.high)
    assert 0.90 <= np.mean(hits) <= 0.985


def test_a_function_that_few_prompts_move_reaches_as_far_as_a_mean() -> None:
    x = np.zeros((30, 1))
    x[:4] = 0.5
    interval = function_interval(
        x, lambda m: m[:, 0], bounds=(0.0, 1.0), extremes=(-x.mean(), 1 - x.mean())
    )
    alone = mean_interval(x[:, 0])
    assert interval.high == pytest.approx(alone.high, abs=1e-9)
    assert interval.high == pytest.approx(stats.beta.ppf(0.975, 2 + 1, 30 - 2))  # 4 halves: 2
    wide = function_interval(x, lambda m: m[:, 0], bounds=(-1.0, 1.0), extremes=(-9.0, 9.0))
    assert wide.high == 1.0


def test_the_mean_of_independent_values_by_hand_and_covering() -> None:
    a, b = mean_interval(np.linspace(0, 1, 20)), mean_interval(np.full(10, 0.9))
    both = combined_interval([a, b])
    assert both.value == pytest.approx((a.value + b.value) / 2)
    reach = np.hypot(a.value - a.low, b.value - b.low) / 2
    assert both.low == pytest.approx(both.value - reach)
    assert both.high == pytest.approx(both.value + np.hypot(a.high - a.value, b.high - b.value) / 2)
    rng = np.random.default_rng(14)
    hits = []
    for _ in range(200):
        sets = [mean_interval(rng.beta(a, 2.0, 20)) for a in (1.0, 2.0, 6.0)]
        i = combined_interval(sets)
        hits.append(i.low <= (1 / 3 + 1 / 2 + 3 / 4) / 3 <= i.high)
    assert 0.91 <= np.mean(hits) <= 0.99
    with pytest.raises(ConfigError, match="at least one task set"):
        combined_interval([])


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
    monkeypatch.setattr("posttrain.measure.bootstrap.BLOCK", 20 * 300)
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


def test_a_bound_beyond_all_resamples_is_students() -> None:
    values = np.linspace(0.3, 0.7, 24)
    confidence = 1 - 1e-5
    found = mean_interval(values, confidence=confidence)
    reach = stats.t.ppf((1 + confidence) / 2, df=23) * values.std(ddof=1) / np.sqrt(24)
    assert found.low <= found.value - reach * (1 - 1e-9)
    assert found.high >= found.value + reach * (1 - 1e-9)
