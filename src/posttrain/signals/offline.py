"""The code of the signals in ``composition/offline.py``: which answers are worth imitating.

A filter removes nothing. It writes its verdict beside an answer, the stage leaves the answer out
of the update, and the ledger keeps it with the reason. A verdict of an earlier filter stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition.offline import KeepRewards, OfflineSignal, OwnLogprobs
from posttrain.core.errors import LegalityError
from posttrain.core.protocols import Policy, Signal
from posttrain.core.trajectory import Column, Discard, Group, Scored
from posttrain.signals.mismatch import TrainerLogprobsSignal


@final
@dataclass(frozen=True, slots=True)
class KeepRewardsSignal:
    """Discards by threshold, by repetition and by rank within the group, in this order."""

    spec: KeepRewards

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with a verdict in ``DISCARD`` on every member."""
        return [self._judge(g) for g in groups]

    def _judge(self, group: Group) -> Group:
        rewards = [_number(m, Column.REWARD, task=group.task) for m in group.members]
        verdicts = [_earlier(m) for m in group.members]
        spec = self.spec
        for i, reward in enumerate(rewards):
            if verdicts[i] is Discard.KEPT and spec.at_least is not None and reward < spec.at_least:
                verdicts[i] = Discard.LOW_REWARD
        if spec.distinct:
            seen: set[bytes] = set()
            for i, member in enumerate(group.members):
                tokens = member.trajectory.tokens.tobytes()
                if verdicts[i] is Discard.KEPT and tokens in seen:
                    verdicts[i] = Discard.DUPLICATE
                elif verdicts[i] is Discard.KEPT:
                    seen.add(tokens)
        if spec.best is not None:
            left = [i for i, v in enumerate(verdicts) if v is Discard.KEPT]
            # sorted is stable: of equal rewards the earlier answer ranks first.
            for i in sorted(left, key=lambda i: -rewards[i])[spec.best :]:
                verdicts[i] = Discard.NOT_BEST
        return _with_verdicts(group, verdicts)


@final
@dataclass(frozen=True, slots=True)
class KeepPositiveAdvantagesSignal:
    """Discards answers whose advantage, the same at every token, is not above zero."""

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with a verdict in ``DISCARD`` on every member."""
        return [_with_verdicts(g, [self._verdict(m) for m in g.members]) for g in groups]

    def _verdict(self, member: Scored) -> Discard:
        if (earlier := _earlier(member)) is not Discard.KEPT:
            return earlier
        positive = float(member.columns[Column.ADVANTAGE][-1]) > 0
        return Discard.KEPT if positive else Discard.NO_ADVANTAGE


def _number(member: Scored, column: Column, *, task: str) -> float:
    value = member.scalar(column)
    if value is None:
        raise LegalityError(
            f"an answer of task {task} has no {column}",
            expected=f"a {column} on every answer",
            fix="add the verify signal before it, or name the data set's reward column",
        )
    return value


def _earlier(member: Scored) -> Discard:
    """What an earlier filter decided."""
    return tuple(Discard)[int(member.scalar(Column.DISCARD) or 0)]


def _with_verdicts(group: Group, verdicts: Sequence[Discard]) -> Group:
    members = (
        member.with_columns({Column.DISCARD: np.asarray(float(verdict.code))})
        for member, verdict in zip(group.members, verdicts, strict=True)
    )
    return Group(task=group.task, members=tuple(members))


def offline_signal(spec: OfflineSignal, *, live: Policy) -> Signal:
    """The live object behind a specification of ``composition/offline.py``."""
    if isinstance(spec, KeepRewards):
        return KeepRewardsSignal(spec)
    if isinstance(spec, OwnLogprobs):
        return TrainerLogprobsSignal(live)
    return KeepPositiveAdvantagesSignal()
