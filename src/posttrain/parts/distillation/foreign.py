"""Teachers with another tokenizer: compared only where both have read the same text.

learner   |un|believ|able|⏎       a boundary of both, with the same text before it:
teacher   |unbeliev|able|⏎        before "un", before "able", before the end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from posttrain.core import clock
from posttrain.core.bounds import Count
from posttrain.core.errors import TaskError
from posttrain.core.provenance import IntArray, Role, Span
from posttrain.core.rendering import SAMPLED
from posttrain.core.task import Task
from posttrain.core.trajectory import Array, Column, End, Group, Scored, Trajectory
from posttrain.parts.base import Columns, PolicyRef, Signal, StageContext
from posttrain.parts.columns import attach, trajectories_of
from posttrain.parts.distillation.teachers import need_tasks
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools
from posttrain.protocols import Policy, Renderer


class AcrossTokenizers(Signal):
    """Base class of signals from a teacher with another tokenizer."""

    teacher: PolicyRef

    def references(self) -> tuple[PolicyRef, ...]:
        """The teacher."""
        return (self.teacher,)

    def check(self, at: StageContext) -> None:
        """The teacher tokenizes the task itself, so trajectories need tasks."""
        need_tasks(self, at)


@part
class ForeignTeacher(AcrossTokenizers):
    """The sorted distribution of a teacher with another tokenizer, where both have a boundary.

    The teacher reads the task in its own template and the completion's text in its own tokens.
    Where a token starts at the start of a teacher's token, both have read the same text, and their
    next-token distributions can be compared by rank; other tokens are not aligned.
    """

    top_k: Count = 100

    formula: ClassVar[str] = "pi_T(.), sorted, at boundaries of both tokenizers"
    paper: ClassVar[str] = "2402.12030"
    provides: ClassVar[Columns] = frozenset({Column.TEACHER_SORTED, Column.TEACHER_ALIGNED})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with both columns on every member."""
        teacher, trajectories = tools.any_policy(self.teacher), trajectories_of(groups)
        read = [self._retokenised(t, teacher, tools) for t in trajectories]
        with clock.timed("teacher"):
            tops = teacher.distributions(read, top_k=self.top_k)
        rows = zip(trajectories, read, tops, strict=True)
        return attach(
            groups,
            [
                _aligned(t, r, values, tools.renderer, teacher.renderer)
                for t, r, (_, values) in rows
            ],
        )

    def _retokenised(self, trajectory: Trajectory, teacher: Policy, tools: Tools) -> Trajectory:
        """The same text in the teacher's tokens, with one more token after its end."""
        text = tools.renderer.text(trajectory.tokens[trajectory.prompt_length :])
        body = encoded(teacher.renderer, text)
        # The id of the last token is never read, only the distribution at it.
        return read_by(teacher, trajectory, _task(trajectory, tools.drawn_tasks), [*body, 0])


def _aligned(
    trajectory: Trajectory, read: Trajectory, values: Array, own_renderer: Renderer, other: Renderer
) -> Mapping[Column, Array]:
    """The teacher's rows where both have a boundary; elsewhere uniform, and marked unaligned."""
    cut = trajectory.prompt_length
    own = boundaries(own_renderer, trajectory.tokens[cut:])
    theirs = {
        length: index
        for index, length in enumerate(boundaries(other, read.tokens[read.prompt_length : -1]))
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


@part
class SpanAdvantage(AcrossTokenizers):
    """The log-ratio of policy and a teacher with another tokenizer, span by span, as credit.

    A span reaches from one boundary of both tokenizers to the next; its log-prob is the sum over
    its tokens. Every token of a span has A = log π_T(span) − log π(span). With one tokenizer every
    span is a token, and this is ``teacher_advantage``. The teacher reads the task in its own
    template; the end of a turn is a span too. Tokens after the last common boundary of a truncated
    answer have no credit.

    Only the tokenization that each tokenizer gives a span is counted, not all possible ones.

    Unconfirmed: spans and products of conditionals are those of GOLD, which compares distributions
    at the boundaries; the policy gradient on the spans' log-ratio is derived.
    """

    formula: ClassVar[str] = "log pi_T(span) - log pi(span)"
    paper: ClassVar[str] = "GOLD, Hugging Face 2025"
    untempered: ClassVar[bool] = True
    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the column on every member, NaN where nothing is trained."""
        teacher = tools.any_policy(self.teacher)
        members = [m for g in groups for m in g.members]
        read = [self._retokenised(m.trajectory, teacher, tools) for m in members]
        with clock.timed("teacher"):
            said = teacher.logprobs(read)
        rows = zip(members, read, said, strict=True)
        found = [_span_advantages(*row, tools.renderer, teacher.renderer) for row in rows]
        return attach(groups, [{Column.ADVANTAGE: values} for values in found])

    def _retokenised(self, trajectory: Trajectory, teacher: Policy, tools: Tools) -> Trajectory:
        """The same answer in the teacher's tokens, with the end of its turn."""
        task = _task(trajectory, tools.drawn_tasks)
        text = tools.renderer.text(trajectory.tokens[trajectory.prompt_length :])
        tokens = teacher.renderer.answer(task, text, rules=SAMPLED)
        return read_by(teacher, trajectory, task, tokens)


def _span_advantages(
    member: Scored, read: Trajectory, said: Array, own_renderer: Renderer, other: Renderer
) -> Array:
    """[T] the log-ratio of each token's span."""
    trajectory = member.trajectory
    cut, ended = trajectory.prompt_length, trajectory.end is End.COMPLETED
    own_L = member.columns[Column.BEHAVIOUR_LOGPROB][cut:].astype(np.float64)
    their_L = said[read.prompt_length :].astype(np.float64)
    spans = common_spans(
        boundaries(own_renderer, trajectory.tokens[cut:]),
        boundaries(other, read.tokens[read.prompt_length :]),
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
    """Token ranges of both tokenizers between common boundaries.

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
        if next_i > i and next_j > j:  # a token without text belongs to the next span
            found.append((slice(i, next_i), slice(j, next_j)))
            i, j = next_i, next_j
    return found


def read_by(
    teacher: Policy, trajectory: Trajectory, task: Task, written: Sequence[int] | IntArray
) -> Trajectory:
    """A task and its completion in the teacher's own tokens.

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
    """A text's tokens, without the special tokens before a prompt."""
    opening, whole = (renderer.prompt(Task(taskset="text", prompt=t)).tokens for t in ("", text))
    return whole[len(opening) :]


def boundaries(renderer: Renderer, tokens: IntArray) -> list[int | None]:
    """Characters before each token, and after the last; None inside a character.

    Some tokenizers split one character into several tokens. A decoded prefix is then no prefix of
    the whole text.

    Example:
        >>> from posttrain.testing import CharRenderer
        >>> boundaries(CharRenderer(), np.array([97, 98], np.int32))
        [0, 1, 2]
    """
    whole = renderer.text(tokens)
    parts = [renderer.text(tokens[:i]) for i in range(len(tokens) + 1)]
    return [len(part) if whole.startswith(part) else None for part in parts]
