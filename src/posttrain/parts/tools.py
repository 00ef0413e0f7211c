"""The stage's policies, task sets, files and seeds, for its parts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from posttrain.core.errors import TaskError
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import Group
from posttrain.parts.memory import Memory
from posttrain.parts.shelf import Reader, Shelf
from posttrain.protocols import Policy, Renderer, Sampler

Score = Callable[[Sequence[Group]], Sequence[Group]]
"""Returns the same groups with columns added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tools:
    """Passed to a part when it scores or is opened. One per stage.

    ``policy`` returns the policy of a reference and refuses one whose token ids are not the
    learner's; ``any_policy`` takes any tokenizer; ``sampler`` needs only sampling, which an engine
    that only generates supports. References are those of the part's ``references()``.
    """

    live: Policy  # the policy being trained
    policy: Callable[[str], Policy]
    any_policy: Callable[[str], Policy]
    sampler: Callable[[str], Sampler]
    tasksets: Mapping[str, TaskSet]
    root: Path = Path()  # the recipe's folder
    stage: str = ""
    seed: int = 0  # of the run
    drawn: tuple[str, ...] = ()  # task sets that the stage draws from
    longest: int = 0  # maximum tokens of an answer that the stage draws
    judge: Score = lambda groups: groups  # the stage's reward signals, in order
    memory: Memory | None = None  # cache of log-probs, where trajectories repeat
    shelf: Shelf = field(default_factory=Shelf)  # data files that were rendered already
    heads: Mapping[str, int] = field(default_factory=dict)
    """By reference, the numbers of teachers whose output heads the loss has."""

    @property
    def reader(self) -> Reader:
        """Reads data files with the learner's tokenizer."""
        return Reader(
            root=self.root, renderer=self.renderer, context=self.live.context, shelf=self.shelf
        )

    @property
    def renderer(self) -> Renderer:
        """The learner's renderer."""
        return self.live.renderer

    def seed_of(self, *names: str | int) -> int:
        """A seed for a part's own randomness: a function of the run's seed, stage and names.

        Example:
            >>> from posttrain.testing import fake_tools
            >>> fake_tools(seed=1).seed_of("labels") == fake_tools(seed=1).seed_of("labels")
            True
        """
        return zlib.crc32("/".join(map(str, (self.seed, self.stage, *names))).encode())

    @cached_property
    def tasks(self) -> Mapping[str, tuple[str, Task]]:
        """(task set, task) by task key, held-out tasks included.

        Raises:
            TaskError: two different tasks have one key.
        """
        found: dict[str, tuple[str, Task]] = {}
        for name, taskset in self.tasksets.items():
            for task in (*taskset.train, *taskset.held_out):
                _, first = found.setdefault(task.key, (name, task))
                if first.prompt != task.prompt:
                    raise TaskError(
                        f"task key {task.key} stands for two prompts: {first.text[:60]!r} and "
                        f"{task.text[:60]!r}",
                        fix="remove one of them",
                    )
        return found

    @cached_property
    def drawn_tasks(self) -> Mapping[str, Task]:
        """The training tasks that the stage may draw, by key."""
        return {task.key: task for name in self.drawn for task in self.tasksets[name].train}
