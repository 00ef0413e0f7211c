"""The verifier as a signal: one reward per trajectory, from the scorer of its task set.

groups ──decode what follows the prompt──▶ completions ──one call per task set──▶ rewards beside
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import numpy as np

from posttrain.core import clock
from posttrain.core.errors import TaskError, nearest
from posttrain.core.protocols import Renderer
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import Column, Group


@final
class Verifier:
    """Writes the scalar column ``reward``: what the task set's scorer gives the completion.

    Args:
        tasksets: task sets by name, as the recipe names them.
        renderer: decodes the tokens after the prompt.

    Raises:
        TaskError: two different tasks have one key.
    """

    def __init__(self, tasksets: Mapping[str, TaskSet], renderer: Renderer) -> None:
        self._tasksets, self._renderer = dict(tasksets), renderer
        self._tasks: dict[str, tuple[str, Task]] = {}
        for name, taskset in tasksets.items():
            for task in (*taskset.train, *taskset.held_out):
                _, known = self._tasks.setdefault(task.key, (name, task))
                if known.prompt != task.prompt:
                    raise TaskError(
                        f"task key {task.key} stands for two prompts: {known.text[:60]!r} and "
                        f"{task.text[:60]!r}",
                        fix="remove one of them",
                    )

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups in their order, with a reward on every member.

        Raises:
            TaskError: a group of an unknown task, or a scorer that misbehaves.
        """
        names = [self._find(group)[0] for group in groups]
        rewards: dict[int, list[float]] = {}
        for name in dict.fromkeys(names):
            own = [i for i, n in enumerate(names) if n == name]
            rewards.update(zip(own, self._judge(name, [groups[i] for i in own]), strict=True))
        return [_with_rewards(group, rewards[i]) for i, group in enumerate(groups)]

    def _find(self, group: Group) -> tuple[str, Task]:
        found = self._tasks.get(group.task)
        if found is not None:
            return found
        name = group.task.rpartition("/")[0]
        raise TaskError(
            f"a trajectory of task {group.task}, which no task set holds",
            expected=f"a task of {', '.join(sorted(self._tasksets)) or '(no task set)'}",
            fix=None if name in self._tasksets else nearest(name, self._tasksets),
        )

    def _judge(self, name: str, groups: Sequence[Group]) -> list[list[float]]:
        """Rewards of each group's members, from one call of the scorer."""
        tasks = [self._find(group)[1] for group in groups for _ in group.members]
        trajectories = [member.trajectory for group in groups for member in group.members]
        texts = [self._renderer.text(t.tokens[t.answer_start :]) for t in trajectories]
        with clock.measure("verify"):
            scores = self._tasksets[name].score(tasks, texts)
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
