"""The verifier: one reward per trajectory, from the scorer of its task set.

groups ──decode what follows the prompt──▶ completions ──one call per task set──▶ REWARD
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from posttrain.core import clock
from posttrain.core.errors import TaskError, nearest
from posttrain.core.task import Task
from posttrain.core.trajectory import Column, Group
from posttrain.parts.base import Columns, Signal
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class Verify(Signal):
    """The task set's own scorer, or the user's reward function: one reward per trajectory."""

    judges: ClassVar[bool] = True
    sieves: ClassVar[bool] = True
    provides: ClassVar[Columns] = frozenset({Column.REWARD})

    def prepare(self, tools: Tools) -> None:
        """Refuse two tasks with one key: answers would be judged by the wrong one."""
        _ = tools.tasks  # finds them

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The groups in their order, with a reward on every member.

        Raises:
            TaskError: a group of an unknown task, or a scorer that misbehaves.
        """
        names = [_find(group, tools)[0] for group in groups]
        rewards: dict[int, list[float]] = {}
        for name in dict.fromkeys(names):
            own = [i for i, n in enumerate(names) if n == name]
            judged = _judge(name, [groups[i] for i in own], tools)
            rewards.update(zip(own, judged, strict=True))
        return [_with_rewards(group, rewards[i]) for i, group in enumerate(groups)]


def _find(group: Group, tools: Tools) -> tuple[str, Task]:
    found = tools.tasks.get(group.task)
    if found is not None:
        return found
    name = group.task.rpartition("/")[0]
    raise TaskError(
        f"a trajectory of task {group.task}, which no task set holds",
        expected=f"a task of {', '.join(sorted(tools.tasksets)) or '(no task set)'}",
        fix=None if name in tools.tasksets else nearest(name, tools.tasksets),
    )


def _judge(name: str, groups: Sequence[Group], tools: Tools) -> list[list[float]]:
    """Rewards of each group's members, from one call of the scorer."""
    tasks = [_find(group, tools)[1] for group in groups for _ in group.members]
    trajectories = [member.trajectory for group in groups for member in group.members]
    texts = [tools.renderer.text(t.tokens[t.answer_start :]) for t in trajectories]
    with clock.timed("verify"):
        scores = tools.tasksets[name].score(tasks, texts)
    if len(scores) != len(texts) or not all(math.isfinite(s) for s in scores):
        raise TaskError(
            f"task set {name} scored {len(texts)} completions with {list(scores)[:8]}",
            expected="one finite number per completion",
        )
    rest = iter(scores)
    return [[next(rest) for _ in group.members] for group in groups]


def _with_rewards(group: Group, rewards: Sequence[float]) -> Group:
    members = (
        member.with_columns({Column.REWARD: np.asarray(reward, np.float64)})
        for member, reward in zip(group.members, rewards, strict=True)
    )
    return replace(group, members=tuple(members))
