"""Rewards of single tokens, beside the verifier's: ``TOKEN_REWARD`` [T], which add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition.credit import KLPenalty, SoftLengthPenalty
from posttrain.core.trajectory import Array, Column, Group, Scored


@final
@dataclass(frozen=True, slots=True)
class KLPenaltySignal:
    """−β (log π_behaviour − log π_ref) at every trained token."""

    spec: KLPenalty

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the penalty added to ``TOKEN_REWARD``."""
        return add_token_rewards(groups, [[self._penalty(m) for m in g.members] for g in groups])

    def _penalty(self, member: Scored) -> Array:
        own, ref = (
            member.columns[c].astype(np.float64)
            for c in (Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB)
        )
        # Prompts have neither log-prob; a NaN at a trained token must survive and be refused.
        return np.where(member.trajectory.trainable, -self.spec.beta * (own - ref), 0.0)


@final
@dataclass(frozen=True, slots=True)
class SoftLengthPenaltySignal:
    """A penalty for answers near the limit, at their last trained token."""

    spec: SoftLengthPenalty

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the penalty added to ``TOKEN_REWARD``."""
        return add_token_rewards(groups, [[self._penalty(m) for m in g.members] for g in groups])

    def _penalty(self, member: Scored) -> Array:
        out = np.zeros(len(member.trajectory))
        trained = np.flatnonzero(member.trajectory.trainable)
        if len(trained):
            out[trained[-1]] = soft_length_penalty(len(trained), self.spec)
        return out


def soft_length_penalty(length: int, spec: SoftLengthPenalty) -> float:
    """The penalty of an answer of ``length`` tokens, between −weight and 0.

    Example:
        >>> spec = SoftLengthPenalty(max_tokens=10, cache_tokens=4)
        >>> [soft_length_penalty(n, spec) for n in (6, 7, 10, 12)]
        [0.0, -0.25, -1.0, -1.0]
    """
    over = length - (spec.max_tokens - spec.cache_tokens)
    return spec.weight * max(min(-over / spec.cache_tokens, 0.0), -1.0)


def add_token_rewards(groups: Sequence[Group], extra: Sequence[Sequence[Array]]) -> list[Group]:
    """The groups with [T] values added to the token rewards that are there already."""
    return [
        Group(
            task=g.task,
            members=tuple(_added(m, v) for m, v in zip(g.members, vs, strict=True)),
        )
        for g, vs in zip(groups, extra, strict=True)
    ]


def _added(member: Scored, values: Array) -> Scored:
    before = member.columns.get(Column.TOKEN_REWARD, np.zeros(len(values)))
    # float64: returns are compared for equality, and rounding would make equal ones differ.
    return member.with_columns({Column.TOKEN_REWARD: before + values})
