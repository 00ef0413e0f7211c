"""Learnt judges of whole answers: reward models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.trajectory import Array, Column, Group, Scored
from posttrain.parts.base import (
    Columns,
    PolicyRef,
    Signal,
)
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class RewardModel(Signal):
    """``REWARD``: the score of a frozen reward model after the last token of the answer.

    ``model`` is a stage that trained one, a folder that such a stage exported, or a stock
    classifier with one or two labels. It reads the learner's own tokens, so it must have the
    learner's tokenizer. ``squash: sigmoid`` makes a probability of the score. ``add`` adds the
    weighted score to the reward that is there already, instead of writing it.
    """

    model: PolicyRef
    weight: float = 1.0
    squash: Literal["none", "sigmoid"] = "none"
    add: bool = False
    judges: ClassVar[bool] = True
    provides: ClassVar[Columns] = frozenset({Column.REWARD})

    def __post_init__(self) -> None:
        check_weight("reward_model", self.weight)

    def references(self) -> tuple[PolicyRef, ...]:
        """The reward model."""
        return (self.model,)

    def scorers(self) -> tuple[PolicyRef, ...]:
        """The reward model."""
        return (self.model,)

    def prepare(self, tools: Tools) -> None:
        """Refuse a model without a scalar head."""
        tools.policy(self.model).scores([])

    @property
    def needs(self) -> Columns:
        """The reward that it adds to, if it does."""
        return frozenset({Column.REWARD}) if self.add else frozenset()

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with a reward on every member."""
        scores = iter(
            tools.policy(self.model).scores([m.trajectory for g in groups for m in g.members])
        )
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
            sigmoid(score) if self.squash == "sigmoid" else score,
            weight=self.weight,
            add=self.add,
        )


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


def check_weight(name: str, weight: float) -> None:
    """Refuse a judge that would say nothing, or something infinite.

    Raises:
        ConfigError: as said.
    """
    if not math.isfinite(weight) or weight == 0:
        raise ConfigError(f"{name} with weight={weight}", expected="a finite number other than 0")
