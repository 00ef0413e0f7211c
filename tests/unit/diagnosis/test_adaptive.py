"""Adaptive support: labels stay right though sampling stops because of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from posttrain.core.errors import ConfigError, TaskError
from posttrain.diagnosis.adaptive import (
    AdaptiveDesign,
    Tally,
    adaptive_support,
    boundaries,
    expected_draws,
    log_wealths,
    next_draws,
    sequential_label,
)
from posttrain.measure.support import Label, cutoffs
from posttrain.testing import RuleTaskSet, TablePolicy

DESIGN = AdaptiveDesign(epsilon=0.05, budget=2000)


@pytest.mark.parametrize(("c", "n"), [(0, 0), (0, 40), (1, 40), (7, 40), (40, 40), (3, 400)])
def test_fortunes_are_averaged_likelihood_ratios(c: int, n: int) -> None:
    eps = 0.05

    def ratio(p: float) -> float:
        return float(np.exp(stats.binom.logpmf(c, n, p) - stats.binom.logpmf(c, n, eps)))

    prior = stats.beta(0.5, 0.5)
    above = integrate.quad(lambda u: ratio(prior.ppf(u)), prior.cdf(eps), 1, limit=400)[0]
    below = integrate.quad(lambda u: ratio(prior.ppf(u)), 0, prior.cdf(eps), limit=400)[0]
    inside, outside = log_wealths(c, n, epsilon=eps)
    assert math.exp(inside) == pytest.approx(above / prior.sf(eps), rel=1e-5)
    never = (1 - eps) ** -n if c == 0 else 0.0
    expected = 0.25 * below / prior.cdf(eps) + 0.75 * never
    assert math.exp(outside) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [0.01, 0.05])
def test_no_bet_on_more_gains_on_average_when_there_is_less(p: float) -> None:
    # One more sample multiplies the fortune by at most 1 on average, from any counts.
    for c, n in [(0, 3), (2, 10), (5, 80)]:
        now = math.exp(log_wealths(c, n, epsilon=0.05)[0])
        won = math.exp(log_wealths(c + 1, n + 1, epsilon=0.05)[0])
        lost = math.exp(log_wealths(c, n + 1, epsilon=0.05)[0])
        assert p * won + (1 - p) * lost <= now * (1 + 1e-9)
        if p == 0.05:
            assert p * won + (1 - p) * lost == pytest.approx(now, rel=1e-9)


def paths(p: float, longest: int, trials: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(11).random((trials, longest)) < p, axis=1)


def test_looking_after_every_sample_keeps_the_stated_error() -> None:
    longest, trials, eps = 1500, 3000, 0.05
    outs, ins = boundaries(longest, design=DESIGN)
    counts = paths(eps, longest, trials)  # p = ε: both labels are wrong
    assert (counts >= np.array(ins)).any(axis=1).mean() <= 0.05
    assert (counts <= np.array(outs)).any(axis=1).mean() <= 0.05
    # Ordinary bounds, looked at after every sample, are wrong far more often.
    fixed = [cutoffs(n, epsilon=eps, confidence=0.95) for n in range(1, longest + 1)]
    peeked = counts <= np.array([most for most, _ in fixed])
    assert peeked.any(axis=1).mean() > 0.15


def test_prompts_far_from_the_threshold_are_labelled_soon_and_rightly() -> None:
    outs, ins = boundaries(400, design=DESIGN)
    never = next(n for n, most in enumerate(outs, 1) if most >= 0)
    assert never <= math.ceil(math.log(20 / 0.75) / -math.log(0.95)) == 65
    for p, bound in ((0.5, 12), (0.2, 60)):
        decided = paths(p, 400, 400) >= np.array(ins)
        assert decided.any(axis=1).mean() > 0.99
        assert np.median(decided.argmax(axis=1)) < bound


def test_boundaries_are_where_labels_change() -> None:
    outs, ins = boundaries(120, design=DESIGN)
    for n in (1, 5, 64, 65, 120):
        got = [sequential_label(c, n, design=DESIGN) for c in range(n + 1)]
        assert got.count(Label.OUT) == outs[n - 1] + 1
        assert got.count(Label.IN) == n + 1 - ins[n - 1]
        assert got == sorted(got, key=[Label.OUT, Label.UNDETERMINED, Label.IN].index)


def test_failures_so_far_are_expected_to_go_on() -> None:
    left = expected_draws(0, 20, design=DESIGN)
    assert sequential_label(0, 20 + left, design=DESIGN) is Label.OUT
    assert sequential_label(0, 20 + left - 6, design=DESIGN) is Label.UNDETERMINED
    assert expected_draws(5, 100, design=DESIGN) > 10_000  # right at the threshold


def test_the_budget_is_kept_and_the_soonest_labels_come_first() -> None:
    design = AdaptiveDesign(epsilon=0.05, budget=150, first=20)
    tally = Tally.empty(4)
    assert next_draws(tally, design=design) == dict.fromkeys(range(4), 20)
    tally = tally.add(dict.fromkeys(range(4), 20), {0: 18, 1: 2, 2: 0, 3: 1}, design=design)
    plan = next_draws(tally, design=design)
    assert 0 not in plan  # decided
    assert 2 in plan
    assert sum(plan.values()) <= 70
    spent = tally
    while plan := next_draws(spent, design=design):
        spent = spent.add(plan, {}, design=design)
    assert spent.spent <= 150
    assert next_draws(Tally.empty(200), design=design) == {}


def test_a_decided_label_stays() -> None:
    tally = Tally.empty(1).add({0: 80}, {0: 0}, design=DESIGN)
    assert tally.labels == (Label.OUT,)
    assert tally.add({0: 40}, {0: 40}, design=DESIGN).labels == (Label.OUT,)


# --- with a policy ---------------------------------------------------------------------------

RATES = {"n": 0.0, "s": 0.005, "e": 0.05, "m": 0.3, "a": 1.0}
PROMPTS = tuple(f"{letter}{i}:" for letter in RATES for i in range(6))
TASKS = RuleTaskSet(PROMPTS, lambda prompt, answer: answer == "y")


def table(text: str) -> tuple[float, ...]:
    rate = RATES[text[0]]
    return (0.0, 0.0, 1.0) if text[-1] in "yx" else (rate, 1 - rate, 0.0)


POLICY = TablePolicy("yx", table)


def test_labels_of_a_policy_with_known_rates() -> None:
    design = AdaptiveDesign(epsilon=0.05, budget=3000)
    got = adaptive_support(POLICY, TASKS, design=design, max_new_tokens=2, seed=0)
    by_rate = {
        letter: [label for p, label in zip(PROMPTS, got.labels, strict=True) if p[0] == letter]
        for letter in RATES
    }
    assert by_rate["a"] == by_rate["m"] == [Label.IN] * 6
    assert by_rate["n"] == [Label.OUT] * 6
    assert by_rate["s"].count(Label.OUT) >= 4
    assert Label.IN not in by_rate["s"]
    assert got.tally.spent <= 3000
    # The easy prompts paid for the hard ones.
    samples = dict(zip(PROMPTS, got.tally.samples, strict=True))
    assert samples["a0:"] == 16
    assert max(samples[f"e{i}:"] for i in range(6)) > 100
    shares = {r.name: r.value for r in got.readings}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["in_share"] >= 12 / 30


def test_more_labels_than_an_even_split_of_the_same_budget() -> None:
    budget = 40 * len(PROMPTS)
    design = AdaptiveDesign(epsilon=0.05, budget=budget)
    got = adaptive_support(POLICY, TASKS, design=design, max_new_tokens=2, seed=1)
    decided = sum(label is not Label.UNDETERMINED for label in got.labels)
    even = AdaptiveDesign(epsilon=0.05, budget=budget, first=40)
    flat = adaptive_support(POLICY, TASKS, design=even, max_new_tokens=2, seed=1)
    assert flat.tally.spent == budget
    assert flat.rounds == 1
    assert decided >= 3 + sum(label is not Label.UNDETERMINED for label in flat.labels)


def test_same_seed_same_labels_and_observers_see_every_round() -> None:
    design = AdaptiveDesign(epsilon=0.05, budget=1000)
    seen: list[int] = []
    one = adaptive_support(
        POLICY, TASKS, design=design, max_new_tokens=2, seed=3,
        observe=lambda tally: seen.append(tally.spent),
    )  # fmt: skip
    two = adaptive_support(POLICY, TASKS, design=design, max_new_tokens=2, seed=3)
    assert one == two
    assert len(seen) == one.rounds
    assert seen[-1] == one.tally.spent
    halted = adaptive_support(
        POLICY, TASKS, design=design, max_new_tokens=2, seed=3, stop=lambda: len(seen) > 0
    )
    assert halted.tally.spent == 0


def test_what_cannot_work_is_refused_before_drawing() -> None:
    design = AdaptiveDesign(epsilon=0.05, budget=29)
    with pytest.raises(ConfigError, match="29 samples for the 30 prompts"):
        adaptive_support(POLICY, TASKS, design=design, max_new_tokens=2, seed=0)
    short = TablePolicy("yx", table, context=2)
    with pytest.raises(TaskError):
        adaptive_support(short, TASKS, design=DESIGN, max_new_tokens=2, seed=0)
    for wrong in ({"epsilon": 0.0}, {"budget": 0}, {"confidence": 0.4}):
        with pytest.raises(ConfigError):
            AdaptiveDesign(**{"epsilon": 0.1, "budget": 10, **wrong})  # type: ignore[arg-type]
