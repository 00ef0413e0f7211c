"""Which trajectories and tokens are held out of an update, and why.

A verdict is a column like any other: ``DISCARD`` names a reason, admission acts on it, and the
record keeps the trajectory with that reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition.credit import (
    ClipCovariance,
    ImitateFailures,
    KeepInformative,
    MarkCovariance,
    MarkEntropy,
)
from posttrain.core.errors import LegalityError
from posttrain.core.protocols import Policy
from posttrain.core.trajectory import Array, Column, Discard, End, Group, Scored


@final
@dataclass(frozen=True, slots=True)
class KeepInformativeSignal:
    """Discards every member of a group whose verifier rewards are all equal."""

    spec: KeepInformative

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``DISCARD`` on every member."""
        return [_discarding(g, self._verdict(g)) for g in groups]

    def _verdict(self, group: Group) -> Callable[[Scored], Discard]:
        rewards = [m.scalar(Column.REWARD) for m in group.members]
        if len(rewards) < self.spec.min_group or None in rewards:
            raise LegalityError(
                f"task {group.task}: a group of {len(rewards)} with rewards {rewards}",
                expected="at least two members, each with a reward",
                fix="raise group_size; add the verify signal before keep_informative",
            )
        reason = Discard.EQUAL_REWARDS if len(set(rewards)) == 1 else Discard.KEPT
        return lambda member: reason


@final
@dataclass(frozen=True, slots=True)
class DropCutOffSignal:
    """Discards answers that did not end by themselves."""

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``DISCARD`` on every member."""

        def verdict(member: Scored) -> Discard:
            done = member.trajectory.end is End.COMPLETED
            return Discard.KEPT if done else Discard.CUT_OFF

        return [_discarding(g, verdict) for g in groups]


@final
@dataclass(frozen=True, slots=True)
class ClipCovarianceSignal:
    """Takes the advantage away from a few tokens of high covariance."""

    spec: ClipCovariance

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE`` 0 at the chosen tokens."""
        cov_N = covariances(groups)
        chosen = np.flatnonzero((cov_N > self.spec.low) & (cov_N < self.spec.high))
        most = max(int(self.spec.share * len(cov_N)), 1)
        # Chance that a resumed run repeats: it follows from what was drawn.
        ids = "".join(m.trajectory.id for g in groups for m in g.members)
        rng = np.random.default_rng(zlib.crc32(ids.encode()))
        picked = rng.permutation(chosen)[:most]
        return _at_tokens(groups, picked, _without_advantage)


@final
@dataclass(frozen=True, slots=True)
class MarkCovarianceSignal:
    """Marks the tokens of the highest covariance."""

    spec: MarkCovariance

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``MARK`` on every member."""
        cov_N = covariances(groups)
        most = max(int(self.spec.share * len(cov_N)), 1)
        return _at_tokens(groups, np.argsort(-cov_N, kind="stable")[:most], _marked)


@final
@dataclass(frozen=True, slots=True, eq=False)
class MarkEntropySignal:
    """Marks the tokens of the highest entropy."""

    spec: MarkEntropy
    live: Policy

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``MARK`` on every member."""
        members = [m for g in groups for m in g.members]
        scored = self.live.entropies([m.trajectory for m in members])
        parts = [
            np.where(bool(m.scalar(Column.DISCARD)), -np.inf, v[m.trajectory.trainable])
            for m, v in zip(members, scored, strict=True)
        ]
        entropy_N = np.concatenate(parts) if parts else np.zeros(0)
        # A sequence without a prompt has a first token that nothing predicts: its entropy is NaN.
        entropy_N = np.where(np.isnan(entropy_N), -np.inf, entropy_N)
        # Less a hair: 0.1 * 30 must not become 4 by rounding.
        most = int(np.ceil(self.spec.share * np.isfinite(entropy_N).sum() - 1e-9))
        return _at_tokens(groups, np.argsort(-entropy_N, kind="stable")[:most], _marked)


@final
@dataclass(frozen=True, slots=True)
class ImitateFailuresSignal:
    """Discards either the demonstrations of a group or its rollouts."""

    spec: ImitateFailures

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``DISCARD`` on every member."""
        return [_discarding(g, self._verdict(g)) for g in groups]

    def _verdict(self, group: Group) -> Callable[[Scored], Discard]:
        def shown(member: Scored) -> bool:
            return self.spec.author in member.trajectory.authors

        rewards = [float(m.columns[Column.REWARD]) for m in group.members if not shown(m)]
        failed = sum(r >= self.spec.success for r in rewards) <= self.spec.gate
        if failed:
            return lambda member: Discard.KEPT if shown(member) else Discard.IMITATED
        return lambda member: Discard.NOT_NEEDED if shown(member) else Discard.KEPT


def covariances(groups: Sequence[Group]) -> Array:
    """[N] (A − mean A)(log π − mean log π) over the draw's trained tokens, in order."""

    def flat(column: Column) -> Array:
        parts = [m.columns[column][m.trajectory.trainable] for g in groups for m in g.members]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)

    advantage_N, logprob_N = flat(Column.ADVANTAGE), flat(Column.BEHAVIOUR_LOGPROB)
    if not len(advantage_N):
        return advantage_N
    centred_N = advantage_N - float(advantage_N.mean())
    return np.asarray(centred_N * (logprob_N - float(logprob_N.mean())))


def _without_advantage(member: Scored, chosen: Array) -> Scored:
    advantage = np.where(chosen, np.float32(0), member.columns[Column.ADVANTAGE])
    return member.with_columns({Column.ADVANTAGE: advantage})


def _marked(member: Scored, chosen: Array) -> Scored:
    return member.with_columns({Column.MARK: chosen.astype(np.float32)})


def _at_tokens(
    groups: Sequence[Group], picked: Array, change: Callable[[Scored, Array], Scored]
) -> list[Group]:
    """Every member changed, given [T] whether each of its tokens is among the picked ones."""
    at, out = 0, []
    for group in groups:
        members = []
        for member in group.members:
            trained = np.flatnonzero(member.trajectory.trainable)
            chosen = np.zeros(len(member.trajectory), np.bool_)
            chosen[trained] = np.isin(np.arange(at, at + len(trained)), picked)
            at += len(trained)
            members.append(change(member, chosen))
        out.append(Group(task=group.task, members=tuple(members)))
    return out


def _discarding(group: Group, verdict: Callable[[Scored], Discard]) -> Group:
    """The group with verdicts; one that another signal gave before stays."""
    members = []
    for member in group.members:
        before = member.scalar(Column.DISCARD) or 0.0
        code = before or float(verdict(member).code)
        members.append(member.with_columns({Column.DISCARD: np.array(code)}))
    return Group(task=group.task, members=tuple(members))
