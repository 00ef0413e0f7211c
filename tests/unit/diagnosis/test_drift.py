"""Drift between toy policies whose divergences are sums over a few answers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from posttrain.core.errors import ConfigError, ModelError
from posttrain.core.sampling import SamplingSpec
from posttrain.diagnosis.drift import drift
from posttrain.diagnosis.unbounded import mean_of, ratio_of
from posttrain.testing import RuleTaskSet, TablePolicy

LONGEST = 4
PROMPTS = tuple(f"{i}:" for i in range(10))
TASKS = RuleTaskSet(PROMPTS, lambda p, a: a.startswith("aa"), name="task")
OLD = RuleTaskSet(tuple(f"old{i}:" for i in range(8)), lambda p, a: True, name="old")


def coin(skill: float, name: str, *, old: float = 0.5) -> TablePolicy:
    """Writes "a" with probability ``skill`` (``old`` on old prompts), "b", or ends with 0.2."""

    def table(text: str) -> tuple[float, ...]:
        p = old if text.startswith("old") else skill
        return (0.8 * p, 0.8 * (1 - p), 0.2)

    return TablePolicy("ab", table, name=name)


def exact_kl(first: TablePolicy, second: TablePolicy, prompt: str) -> float:
    other = dict(second.answers(prompt, longest=LONGEST))
    return sum(
        math.exp(lp) * (lp - other[text]) for text, lp in first.answers(prompt, longest=LONGEST)
    )


BASE, POLICY = coin(0.3, "base"), coin(0.7, "policy", old=0.4)


def measured(seed: int, samples: int = 32):  # type: ignore[no-untyped-def]
    return drift(
        POLICY, BASE, TASKS, prior=[OLD], samples=samples, max_new_tokens=LONGEST, seed=seed
    )


def test_divergences_are_unbiased_and_covered() -> None:
    truths = {
        "kl_reverse": exact_kl(POLICY, BASE, "0:"),
        "kl_forward": exact_kl(BASE, POLICY, "0:"),
        "kl_prior": exact_kl(BASE, POLICY, "old0:"),
    }
    assert truths["kl_prior"] < 0.1 < truths["kl_reverse"]
    values: dict[str, list[float]] = {name: [] for name in truths}
    hits = []
    for seed in range(40):
        for r in measured(seed, samples=8).readings:
            if r.name in truths:
                values[r.name].append(r.value)
                hits.append(r.low <= truths[r.name] <= r.high)
    assert np.mean(hits) >= 0.9
    for name, truth in truths.items():
        error = np.std(values[name], ddof=1) / math.sqrt(40)
        assert abs(np.mean(values[name]) - truth) < 4 * error


def test_per_token_is_all_nats_over_all_tokens() -> None:
    # Every token is worth the same: KL of one flip of the coin, times 0.8 for not ending.
    got = measured(0, samples=200)
    flip = 0.8 * (0.7 * math.log(0.7 / 0.3) + 0.3 * math.log(0.3 / 0.7))
    interval = got.reverse.per_token
    assert interval.low <= flip <= interval.high
    assert interval.value == pytest.approx(flip, rel=0.05)
    assert "per token" in got.readings[0].words


def test_a_policy_has_not_drifted_from_itself() -> None:
    same = drift(BASE, BASE, TASKS, samples=4, max_new_tokens=LONGEST, seed=0)
    for divergence in (same.reverse, same.forward):
        interval = divergence.per_answer
        assert (interval.low, interval.value, interval.high) == (0.0, 0.0, 0.0)
    always = RuleTaskSet(PROMPTS, lambda p, a: True)
    itself = drift(BASE, BASE, always, samples=16, max_new_tokens=LONGEST, seed=0).surprise
    assert itself is not None
    assert itself.ratio.value == 1.0
    assert itself.mean_rank.value == pytest.approx(0.5)


def test_what_cannot_happen_is_infinitely_far() -> None:
    never = TablePolicy("ab", lambda text: (1.0, 0.0, 0.0), name="never")
    got = drift(never, BASE, TASKS, samples=4, max_new_tokens=LONGEST, seed=0)
    reading = got.forward.reading("kl_forward")
    assert (reading.low, reading.value) == (math.inf, math.inf)


def test_perplexity_of_successes_under_the_base() -> None:
    # All answers are "aa" then the end: the base gives them 0.24, 0.24, 0.2.
    sure = TablePolicy("ab", lambda t: (0, 0, 1) if t.endswith("aa") else (1, 0, 0), name="sure")
    got = drift(sure, BASE, TASKS, samples=8, max_new_tokens=LONGEST, seed=0)
    surprise = got.surprise
    assert surprise is not None
    assert surprise.successes == pytest.approx(
        np.full(10, (0.24 * 0.24 * 0.2) ** (-1 / 3)), rel=1e-5
    )
    reading = got.readings[-1]
    assert reading.name == "base_perplexity"
    assert reading.value == pytest.approx(4.427, abs=1e-3)
    # Rank by enumeration: how often an own sample of the base is more surprising than that.
    mine = math.log(surprise.successes[0])
    more = 0.0
    for text, lp in BASE.answers("0:", longest=LONGEST):
        worth = -lp / min(len(text) + 1, LONGEST)
        more += math.exp(lp) * (0.5 if abs(worth - mine) < 1e-9 else float(worth > mine))
    assert surprise.mean_rank.low <= more <= surprise.mean_rank.high
    nothing = RuleTaskSet(PROMPTS, lambda p, a: False)
    assert drift(BASE, BASE, nothing, samples=2, max_new_tokens=2, seed=0).surprise is None


def test_other_tokens_and_decoding_are_refused() -> None:
    other = dataclasses.replace(BASE, vocabulary="bytes", name="other")
    with pytest.raises(ModelError, match="different tokens"):
        drift(other, BASE, TASKS, max_new_tokens=4, seed=0)
    with pytest.raises(ConfigError, match="top_k=5"):
        drift(BASE, BASE, TASKS, max_new_tokens=4, seed=0, sampling=SamplingSpec(top_k=5))


# --- intervals of unbounded values -------------------------------------------------------------


@pytest.mark.parametrize("num", [8, 16, 32])
def test_skewed_means_are_covered(num: int) -> None:
    rng = np.random.default_rng(num)
    hits = []
    for _ in range(300):
        got = mean_of(rng.exponential(1.0, num))
        hits.append(got.low <= 1.0 <= got.high)
    assert 0.9 <= np.mean(hits) <= 0.99


def test_ratios_are_covered() -> None:
    rng, hits = np.random.default_rng(2), []
    for _ in range(200):
        whole = rng.gamma(4.0, 1.0, 16)
        got = ratio_of(whole * rng.exponential(0.5, 16), whole)
        hits.append(got.low <= 0.5 <= got.high)
    assert np.mean(hits) >= 0.9


def test_edges_of_unbounded_intervals() -> None:
    assert mean_of([2.0] * 9).low == 2.0
    one = mean_of([2.0])
    assert (one.low, one.high) == (-math.inf, math.inf)
    shifted, plain = mean_of(np.arange(9.0) + 5), mean_of(np.arange(9.0))
    assert shifted.low == pytest.approx(plain.low + 5)
    for wrong in ([], [math.nan]):
        with pytest.raises(ConfigError):
            mean_of(wrong)
    with pytest.raises(ConfigError):
        ratio_of([1.0], [0.0])
