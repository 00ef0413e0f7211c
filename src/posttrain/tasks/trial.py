"""Trying the rewards of task sets before anything relies on them.

task ──▶ two completions: none, and the answer ──score, twice──▶ Proof, or TaskError
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from posttrain.core.proofs import Proof, Subject
from posttrain.core.task import Task, TaskSet

SLOW = 0.5
"""Seconds per completion from which a reward is called slow."""

_PLAUSIBLE = "The answer is 42."  # for a task without an answer


@runtime_checkable
class ChangesProcess(Protocol):
    """Optional property of a task set: what its scorer changed in this process."""

    @property
    def changed(self) -> Iterable[str]: ...


def try_rewards(tasksets: Iterable[TaskSet]) -> Iterator[Proof]:
    """Ask every task set for scores, twice, and compare.

    Raises:
        TaskError: a scorer that cannot be loaded, raises, or returns no finite number.
    """
    for taskset in tasksets:
        for task in (*taskset.train[:1], *taskset.held_out[:1])[:1]:
            yield _tried(taskset, task)


def _tried(taskset: TaskSet, task: Task) -> Proof:
    completions = ["", task.answer or _PLAUSIBLE]
    tasks = [task] * len(completions)
    started = time.perf_counter()
    first = list(taskset.score(tasks, completions))  # loads the reward as well
    loaded = time.perf_counter()
    again = list(taskset.score(tasks, completions))
    ended = time.perf_counter()
    each = (ended - loaded) / len(completions)
    words = f"{len(completions)} completions scored {' and '.join(f'{s:g}' for s in first)}"
    if first == again:
        words += ", the same when asked twice"
    else:
        words += f"; asked again {' and '.join(f'{s:g}' for s in again)}: it is not deterministic"
    if each > SLOW:
        words += f"; slow: {each:.1f} s per completion"
    if isinstance(taskset, ChangesProcess) and (changed := ", ".join(taskset.changed)):
        words += f"; it changed {changed}, which was put back"
    return Proof(
        subject=Subject.REWARDS,
        of=taskset.name,
        words=words,
        seconds=ended - started,
        figures={"seconds_per_completion": each, "repeatable": float(first == again)},
    )
