"""A teacher with another tokenizer: compared only where both have read the same text.

learner   |un|believ|able|⏎       a boundary of both, with the same text before it:
teacher   |unbeliev|able|⏎        before "un", before "able", before the end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain import clock
from posttrain.composition import ForeignTeacher
from posttrain.errors import TaskError
from posttrain.protocols import Policy, Renderer
from posttrain.provenance import IntArray, Role, Span
from posttrain.signals.scoring import attach
from posttrain.task import Task
from posttrain.trajectory import Array, Column, Group, Trajectory


@final
@dataclass(frozen=True, slots=True, eq=False)
class ForeignTeacherSignal:
    """Adds ``TEACHER_SORTED`` [T, K] and ``TEACHER_ALIGNED`` [T].

    Where a trained token is not aligned, the row is uniform and means nothing.
    """

    spec: ForeignTeacher
    teacher: Policy
    renderer: Renderer  # the learner's
    tasks: Mapping[str, Task]  # those that may be drawn, by key

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with both columns on every member."""
        trajectories = [m.trajectory for g in groups for m in g.members]
        read = [self._retokenised(t) for t in trajectories]
        with clock.measure("teacher"):
            tops = self.teacher.distributions(read, top_k=self.spec.top_k)
        return attach(
            groups,
            [
                self._columns(t, r, values)
                for t, r, (_, values) in zip(trajectories, read, tops, strict=True)
            ],
        )

    def _retokenised(self, trajectory: Trajectory) -> Trajectory:
        """The same text in the teacher's tokens, with one more token to be predicted at its end."""
        task = self.tasks.get(trajectory.task)
        if task is None:
            raise TaskError(
                f"a trajectory of task {trajectory.task}, which no task set holds",
                expected="a task: the teacher reads the question in its own tokens",
            )
        prompt = self.teacher.renderer.prompt(task)
        text = self.renderer.text(trajectory.tokens[trajectory.prompt_length :])
        body = encoded(self.teacher.renderer, text)
        # The last token is never read: its distribution, not its id, is asked for.
        tokens = np.concatenate([prompt.tokens, body, prompt.tokens[-1:]]).astype(np.int32)
        if len(tokens) > self.teacher.context:
            raise TaskError(
                f"the teacher would read {len(tokens)} tokens of {task.key}",
                expected=f"at most its context of {self.teacher.context}",
            )
        author = self.teacher.producer
        span = Span(length=len(body) + 1, role=Role.ASSISTANT, producer=author)
        return Trajectory(
            task=trajectory.task,
            tokens=tokens,
            prompt_length=len(prompt.tokens),
            spans=(*prompt.spans, span),
            parent=trajectory.id,
        )

    def _columns(
        self, trajectory: Trajectory, read: Trajectory, values: Array
    ) -> Mapping[Column, Array]:
        cut = trajectory.prompt_length
        own = boundaries(self.renderer, trajectory.tokens[cut:])
        theirs = {
            length: index
            for index, length in enumerate(
                boundaries(self.teacher.renderer, read.tokens[read.prompt_length : -1])
            )
            if length is not None
        }
        width = values.shape[1]
        rows = np.full((len(trajectory), width), -np.log(width), np.float32)
        aligned = np.zeros(len(trajectory), np.float32)
        for index, length in enumerate(own[: len(trajectory) - cut]):
            if length in theirs:
                rows[cut + index] = values[read.prompt_length + theirs[length]]
                aligned[cut + index] = 1.0
        return {Column.TEACHER_SORTED: rows, Column.TEACHER_ALIGNED: aligned}


def encoded(renderer: Renderer, text: str) -> IntArray:
    """A text's tokens, without what the tokenizer puts in front of a prompt."""
    opening, whole = (renderer.prompt(Task(taskset="text", prompt=t)).tokens for t in ("", text))
    return whole[len(opening) :]


def boundaries(renderer: Renderer, tokens: IntArray) -> list[int | None]:
    """Characters before each token, and after the last; None inside of a character.

    Some tokenizers spread one character over several tokens. What they decode to then is no
    beginning of the whole text.

    Example:
        >>> from posttrain.testing import CharRenderer
        >>> boundaries(CharRenderer(), np.array([97, 98], np.int32))
        [0, 1, 2]
    """
    whole = renderer.text(tokens)
    parts = [renderer.text(tokens[:i]) for i in range(len(tokens) + 1)]
    return [len(part) if whole.startswith(part) else None for part in parts]
