"""Chains of policies with known rates: transfer, forgetting, hand-off."""

from __future__ import annotations

import numpy as np
import pytest
from measurements import counted, policy, sampled

from posttrain.core.errors import ConfigError, RunError
from posttrain.measure.measurement import Measurement
from posttrain.measure.retention import (
    ALL,
    backward_transfer,
    forgetting,
    forward_transfer,
    handoff,
    transfer,
)


def chain(**rates: list[int]) -> list[Measurement]:
    """Policies of a chain from success counts of 64 by task, the same for all eight prompts."""
    steps = len(next(iter(rates.values())))
    return [
        policy(
            *(counted([counts[s]] * 8, taskset=name) for name, counts in rates.items()),
            name=f"stage {s}",
        )
        for s in range(steps)
    ]


def test_the_matrix_by_hand() -> None:
    # R after base, 1, 2, 3. a is stage 1's, b is stage 2's, c is stage 3's, old was there before.
    policies = chain(a=[0, 32, 16, 8], b=[16, 24, 64, 32], c=[0, 8, 16, 64], old=[64, 64, 32, 48])
    found = {
        (r.name, r.task): r.value for r in transfer(policies, {"a": 1, "b": 2, "c": 3, "old": 0})
    }
    backward = {"a": (8 - 32) / 64, "b": (32 - 64) / 64, "old": (48 - 64) / 64}
    forgotten = {"a": (32 - 8) / 64, "b": (64 - 32) / 64, "old": (64 - 48) / 64}
    forward = {"b": (24 - 16) / 64, "c": (16 - 0) / 64}
    for name, by_task in (
        ("backward_transfer", backward),
        ("forgetting", forgotten),
        ("forward_transfer", forward),
    ):
        for task, value in by_task.items():
            assert found.pop((name, task)) == pytest.approx(value)
        assert found.pop((name, ALL)) == pytest.approx(np.mean(list(by_task.values())))
    assert not found


def test_forgetting_takes_the_best_of_all_earlier_policies() -> None:
    tasks = [counted([c] * 8) for c in (16, 48, 32, 8)]
    assert forgetting(tasks).value == pytest.approx(40 / 64)


def test_nothing_changed_is_forgetting_of_expectation_zero() -> None:
    rates = np.full(12, 0.4)
    values = [
        forgetting([sampled(rates, n=16, seed=5 * i + j) for j in range(5)]).value
        for i in range(300)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    # The naive maximum of four equal policies is not zero.
    naive = []
    for i in range(100):
        rates_seen = [
            float(sampled(rates, n=16, seed=5 * i + j).successes.mean()) for j in range(5)
        ]
        naive.append(max(rates_seen[:-1]) - rates_seen[-1])
    assert np.mean(naive) > 5 * np.std(naive) / np.sqrt(100)


def test_paired_differences() -> None:
    old, new = counted([0, 32, 64] * 4), counted([0, 48, 64] * 4)
    assert backward_transfer(old, new).value == pytest.approx(16 / 64 / 3)
    assert forward_transfer(new, old).value == pytest.approx(-16 / 64 / 3)


def test_handoff_counts_gained_prompts_that_stay() -> None:
    epsilon = 0.05  # IN from 7 of 64 successes on
    before, gained = counted([0, 0, 2, 0, 64, 6]), counted([20, 20, 20, 6, 64, 64])
    later = counted([20, 0, 6, 64, 0, 7])
    r = handoff(before, gained, later, epsilon=epsilon)
    assert r is not None
    # Gained: prompts 0, 1, 2 and 5 (3 is not IN, 4 was). Stateful: 0 and 5.
    assert (r.value, r.units) == (0.5, 4)
    assert handoff(gained, before, later, epsilon=epsilon) is None


def test_refusals() -> None:
    policies = chain(a=[0, 32, 16])
    with pytest.raises(ConfigError, match="a chain of 1"):
        transfer(policies[:1], {"a": 0})
    with pytest.raises(ConfigError, match="learned in stage 3"):
        transfer(policies, {"a": 3})
    with pytest.raises(ConfigError, match="did you mean 'abc'"):
        transfer(chain(abc=[0, 1, 2]), {"abd": 1})
    with pytest.raises(RunError, match="only stage 0 was measured"):
        transfer([policies[0], *chain(b=[1, 2])], {"a": 0})
    with pytest.raises(ConfigError, match="two samples per prompt"):
        forgetting([sampled(np.ones(5), n=1)] * 2)
