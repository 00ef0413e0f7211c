"""Drawing again until a step has enough to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition import Redraw
from posttrain.core.protocols import Signal, Source
from posttrain.core.trajectory import Column, Discard, Group


@final
@dataclass(frozen=True, slots=True, eq=False)
class RedrawSource:
    """Groups of which something is worth training on, then all others, with their verdicts."""

    spec: Redraw
    source: Source
    signals: Sequence[Signal]  # those of ``spec.keep``

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """The groups that count, at most ``num_groups`` of them, and what else was drawn.

        The groups that count come first: a stage that takes several updates on a draw deals them
        out one by one, so every update gets its share.
        """
        kept, useless = list[Group](), list[Group]()
        for number in range(self.spec.max_draws):
            groups = self.source.draw(num_groups, step=step * self.spec.max_draws + number)
            for signal in self.signals:
                groups = signal.score(groups)
            for group in groups:
                (kept if _counts(group) else useless).append(group)
            if len(kept) >= num_groups:
                break
        surplus = [_too_much(group) for group in kept[num_groups:]]
        return [*kept[:num_groups], *surplus, *useless]


def _counts(group: Group) -> bool:
    return any(_verdict_code(m.scalar(Column.DISCARD)) == 0 for m in group.members)


def _verdict_code(value: float | None) -> float:
    return 0.0 if value is None else value


def _too_much(group: Group) -> Group:
    members = tuple(
        m.with_columns(
            {
                Column.DISCARD: np.asarray(
                    _verdict_code(m.scalar(Column.DISCARD)) or float(Discard.SURPLUS.code)
                )
            }
        )
        for m in group.members
    )
    return Group(task=group.task, members=members)
