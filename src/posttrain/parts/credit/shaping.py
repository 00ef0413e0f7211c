"""Token rewards: penalties in addition to the verifier's reward.

    BEHAVIOUR_LOGPROB, REFERENCE_LOGPROB ── kl_penalty ────────┐
                                                               ├─ + ─▶ TOKEN_REWARD [T]
    length of the answer ────────── soft_length_penalty ───────┘

Shape legend: ``T`` tokens of a trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from posttrain.core.bounds import NonNegative, Positive, Tokens
from posttrain.core.errors import ConfigError
from posttrain.core.trajectory import Array, Column, Group, Scored
from posttrain.parts.base import Columns, Signal
from posttrain.parts.columns import attach
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class KLPenalty(Signal):
    """−β (log π_behaviour − log π_ref) as a reward of every token: k1 in the reward.

    The gradient of E[R − β Σ k1] is that of the reward minus β times the sequence KL(π ‖ π_ref),
    exactly (RLOO, REINFORCE++; survey section 5, trap 11).
    """

    beta: Positive = 0.05

    formula: ClassVar[str] = "-beta (log pi_behaviour - log pi_ref) per token"
    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.TOKEN_REWARD})
    untempered: ClassVar[bool] = True

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the penalty added to ``TOKEN_REWARD``."""
        return add_token_rewards(groups, [[self._penalty(m) for m in g.members] for g in groups])

    def _penalty(self, member: Scored) -> Array:
        own, ref = (
            member.columns[c].astype(np.float64)
            for c in (Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB)
        )
        # Prompts have neither log-prob; a NaN at a trained token must stay, to be refused later.
        return np.where(member.trajectory.trainable, -self.beta * (own - ref), 0.0)


@part
class SoftLengthPenalty(Signal):
    """DAPO's soft overlong punishment, as a reward of the last token (arXiv 2503.14476).

    0 up to ``max_tokens − cache_tokens`` tokens, then falling linearly to −``weight`` at
    ``max_tokens`` and beyond.
    """

    max_tokens: Tokens
    cache_tokens: Tokens
    weight: NonNegative = 1.0

    formula: ClassVar[str] = "-weight min(max(0, l - (max_tokens - cache)) / cache, 1)"
    paper: ClassVar[str] = "2503.14476"
    provides: ClassVar[Columns] = frozenset({Column.TOKEN_REWARD})
    sieves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens or self.weight <= 0:
            raise ConfigError(
                f"soft_length_penalty with max_tokens={self.max_tokens}, "
                f"cache_tokens={self.cache_tokens}, weight={self.weight}",
                expected="0 < cache_tokens <= max_tokens, weight > 0",
            )

    def penalty_of(self, length: int) -> float:
        """The penalty of an answer of ``length`` tokens, between −weight and 0.

        Example:
            >>> penalty = SoftLengthPenalty(max_tokens=10, cache_tokens=4)
            >>> [penalty.penalty_of(n) for n in (6, 7, 10, 12)]
            [0.0, -0.25, -1.0, -1.0]
        """
        over = length - (self.max_tokens - self.cache_tokens)
        return self.weight * max(min(-over / self.cache_tokens, 0.0), -1.0)

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the penalty added to ``TOKEN_REWARD``."""
        return add_token_rewards(groups, [[self._penalty(m) for m in g.members] for g in groups])

    def _penalty(self, member: Scored) -> Array:
        out = np.zeros(len(member.trajectory))
        trained = np.flatnonzero(member.trajectory.trainable)
        if len(trained):
            out[trained[-1]] = self.penalty_of(len(trained))
        return out


def add_token_rewards(groups: Sequence[Group], extra: Sequence[Sequence[Array]]) -> list[Group]:
    """The groups with [T] values added to their token rewards."""
    members = [m for g in groups for m in g.members]
    values = [v for vs in extra for v in vs]
    # float64: returns are compared for equality, and rounding would make equal ones differ.
    added = [
        m.columns.get(Column.TOKEN_REWARD, np.zeros(len(v))) + v
        for m, v in zip(members, values, strict=True)
    ]
    return attach(groups, [{Column.TOKEN_REWARD: v} for v in added])
