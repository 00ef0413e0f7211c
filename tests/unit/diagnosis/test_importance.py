"""Reachability's estimator: unbiased, bounds valid far below what sampling could show."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posttrain.core.errors import ConfigError
from posttrain.diagnosis.importance import ImportanceSample, odds_words


def evidence(log_base, log_later, counts, n, **own) -> ImportanceSample:  # type: ignore[no-untyped-def]
    seen = np.flatnonzero(counts)
    return ImportanceSample(
        log_base=np.asarray(log_base)[seen],
        log_later=np.asarray(log_later)[seen],
        times=np.asarray(counts)[seen],
        num_samples=n,
        **own,
    )


def population(size: int, spread: float, *, solved: float, p: float, seed: int = 3):  # type: ignore[no-untyped-def]
    """log π₀ and log π₁ of ``size`` successes whose log-weights have the given spread."""
    rng = np.random.default_rng(seed)
    later = rng.normal(0, 1.5, size)
    later += math.log(solved) - np.logaddexp.reduce(later)
    base = later + rng.normal(0, spread, size)
    return base + math.log(p) - np.logaddexp.reduce(base), later


def draws(later, n, rng):  # type: ignore[no-untyped-def]
    share = np.exp(later)
    return rng.multinomial(n, np.append(share, max(0.0, 1 - share.sum())))[:-1]


def test_unbiased_over_every_possible_sample() -> None:
    # Three successes and a failure, n = 4 draws: all 4^4 outcomes with their probabilities.
    base, later, n = np.log([1e-12, 3e-11, 2e-7]), np.log([0.3, 0.05, 0.001]), 4
    share = np.append(np.exp(later), 1 - np.exp(later).sum())
    totals = dict.fromkeys(("log10", "weighted"), 0.0)
    for outcome in itertools.product(range(4), repeat=n):
        chance = float(np.prod(share[list(outcome)]))
        counts = np.bincount(outcome, minlength=4)[:3]
        if counts.sum():
            got = evidence(base, later, counts, n)
            for name in totals:
                totals[name] += chance * 10 ** getattr(got, name)
            assert got.floor <= got.log10 + 1e-12
    truth = float(np.exp(base).sum())
    assert totals["log10"] == pytest.approx(truth, rel=1e-9)
    assert totals["weighted"] == pytest.approx(truth, rel=1e-9)


def test_the_lower_bound_holds_over_every_possible_sample() -> None:
    base, later, n = np.log([1e-12, 3e-11, 2e-7]), np.log([0.3, 0.05, 0.001]), 4
    share = np.append(np.exp(later), 1 - np.exp(later).sum())
    truth = math.log10(float(np.exp(base).sum()))
    for tail in (0.3, 0.025):
        wrong = sum(
            float(np.prod(share[list(outcome)]))
            for outcome in itertools.product(range(4), repeat=n)
            if evidence(base, later, np.bincount(outcome, minlength=4)[:3], n).low(tail)
            > truth + 1e-9
        )
        assert wrong <= tail


@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("size", [5, 5000])
def test_simulated_bounds_hold_for_light_and_heavy_tails(size: int, spread: float) -> None:
    base, later = population(size, spread, solved=0.6, p=1e-12)
    rng, n, tail = np.random.default_rng(5), 64, 0.1
    found = [evidence(base, later, draws(later, n, rng), n) for _ in range(80)]
    lows = np.array([e.low(tail) for e in found])
    # 10 % may be wrong, 18 % would be four standard errors more; a Student bound fails this.
    assert (lows > -12 + 1e-9).mean() <= 0.18
    assert all(e.floor <= e.low(tail) <= e.log10 + 1e-9 for e in found)


def test_trusted_estimates_are_good_to_a_factor_of_two() -> None:
    rng, n, judged, good, trials = np.random.default_rng(6), 256, 0, 0, 0
    for spread in (0.5, 1.0, 1.5, 2.0, 3.0):
        base, later = population(3000, spread, solved=0.6, p=1e-9)
        for _ in range(30):
            found = evidence(base, later, draws(later, n, rng), n)
            trials += 1
            if found.doubt is None:
                judged += 1
                good += abs(found.log10 + 9) < math.log10(2)
    assert judged >= 0.5 * trials
    assert good >= 0.97 * judged


def test_heavy_weights_are_doubted_though_the_usual_sample_size_looks_fine() -> None:
    base, later = population(300_000, 3.0, solved=0.6, p=1e-9)
    rng, n = np.random.default_rng(7), 256
    found = [evidence(base, later, draws(later, n, rng), n) for _ in range(20)]
    assert all(e.doubt is not None for e in found)


def test_doubts_say_what_is_wrong() -> None:
    few = evidence(np.log([1e-9]), np.log([0.01]), [2], 64)
    assert few.doubt == "only 2 of 64 samples succeeded"
    one = evidence(np.log([8e-9, 5e-11]), np.log([0.001, 0.5]), [1, 40], 64)
    assert one.doubt is not None
    assert one.doubt.startswith("one sample carries 9")
    assert evidence(np.log([1e-9]), np.log([0.5]), [0], 64).log10 == -math.inf
    barred = evidence(np.array([-np.inf]), np.log([0.5]), [30], 64)
    assert "none of the answers" in str(barred.doubt)


def test_a_dominant_answer_that_had_to_be_found_is_no_reason_for_doubt() -> None:
    # 95 % of the weight on one sequence, seen 40 times: its probability is known exactly.
    known = evidence(np.log([1e-8, 5e-10]), np.log([0.6, 0.2]), [40, 13], 64)
    assert known.doubt is None
    assert known.log10 == pytest.approx(math.log10(1.05e-8), abs=1e-6)
    assert known.low(0.025) == pytest.approx(known.floor)


def test_ways_that_the_later_policy_never_writes_are_missed_and_the_upper_bound_admits_it() -> None:
    # The base succeeds with 1 in 1000, in a form that the later policy dropped.
    base, later = population(50, 0.5, solved=0.7, p=1e-9)
    truth = math.log10(1e-3 + 1e-9)
    counts = draws(later, 256, np.random.default_rng(8))
    found = evidence(base, later, counts, 256, base_samples=256)
    assert found.doubt is None
    assert found.log10 < -8.9 < truth  # wrong by six orders of magnitude, and cannot know it
    assert found.low(0.025) <= truth <= found.high(0.025)
    assert evidence(base, later, counts, 256).high(0.025) == 0.0


def test_what_is_certain_stands_against_unlucky_draws_of_the_base() -> None:
    sure = evidence(np.log([0.1]), np.log([0.9]), [60], 64, base_samples=256)
    assert sure.high(0.025) == pytest.approx(-1.0)  # 0 of 256 alone would say 1.4 %
    assert sure.low(0.025) == pytest.approx(-1.0)


def test_far_below_the_smallest_float() -> None:
    base, later = population(40, 1.0, solved=0.7, p=1e-9)
    shifted = evidence(base - 2000.0, later - 800.0, [1] * 40, 256)
    plain = evidence(base - 200.0, later - 80.0, [1] * 40, 256)
    for name in ("log10", "weighted"):
        gap = getattr(shifted, name) - getattr(plain, name)
        assert gap == pytest.approx(-1080 / math.log(10), rel=1e-9)
    assert math.isfinite(shifted.low(0.025))


def test_the_betting_bound_by_hand() -> None:
    # Every draw succeeds with weight w: the mean is w, and the fortune has a closed form.
    n, tail, w = 32, 0.05, 1e-6
    got = evidence(np.full(n, math.log(w) - 50), np.full(n, -50.0), [1] * n, n).low(tail)
    mu = 10**got
    stakes = np.geomspace(0.5 / n, 0.95, 8)
    fortune = 0.9 * np.mean((1 + stakes * (w / mu - 1)) ** n) + 0.1 * w / mu
    assert fortune == pytest.approx(1 / tail, rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"log_base": np.log([0.5, 0.1])},
        {"times": np.array([65])},
        {"times": np.array([0])},
        {"log_base": np.array([np.nan])},
        {"log_later": np.array([0.1])},
        {"base_successes": 3},
    ],
)
def test_impossible_evidence_is_refused(fields) -> None:  # type: ignore[no-untyped-def]
    usual = {
        "log_base": np.log([0.5]),
        "log_later": np.log([0.5]),
        "times": np.array([3]),
        "num_samples": 64,
    }
    ImportanceSample(**usual)
    with pytest.raises(ConfigError):
        ImportanceSample(**{**usual, **fields})


def test_odds_in_words() -> None:
    assert odds_words(-7.602) == "about 1 in 40 million"
    assert odds_words(-2.0) == "about 1 in 100"
    assert odds_words(-12.3) == "about 1 in 2 trillion"
