"""A teacher with another tokenizer: compared only where both have read the same text.

learner   |un|believ|able|⏎       a boundary of both, with the same text before it:
teacher   |unbeliev|able|⏎        before "un", before "able", before the end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition import ForeignTeacher, SpanAdvantage
from posttrain.core import clock
from posttrain.core.errors import TaskError
from posttrain.core.protocols import Policy, Renderer
from posttrain.core.provenance import IntArray, Role, Span
from posttrain.core.task import Task
from posttrain.core.trajectory import Array, Column, End, Group, Scored, Trajectory
from posttrain.signals.scoring import attach


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
        text = self.renderer.text(trajectory.tokens[trajectory.prompt_length :])
        body = encoded(self.teacher.renderer, text)
        # The last token is never read: its distribution, not its id, is asked for.
        return read_by(self.teacher, trajectory, _task(trajectory, self.tasks), [*body, 0])

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


@final
@dataclass(frozen=True, slots=True, eq=False)
class SpanAdvantageSignal:
    """Adds ``ADVANTAGE`` [T]: the log-ratio of teacher and policy of the span a token stands in."""

    spec: SpanAdvantage
    teacher: Policy
    renderer: Renderer  # the learner's
    tasks: Mapping[str, Task]  # those that may be drawn, by key

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the column on every member, NaN where nothing is trained."""
        members = [m for g in groups for m in g.members]
        read = [self._retokenised(m.trajectory) for m in members]
        with clock.measure("teacher"):
            said = self.teacher.logprobs(read)
        rows = zip(members, read, said, strict=True)
        return attach(groups, [{Column.ADVANTAGE: self._advantages(*row)} for row in rows])

    def _retokenised(self, trajectory: Trajectory) -> Trajectory:
        """The same answer in the teacher's tokens, with the end of its turn."""
        task = _task(trajectory, self.tasks)
        text = self.renderer.text(trajectory.tokens[trajectory.prompt_length :])
        answer = self.teacher.renderer.answer(task, text)
        return read_by(self.teacher, trajectory, task, answer)

    def _advantages(self, member: Scored, read: Trajectory, said: Array) -> Array:
        trajectory = member.trajectory
        cut, ended = trajectory.prompt_length, trajectory.end is End.COMPLETED
        own_L = member.columns[Column.BEHAVIOUR_LOGPROB][cut:].astype(np.float64)
        their_L = said[read.prompt_length :].astype(np.float64)
        spans = common_spans(
            boundaries(self.renderer, trajectory.tokens[cut:]),
            boundaries(self.teacher.renderer, read.tokens[read.prompt_length :]),
            ended=ended,
        )
        out = np.full(len(trajectory), np.nan, np.float32)
        out[cut:] = 0.0
        for own, theirs in spans:
            out[cut + own.start : cut + own.stop] = their_L[theirs].sum() - own_L[own].sum()
        return out


def common_spans(
    own: Sequence[int | None], theirs: Sequence[int | None], *, ended: bool
) -> list[tuple[slice, slice]]:
    """Tokens of the one and of the other tokenizer between boundaries that both have.

    Args:
        own: characters before each token and after the last, as ``boundaries`` gives them.
        theirs: those of the other tokenizer, whose last token ends the turn.
        ended: whether the last token of ``own`` ends the turn too.

    Example:
        >>> spans = common_spans([0, 1, 2, 3, 3], [0, 2, 3, 3], ended=True)
        >>> [(a.start, a.stop, b.start, b.stop) for a, b in spans]
        [(0, 2, 0, 1), (2, 3, 1, 2), (3, 4, 2, 3)]
    """
    first: dict[int, int] = {}
    for index, length in enumerate(theirs[:-1]):
        if length is not None:
            first.setdefault(length, index)
    inside = own[:-1] if ended else own
    shared = [(i, first[n]) for i, n in enumerate(inside) if n is not None and n in first]
    if ended:
        shared.append((len(own) - 1, len(theirs) - 1))
    found, (i, j) = [], (0, 0)
    for next_i, next_j in shared:
        if next_i > i and next_j > j:  # a token without text belongs to what follows
            found.append((slice(i, next_i), slice(j, next_j)))
            i, j = next_i, next_j
    return found


def read_by(
    teacher: Policy, trajectory: Trajectory, task: Task, written: Sequence[int] | IntArray
) -> Trajectory:
    """A task in the teacher's own tokens, and what was written after it.

    Raises:
        TaskError: more tokens than the teacher can read.
    """
    prompt = teacher.renderer.prompt(task)
    tokens = np.concatenate([prompt.tokens, np.asarray(written)]).astype(np.int32)
    if len(tokens) > teacher.context:
        raise TaskError(
            f"the teacher would read {len(tokens)} tokens of {task.key}",
            expected=f"at most its context of {teacher.context}",
        )
    span = Span(length=len(written), role=Role.ASSISTANT, producer=teacher.producer)
    return Trajectory(
        task=trajectory.task,
        tokens=tokens,
        prompt_length=len(prompt.tokens),
        spans=(*prompt.spans, span),
        parent=trajectory.id,
    )


def _task(trajectory: Trajectory, tasks: Mapping[str, Task]) -> Task:
    if trajectory.task not in tasks:
        raise TaskError(
            f"a trajectory of task {trajectory.task}, which no task set holds",
            expected="a task: the teacher reads the question in its own tokens",
        )
    return tasks[trajectory.task]


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
