"""Credit assignment: from one reward per trajectory to an advantage per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition import GroupAdvantage
from posttrain.errors import LegalityError
from posttrain.trajectory import Column, Group

EPSILON = 1e-6
"""Added to the standard deviation, as in GRPO's reference code."""


@final
@dataclass(frozen=True, slots=True)
class GroupAdvantageSignal:
    """Reward minus the group's mean, optionally over the group's unbiased standard deviation.

    A group whose rewards are all equal gets exactly zero: it carries no signal, and the stage
    counts and shows how many there were.
    """

    spec: GroupAdvantage

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE`` [T] on every member."""
        return [self._score(g) for g in groups]

    def _score(self, group: Group) -> Group:
        rewards = [m.scalar(Column.REWARD) for m in group.members]
        if len(rewards) < 2 or any(r is None for r in rewards):
            raise LegalityError(
                f"task {group.task}: a group of {len(rewards)} with rewards {rewards}",
                expected="at least two members, each with a reward",
                fix="raise group_size; add the verify signal before group_advantage",
            )
        advantages = group_advantages(np.array(rewards, np.float64), scale=self.spec.scale)
        members = tuple(
            m.with_columns({Column.ADVANTAGE: np.full(len(m.trajectory), a, np.float32)})
            for m, a in zip(group.members, advantages, strict=True)
        )
        return Group(task=group.task, members=members)


def group_advantages(rewards_G: np.ndarray, *, scale: str) -> np.ndarray:
    """[G] rewards -> [G] advantages.

    Example:
        >>> group_advantages(np.array([1.0, 0.0]), scale="none").tolist()
        [0.5, -0.5]
        >>> group_advantages(np.array([3.0, 3.0]), scale="std").tolist()
        [0.0, 0.0]
    """
    if (rewards_G == rewards_G[0]).all():
        return np.zeros_like(rewards_G)  # exactly: a rounding residue over EPSILON would count
    centred = rewards_G - float(rewards_G.mean())
    return centred / (float(rewards_G.std(ddof=1)) + EPSILON) if scale == "std" else centred
