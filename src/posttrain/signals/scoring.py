"""Frozen policies as judges: log-probs of a reference, distributions of a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from posttrain.composition import TeacherDistribution
from posttrain.errors import ConfigError, nearest
from posttrain.protocols import Policy
from posttrain.trajectory import Array, Column, Group, Trajectory


@final
@dataclass(frozen=True, slots=True, eq=False)
class ReferenceSignal:
    """Adds ``REFERENCE_LOGPROB`` [T]: log-probs of the written tokens under a frozen policy."""

    policy: Policy

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the column on every member."""
        values = self.policy.logprobs(_trajectories(groups))
        return _attach(groups, [{Column.REFERENCE_LOGPROB: v} for v in values])


@final
@dataclass(frozen=True, slots=True, eq=False)
class TeacherSignal:
    """Adds a teacher's next-token distribution at every written token.

    The teacher is chosen by the task set of each group, ``"*"`` being the default.
    """

    spec: TeacherDistribution
    teachers: Mapping[str, Policy]  # by policy reference

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``TEACHER_IDS`` [T, K] and ``TEACHER_LOGPROBS`` [T, K]; for the
        whole vocabulary [T, 0] and [T, V]."""
        by_teacher: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            by_teacher.setdefault(self._route(group.task), []).append(index)
        out: list[Group | None] = [None] * len(groups)
        for reference, indices in by_teacher.items():
            chosen = [groups[i] for i in indices]
            scored = self._ask(self.teachers[reference], chosen)
            for index, group in zip(indices, scored, strict=True):
                out[index] = group
        return [g for g in out if g is not None]

    def _ask(self, teacher: Policy, groups: Sequence[Group]) -> Sequence[Group]:
        tops = teacher.distributions(_trajectories(groups), top_k=self.spec.top_k)
        columns: list[Mapping[Column, Array]] = [
            {Column.TEACHER_IDS: ids, Column.TEACHER_LOGPROBS: values} for ids, values in tops
        ]
        return _attach(groups, columns)

    def _route(self, task: str) -> str:
        taskset = task.partition("/")[0]
        route = self.spec.routes.get(taskset, self.spec.routes.get("*"))
        if route is None:
            raise ConfigError(
                f"no teacher for task set {taskset!r}",
                expected='a route for it, or a default "*"',
                fix=nearest(taskset, self.spec.routes),
            )
        return route


def _trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    return [m.trajectory for g in groups for m in g.members]


def _attach(groups: Sequence[Group], columns: Sequence[Mapping[Column, Array]]) -> list[Group]:
    """Hand out one mapping of columns per member, in order."""
    left = iter(columns)
    return [
        Group(task=g.task, members=tuple(m.with_columns(next(left)) for m in g.members))
        for g in groups
    ]
