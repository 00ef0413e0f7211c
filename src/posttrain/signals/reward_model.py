"""Learnt judges of whole answers, and judges in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition.reward_models import RewardModel
from posttrain.core.errors import LegalityError
from posttrain.core.protocols import Policy, Signal
from posttrain.core.trajectory import Array, Column, Group, Scored


@final
@dataclass(frozen=True, slots=True, eq=False)
class RewardModelScores:
    """Writes ``REWARD``: the reward model's score after the last trained token.

    Raises:
        LegalityError: the policy has no scalar head.
    """

    spec: RewardModel
    policy: Policy

    def __post_init__(self) -> None:
        self.policy.scores([])  # refuses a model without a head before anything is drawn

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with a reward on every member."""
        scores = iter(self.policy.scores([m.trajectory for g in groups for m in g.members]))
        return [
            Group(task=g.task, members=tuple(self._judged(m, next(scores)) for m in g.members))
            for g in groups
        ]

    def _judged(self, member: Scored, scores_T: Array) -> Scored:
        trained = np.flatnonzero(member.trajectory.trainable)
        if not len(trained):
            raise LegalityError(
                f"a trajectory of task {member.trajectory.task} without an answer to judge",
                expected="at least one trained token",
            )
        score = float(scores_T[trained[-1]])
        return rewarded(
            member,
            sigmoid(score) if self.spec.squash == "sigmoid" else score,
            weight=self.spec.weight,
            add=self.spec.add,
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class InTurn:
    """Several judges, each of whom sees what those before it wrote."""

    judges: Sequence[Signal]

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups after the last judge."""
        for judge in self.judges:
            groups = judge.score(groups)
        return groups


def rewarded(member: Scored, value: float, *, weight: float, add: bool) -> Scored:
    """The member with ``weight * value`` as its reward, or added to it."""
    before = member.scalar(Column.REWARD) if add else 0.0
    if before is None:
        raise LegalityError(
            f"a trajectory of task {member.trajectory.task} has no reward to add to",
            fix="put another judge before the one with add",
        )
    return member.with_columns({Column.REWARD: np.asarray(before + weight * value, np.float64)})


def sigmoid(score: float) -> float:
    """1 / (1 + e^−score), without overflow.

    Example:
        >>> sigmoid(0.0), sigmoid(-1000.0), sigmoid(1000.0)
        (0.5, 0.0, 1.0)
    """
    small = float(np.exp(-abs(score)))
    return 1 / (1 + small) if score >= 0 else small / (1 + small)
