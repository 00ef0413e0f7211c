"""Helpers that write columns of group members, shared by families of signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from posttrain.core.trajectory import Array, Column, Discard, Group, Scored, Trajectory


def trajectories_of(groups: Sequence[Group]) -> list[Trajectory]:
    """Every member's trajectory, in order."""
    return [m.trajectory for g in groups for m in g.members]


def attach(groups: Sequence[Group], columns: Sequence[Mapping[Column, Array]]) -> list[Group]:
    """The groups with one mapping of columns per member, in order."""
    left = iter(columns)
    return [
        Group(task=g.task, members=tuple(m.with_columns(next(left)) for m in g.members))
        for g in groups
    ]


def discarded(member: Scored) -> float:
    """The code of the reason for which an earlier signal discarded the member; 0 for none."""
    return member.scalar(Column.DISCARD) or 0.0


def with_verdicts(group: Group, verdict: Callable[[Scored], Discard]) -> Group:
    """The group with a verdict on every member; verdicts of earlier signals stay."""
    members = []
    for member in group.members:
        code = discarded(member) or float(verdict(member).code)
        members.append(member.with_columns({Column.DISCARD: np.array(code)}))
    return Group(task=group.task, members=tuple(members))
