"""Exposure bias of a chain with two states, where every number has a closed form.

On the path (only "a" so far) the teacher writes "a" with 0.95, the policy with 0.9. Off the path
the teacher knows its way back to "c" (0.9), and the policy, which never saw such states, guesses.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from posttrain.core.errors import ConfigError, ModelError
from posttrain.core.sampling import SamplingSpec
from posttrain.diagnosis.drawing import Demonstration
from posttrain.diagnosis.exposure import exposure_to_demonstrations, exposure_to_teacher
from posttrain.testing import RuleTaskSet, TablePolicy

LENGTH = 8
ON_T, ON_P = (0.95, 0.04, 0.01), (0.9, 0.09, 0.01)
OFF_T, OFF_P = (0.05, 0.05, 0.9), (1 / 3, 1 / 3, 1 / 3)


def chain(on: tuple[float, ...], off: tuple[float, ...], name: str) -> TablePolicy:
    def table(text: str) -> tuple[float, ...]:
        answer = text.partition(":")[2]
        if len(answer) == LENGTH:
            return (0.0, 0.0, 0.0, 1.0)
        return (*(on if answer == "a" * len(answer) else off), 0.0)

    return TablePolicy("abc", table, name=name)


TEACHER, POLICY = chain(ON_T, OFF_T, "teacher"), chain(ON_P, OFF_P, "policy")
TASKS = RuleTaskSet(tuple(f"{i}:" for i in range(12)), lambda p, a: a == "a" * LENGTH)


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def exact(depth: int, stay: float) -> float:
    """Mean error after ``depth`` tokens when each stays on the path with probability ``stay``."""
    on = stay**depth
    return on * kl(ON_T, ON_P) + (1 - on) * kl(OFF_T, OFF_P)


def excess(longest: int) -> float:
    own = sum(exact(t, ON_P[0]) for t in range(longest))
    return own / sum(exact(t, ON_T[0]) for t in range(longest)) - 1


def test_errors_by_depth_and_excess_have_their_closed_form() -> None:
    got = exposure_to_teacher(POLICY, TEACHER, TASKS, samples=100, max_new_tokens=LENGTH, seed=0)
    assert got.depth == LENGTH
    for t, (own, right) in enumerate(got.by_depth):
        assert own == pytest.approx(exact(t, ON_P[0]), abs=0.04)
        assert right == pytest.approx(exact(t, ON_T[0]), abs=0.04)
    interval = got.excess
    assert interval is not None
    assert interval.value == pytest.approx(excess(LENGTH), rel=0.15)
    assert interval.low <= excess(LENGTH) <= interval.high


def test_the_interval_of_the_excess_covers() -> None:
    hits = []
    for seed in range(60):
        got = exposure_to_teacher(
            POLICY, TEACHER, TASKS, samples=4, max_new_tokens=5, seed=seed
        ).excess
        assert got is not None
        hits.append(got.low <= excess(5) <= got.high)
    assert np.mean(hits) >= 0.88


def test_accuracy_is_agreement_on_the_likeliest_token() -> None:
    got = exposure_to_teacher(POLICY, TEACHER, TASKS, samples=100, max_new_tokens=LENGTH, seed=1)
    # On the path both say "a"; off it the guess falls on "a", the teacher says "c".
    stays = {"own": 0.9, "right": 0.95}
    on = {name: np.mean([s**t for t in range(LENGTH)]) for name, s in stays.items()}
    readings = {r.name: r for r in got.readings}
    assert readings["own_rollout_accuracy"].value == pytest.approx(on["own"], abs=0.03)
    assert readings["teacher_forced_accuracy"].value == pytest.approx(on["right"], abs=0.03)
    assert readings["exposure_excess"].low > 0.1


def test_a_policy_that_is_its_teacher_makes_no_errors() -> None:
    got = exposure_to_teacher(TEACHER, TEACHER, TASKS, samples=4, max_new_tokens=LENGTH, seed=0)
    assert got.excess is None
    assert [r.value for r in got.readings] == [1.0, 1.0]


def test_errors_that_do_not_depend_on_the_path_are_no_exposure_bias() -> None:
    # Off the path the policy errs just as on it: whatever the paths, the ratio is 1.
    same = chain(ON_P, ON_P, "same")
    got = exposure_to_teacher(
        same, chain(ON_T, ON_T, "even"), TASKS, samples=8, max_new_tokens=LENGTH, seed=0
    ).excess
    assert got is not None
    assert got.value == pytest.approx(0.0, abs=1e-6)
    assert got.low <= 1e-9
    assert got.high >= -1e-9


def test_depths_that_few_prompts_reach_do_not_count() -> None:
    def table(text: str) -> tuple[float, ...]:
        long = text.startswith("0:")
        stop = len(text.partition(":")[2]) >= (6 if long else 2)
        return (0.0, 0.0, 0.0, 1.0) if stop else (0.6, 0.2, 0.2, 0.0)

    short = TablePolicy("abc", table, name="short")
    got = exposure_to_teacher(short, TEACHER, TASKS, samples=2, max_new_tokens=8, seed=0)
    assert got.depth == 3  # two letters and the end; deeper ones are prompt 0's alone


def test_other_tokens_and_decoding_are_refused() -> None:
    other = dataclasses.replace(TEACHER, vocabulary="bytes", name="other")
    with pytest.raises(ModelError, match="different tokens"):
        exposure_to_teacher(POLICY, other, TASKS, max_new_tokens=4, seed=0)
    with pytest.raises(ConfigError, match="min_p"):
        exposure_to_teacher(
            POLICY, TEACHER, TASKS, max_new_tokens=4, seed=0, sampling=SamplingSpec(min_p=0.1)
        )
    with pytest.raises(ConfigError, match="without demonstrations"):
        exposure_to_demonstrations(POLICY, TASKS, [], max_new_tokens=4, seed=0)


# --- with demonstrations ---------------------------------------------------------------------

DEMOS = [
    Demonstration(task=t, tokens=np.array([97] * LENGTH + [0], np.int32)) for t in TASKS.held_out
]


def test_what_demonstrations_predict_is_exact_when_errors_are_final() -> None:
    got = exposure_to_demonstrations(
        POLICY, TASKS, DEMOS, samples=64, max_new_tokens=LENGTH + 1, seed=0
    )
    assert got.written == pytest.approx(np.full(12, 0.9**LENGTH), rel=1e-5)
    assert got.nats == pytest.approx(np.full(12, -LENGTH * math.log(0.9) / (LENGTH + 1)), rel=1e-5)
    assert got.greedy.tolist() == [1.0] * 12
    assert got.by_depth == (1.0,) * (LENGTH + 1)
    assert got.predicted == 1.0
    assert got.observed.low <= 0.9**LENGTH <= got.observed.high
    assert got.recovery is not None
    assert got.recovery.value == 0.0
    assert got.success.tolist() == got.kept.tolist()
    assert "predicts 100%" in got.readings[0].words


def test_recovery_is_success_off_the_demonstrations() -> None:
    # Any answer with at most one "b" or "c" succeeds: off the path, exactly one slip.
    kind = RuleTaskSet(TASKS.prompts, lambda p, a: len(a) == LENGTH and a.count("a") >= LENGTH - 1)
    even = chain(ON_P, ON_P, "even")
    got = exposure_to_demonstrations(
        even, kind, DEMOS, samples=200, max_new_tokens=LENGTH + 1, seed=0
    )
    one_slip = LENGTH * 0.1 * 0.9 ** (LENGTH - 1)
    truth = one_slip / (1 - 0.9**LENGTH)
    assert got.recovery is not None
    assert got.recovery.low <= truth <= got.recovery.high
    assert got.recovery.value == pytest.approx(truth, abs=0.04)
    assert got.observed.value == pytest.approx(0.9**LENGTH + one_slip, abs=0.04)
    assert [r.name for r in got.readings] == ["teacher_forced_accuracy", "recovery"]


def test_predicted_success_by_hand() -> None:
    # Half of the demonstrations leave the policy's likeliest path at their second token.
    mixed = [
        Demonstration(task=t, tokens=np.array([97, 97 if i % 2 else 98, 97, 0], np.int32))
        for i, t in enumerate(TASKS.held_out)
    ]

    def table(text: str) -> tuple[float, ...]:
        if len(text.partition(":")[2]) == 3:
            return (0.0, 0.0, 0.0, 1.0)
        return (0.8, 0.1, 0.1, 0.0)

    got = exposure_to_demonstrations(
        TablePolicy("abc", table), TASKS, mixed, samples=2, max_new_tokens=4, seed=0
    )
    assert got.by_depth == (1.0, 0.5, 1.0, 1.0)
    assert got.predicted == pytest.approx(0.5)
    assert got.accuracy.value == pytest.approx(3.5 / 4)
    assert got.greedy.sum() == 6
    assert got.written == pytest.approx(np.tile([0.8 * 0.1 * 0.8, 0.8**3], 6), rel=1e-5)
    twice = exposure_to_demonstrations(
        TablePolicy("abc", table), TASKS, [*mixed, *mixed], samples=2, max_new_tokens=4, seed=0
    )
    assert twice.written.tolist() == got.written.tolist()
