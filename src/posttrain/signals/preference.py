"""Pairs out of rewards, and the baselines of losses on unpaired answers.

Both baselines are one number per draw, computed with the weights before the update. They are
columns like any other: constants, equal in every micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from posttrain.composition.preference_signals import (
    LogRatioCentre,
    MatchQuantiles,
    MismatchedKL,
    PreferDemonstration,
    PreferenceSignal,
)
from posttrain.core.errors import LegalityError
from posttrain.core.protocols import Policy, Signal
from posttrain.core.provenance import FloatArray, Kind, Span
from posttrain.core.trajectory import Array, Column, Discard, Group, Scored, Trajectory
from posttrain.signals.transport import MatchQuantilesSignal, PreferDemonstrationSignal


@final
@dataclass(frozen=True, slots=True)
class RankPairsSignal:
    """The first of a group's best members is chosen, the first of its worst rejected.

    Members that an earlier signal discarded take no part.
    """

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``PREFERENCE`` (+1, −1, else 0) and ``DISCARD`` on every member."""
        return [self._score(g) for g in groups]

    def _score(self, group: Group) -> Group:
        rewards = np.array([m.columns[Column.REWARD] for m in group.members], np.float64)
        before = [m.scalar(Column.DISCARD) or 0.0 for m in group.members]
        open_ = np.flatnonzero(np.array(before) == Discard.KEPT.code)
        signs = np.zeros(len(rewards))
        reason = Discard.EQUAL_REWARDS
        if len(open_) and rewards[open_].max() > rewards[open_].min():
            reason = Discard.UNRANKED
            signs[open_[rewards[open_].argmax()]] = 1.0
            signs[open_[rewards[open_].argmin()]] = -1.0
        members = tuple(
            m.with_columns(
                {
                    Column.PREFERENCE: np.asarray(sign),
                    Column.DISCARD: np.asarray(float(reason.code) if not (sign or old) else old),
                }
            )
            for m, sign, old in zip(group.members, signs, before, strict=True)
        )
        return Group(task=group.task, members=members)


@final
@dataclass(frozen=True, slots=True, eq=False)
class MismatchedKLSignal:
    """The mean of log π − log π_ref, summed per answer, over answers to other prompts.

    It estimates how far the policy has moved for answers in general. It may come out negative: the
    term that reads it takes nothing below 0.
    """

    live: Policy
    reference: Policy

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the scalar ``MISMATCHED_KL``, equal on all members.

        Raises:
            LegalityError: all prompts of the draw are equal.
        """
        context = min(self.live.context, self.reference.context)
        crossed = mismatched([m.trajectory for g in groups for m in g.members], context=context)
        pairs = zip(self.live.logprobs(crossed), self.reference.logprobs(crossed), strict=True)
        estimate = np.mean([_summed(ours - theirs) for ours, theirs in pairs])
        return _everywhere(groups, {Column.MISMATCHED_KL: np.asarray(estimate)})


@final
@dataclass(frozen=True, slots=True, eq=False)
class LogRatioCentreSignal:
    """The middle between the mean log-ratios of good and of bad answers."""

    live: Policy

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the scalar ``LOG_RATIO_CENTRE``, equal on all members."""
        members = [m for g in groups for m in g.members]
        scored = self.live.logprobs([m.trajectory for m in members])
        ratios = [
            _summed(ours - m.columns[Column.REFERENCE_LOGPROB])
            for ours, m in zip(scored, members, strict=True)
        ]
        good = np.array([float(m.columns[Column.LABEL]) > 0 for m in members])
        sides = [np.array(ratios)[side].mean() for side in (good, ~good) if side.any()]
        return _everywhere(groups, {Column.LOG_RATIO_CENTRE: np.asarray(np.mean(sides))})


def preference_signal(
    spec: PreferenceSignal, *, live: Policy, frozen: Callable[[str], Policy]
) -> Signal:
    """The live object behind a specification.

    Args:
        spec: which signal.
        live: the policy being trained.
        frozen: finds the policy behind a reference.
    """
    if isinstance(spec, MismatchedKL):
        return MismatchedKLSignal(live, frozen(spec.policy))
    if isinstance(spec, LogRatioCentre):
        return LogRatioCentreSignal(live)
    if isinstance(spec, PreferDemonstration):
        return PreferDemonstrationSignal(spec)
    if isinstance(spec, MatchQuantiles):
        return MatchQuantilesSignal(spec, live)
    return RankPairsSignal()


def mismatched(trajectories: Sequence[Trajectory], *, context: int) -> list[Trajectory]:
    """Each prompt, continued with the answer of the next trajectory that has another prompt.

    Answers are cut at ``context``. The authors of the answer's tokens stay what they were, without
    what was known about the sampling: nobody wrote this text.

    Raises:
        LegalityError: there is only one prompt.
    """
    prompts = [t.tokens[: t.prompt_length].tobytes() for t in trajectories]
    if len(set(prompts)) < 2:
        raise LegalityError(
            f"a draw of {len(trajectories)} answers to {len(set(prompts))} prompt",
            expected="at least two prompts: the baseline is over answers to other prompts",
            fix="raise groups_per_step",
        )
    crossed = []
    for index, own in enumerate(trajectories):
        ring = ((index + k) % len(trajectories) for k in range(1, len(trajectories)))
        other = next(i for i in ring if prompts[i] != prompts[index])
        crossed.append(_cross(own, trajectories[other], context=context))
    return crossed


def _cross(own: Trajectory, other: Trajectory, *, context: int) -> Trajectory:
    stop = min(len(other), other.prompt_length + max(context - own.prompt_length, 1))
    answer = slice(other.prompt_length, stop)
    return Trajectory(
        task=own.task,
        tokens=np.concatenate([own.tokens[: own.prompt_length], other.tokens[answer]]),
        prompt_length=own.prompt_length,
        spans=(*_cut(own.spans, 0, own.prompt_length), *_cut(other.spans, answer.start, stop)),
        end=other.end,
    )


def _cut(spans: Sequence[Span], start: int, stop: int) -> Iterator[Span]:
    """What lies between two positions, as text of which only the authors are known."""
    at = 0
    for span in spans:
        length = min(at + span.length, stop) - max(at, start)
        at += span.length
        if length > 0:
            # A live author would claim a version that wrote this: it is nobody's sample.
            kind = Kind.TEACHER if span.is_live else span.producer.kind
            author = replace(span.producer, kind=kind)
            yield Span(length=length, role=span.role, producer=author)


def _summed(values_T: FloatArray | Array) -> float:
    """Sum over scored tokens: the others are NaN."""
    return float(np.nansum(values_T, dtype=np.float64))


def _everywhere(groups: Sequence[Group], columns: Mapping[Column, Array]) -> list[Group]:
    def scored(member: Scored) -> Scored:
        return member.with_columns(columns)

    return [Group(task=g.task, members=tuple(map(scored, g.members))) for g in groups]
