"""Signals from learnt reward models: their base class, and the outcome reward.

model, with a scalar head ──score after the last token──▶ reward_model ──▶ REWARD
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from posttrain.core.bounds import Number
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.trajectory import Array, Column, Group, Scored
from posttrain.parts.base import NONE, Columns, PolicyRef, Signal
from posttrain.parts.columns import trajectories_of
from posttrain.parts.registry import part, tag_of
from posttrain.parts.tools import Tools


class LearntJudge(Signal):
    """Base class of signals from a frozen model with a scalar head.

    ``add`` adds ``weight`` times the score to the existing reward, instead of replacing it.
    """

    model: PolicyRef
    weight: Number = 1.0
    add: bool = False

    judges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ConfigError(
                f"{tag_of(self)} with weight={self.weight}",
                expected="a finite number other than 0",
            )

    @property
    def needs(self) -> Columns:
        """The existing reward, with ``add``."""
        return frozenset({Column.REWARD}) if self.add else NONE

    def references(self) -> tuple[PolicyRef, ...]:
        """The model."""
        return (self.model,)

    def scorers(self) -> tuple[PolicyRef, ...]:
        """The model."""
        return (self.model,)

    def prepare(self, tools: Tools) -> None:
        """Refuse a model without a scalar head, or with other tokens than the learner's."""
        tools.policy(self.model).scores([])

    def rewarded(self, member: Scored, value: float) -> Scored:
        """The member with ``weight * value`` as its reward, or added to it.

        Raises:
            LegalityError: there is no reward to add to.
        """
        before = member.scalar(Column.REWARD) if self.add else 0.0
        if before is None:
            raise LegalityError(
                f"a trajectory of task {member.trajectory.task} has no reward to add to",
                fix="put another judge before the one with add",
            )
        reward = np.asarray(before + self.weight * value, np.float64)
        return member.with_columns({Column.REWARD: reward})


@part
class RewardModel(LearntJudge):
    """``REWARD``: the score of a frozen reward model after the last token of the answer.

    ``model`` is a stage that trained one, a folder that such a stage exported, or a transformers
    classifier with one or two labels. It must have the learner's tokenizer. ``squash: sigmoid``
    makes the score a probability. ``add`` adds the weighted score to the existing reward, instead
    of replacing it.
    """

    squash: Literal["none", "sigmoid"] = "none"

    formula: ClassVar[str] = "weight s, or weight sigmoid(s), s after the last token"
    provides: ClassVar[Columns] = frozenset({Column.REWARD})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with a reward on every member."""
        scores = iter(tools.policy(self.model).scores(trajectories_of(groups)))
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
        return self.rewarded(member, sigmoid(score) if self.squash == "sigmoid" else score)


def sigmoid(score: float) -> float:
    """1 / (1 + e^−score), without overflow.

    Example:
        >>> sigmoid(0.0), sigmoid(-1000.0), sigmoid(1000.0)
        (0.5, 0.0, 1.0)
    """
    small = float(np.exp(-abs(score)))
    return 1 / (1 + small) if score >= 0 else small / (1 + small)
