"""Signals that decide which answers are worth imitating.

    rewards ──threshold──▶ ──duplicates──▶ ──best of the group──▶ a verdict on every answer

A filter removes nothing. It writes its verdict beside an answer, the stage leaves the answer out
of the update, and the ledger keeps it with the reason. A verdict of an earlier filter stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from posttrain.core.bounds import Number, Size
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.trajectory import Column, Discard, Group, Scored
from posttrain.parts.base import Columns, Signal
from posttrain.parts.columns import discarded, with_verdicts
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class KeepRewards(Signal):
    """Keeps the answers worth imitating; the others are discarded, each with its reason.

    An answer stays when its reward is ``at_least`` so high, when it is among the ``best`` of its
    group (of equal ones the earlier), and, with ``distinct``, when no earlier answer that stays
    has the same tokens. The tests apply in the order threshold, duplicates, best.
    """

    at_least: Number | None = None
    best: Size | None = None
    distinct: bool = False

    sieves: ClassVar[bool] = True
    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})

    def __post_init__(self) -> None:
        if self.at_least is None and self.best is None and not self.distinct:
            raise ConfigError(
                "keep_rewards that keeps everything",
                expected="at_least, best or distinct",
            )

    def trained_share(self, members: int) -> float:
        """The best of the group, where only so many stay."""
        return 1.0 if self.best is None else min(1.0, self.best / members)

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with a verdict in ``DISCARD`` on every member."""
        return [self._judge(g) for g in groups]

    def _judge(self, group: Group) -> Group:
        rewards = [_number(m, Column.REWARD, task=group.task) for m in group.members]
        verdicts = [tuple(Discard)[int(discarded(m))] for m in group.members]
        for i, reward in enumerate(rewards):
            if verdicts[i] is Discard.KEPT and self.at_least is not None and reward < self.at_least:
                verdicts[i] = Discard.LOW_REWARD
        if self.distinct:
            seen: set[bytes] = set()
            for i, member in enumerate(group.members):
                tokens = member.trajectory.tokens.tobytes()
                if verdicts[i] is Discard.KEPT and tokens in seen:
                    verdicts[i] = Discard.DUPLICATE
                elif verdicts[i] is Discard.KEPT:
                    seen.add(tokens)
        if self.best is not None:
            left = [i for i, v in enumerate(verdicts) if v is Discard.KEPT]
            # sorted is stable: of equal rewards the earlier answer ranks first.
            for i in sorted(left, key=lambda i: -rewards[i])[self.best :]:
                verdicts[i] = Discard.NOT_BEST
        decided = {id(m): v for m, v in zip(group.members, verdicts, strict=True)}
        return with_verdicts(group, lambda member: decided[id(member)])


@part
class KeepPositiveAdvantages(Signal):
    """Discards answers whose advantage is not above zero, with that reason."""

    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE})
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with a verdict in ``DISCARD`` on every member."""
        return [with_verdicts(g, self._verdict) for g in groups]

    def _verdict(self, member: Scored) -> Discard:
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
