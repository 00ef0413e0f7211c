"""Frozen policies as judges: log-probs of a reference, distributions of a teacher.

A teacher may have more to read than the learner had. Then its own prompt stands before the same
completion, and what it says of the completion's tokens is moved back to where they stand in the
learner's trajectory:

    learner   q₀ q₁ q₂      | y₀ y₁ y₂        columns    –  –  –       | c₀ c₁ c₂
    teacher   q₀ q₁ q₂ a₀ a₁| y₀ y₁ y₂        it says    –  –  –  –  – | c₀ c₁ c₂
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from posttrain.composition import TeacherDistribution, TeacherLogprobs
from posttrain.core import clock
from posttrain.core.errors import ConfigError, ModelError, TaskError, nearest
from posttrain.core.protocols import Policy
from posttrain.core.provenance import FloatArray, Span
from posttrain.core.task import Task, with_context
from posttrain.core.trajectory import Array, Column, Discard, Group, Scored, Trajectory
from posttrain.signals.memory import Memory

PROBE = "The 3 quick-brown foxes don't cost $1,234.50!\n\tdef f(x):  return x**2  # naïve 数学 🙂"
"""Text on which tokenizers differ if they differ at all."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ReferenceSignal:
    """Adds ``REFERENCE_LOGPROB`` [T]: log-probs of the written tokens under a frozen policy."""

    policy: Policy
    memory: Memory | None = None  # for trajectories that come again

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the column on every member."""
        with clock.measure("reference"):
            values = _logprobs(self.policy, _trajectories(groups), self.memory)
        return attach(groups, [{Column.REFERENCE_LOGPROB: v} for v in values])


@final
@dataclass(frozen=True, slots=True, eq=False)
class TeacherSignal:
    """Adds what a teacher says at every written token: its distribution, or its log-prob.

    The teacher is chosen by the task set of each group, ``"*"`` being the default. ``tasks`` are
    those that may be drawn, by key; a context is written from them, and from answers of the
    group. An answer that should be shown another one, and has none, is discarded.

    Of a teacher among ``heads`` the hidden states are enough: the loss has its head, under this
    number, and makes its distribution from them a few tokens at a time.

    Raises:
        TaskError: the context asks for an answer, and a task has none.
    """

    spec: TeacherDistribution | TeacherLogprobs
    teachers: Mapping[str, Policy]  # by policy reference
    tasks: Mapping[str, Task] = field(default_factory=dict)
    memory: Memory | None = None  # of log-probs, for trajectories that come again
    heads: Mapping[str, int] = field(default_factory=dict)  # see above

    def __post_init__(self) -> None:
        if self.spec.context is None or "{answer}" not in self.spec.context:
            return
        for task in self.tasks.values():
            if task.answer is None:
                raise TaskError(
                    f"task {task.key} has no answer, and the teacher's context asks for it",
                    expected="an answer in every task",
                    fix="drop {answer} from the context, or use tasks with answers",
                )

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``TEACHER_IDS`` [T, K] and ``TEACHER_LOGPROBS`` [T, K]; for the
        whole vocabulary [T, 0] and [T, V], or ``TEACHER_STATES`` [T, X] and ``TEACHER_HEAD`` in
        their place. For log-probs alone with ``TEACHER_LOGPROB`` [T]."""
        by_teacher: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            by_teacher.setdefault(self._route(group.task), []).append(index)
        out: list[Group | None] = [None] * len(groups)
        for reference, indices in by_teacher.items():
            chosen = [groups[i] for i in indices]
            with clock.measure("teacher"):
                columns = self._ask(reference, chosen)
            for index, group in zip(indices, attach(chosen, columns), strict=True):
                out[index] = group
        return [g for g in out if g is not None]

    def _ask(self, reference: str, groups: Sequence[Group]) -> list[Mapping[Column, Array]]:
        spec, trajectories = self.spec, _trajectories(groups)
        teacher = self.teachers[reference]
        read: Sequence[Trajectory] = trajectories
        if isinstance(spec, TeacherDistribution) and spec.shows_success:
            return self._shown(spec, reference, groups)
        if spec.context is not None:
            read = [self._retold(t, teacher, spec.context) for t in trajectories]
        pairs = list(zip(trajectories, read, strict=True))
        if isinstance(spec, TeacherLogprobs):
            values = zip(pairs, _logprobs(teacher, read, self.memory), strict=True)
            return [{Column.TEACHER_LOGPROB: _moved(v, *pair)} for pair, v in values]
        return self._distributions(reference, pairs, top_k=spec.top_k)

    def _shown(
        self, spec: TeacherDistribution, reference: str, groups: Sequence[Group]
    ) -> list[Mapping[Column, Array]]:
        """As :meth:`_ask`, with a sibling's text in the context, and verdicts."""
        members = [m for g in groups for m in g.members]
        siblings = [s for g in groups for s in _successful_siblings(g, at_least=spec.success)]
        pairs = []
        for member, sibling in zip(members, siblings, strict=True):
            own = read = member.trajectory
            if sibling is not None and spec.context is not None:
                teacher = self.teachers[reference]
                text = teacher.renderer.text(sibling.tokens[sibling.answer_start :])
                read = self._retold(own, teacher, spec.context, success=text)
            pairs.append((own, read))
        verdicts = [_verdict(m, s) for m, s in zip(members, siblings, strict=True)]
        said = self._distributions(reference, pairs, top_k=spec.top_k)
        return [{**c, Column.DISCARD: v} for c, v in zip(said, verdicts, strict=True)]

    def _distributions(
        self,
        reference: str,
        pairs: Sequence[tuple[Trajectory, Trajectory]],
        *,
        top_k: int | None,
    ) -> list[Mapping[Column, Array]]:
        """What a teacher says of (the learner's trajectory, what the teacher reads)."""
        teacher, read = self.teachers[reference], [read for _, read in pairs]
        number = self.heads.get(reference) if top_k is None else None
        if number is not None and teacher.hidden is not None:
            states = zip(pairs, teacher.hidden.states(read), strict=True)
            which = np.asarray(float(number))
            return [
                {Column.TEACHER_HEAD: which, Column.TEACHER_STATES: _moved(values, *pair)}
                for pair, values in states
            ]
        tops = teacher.distributions(read, top_k=top_k)
        return [
            {
                Column.TEACHER_IDS: _moved(ids, *pair, fill=-1),
                Column.TEACHER_LOGPROBS: _moved(values, *pair),
            }
            for pair, (ids, values) in zip(pairs, tops, strict=True)
        ]

    def _retold(
        self, trajectory: Trajectory, teacher: Policy, context: str, **shown: str
    ) -> Trajectory:
        """The same completion after the prompt that the teacher reads."""
        task = self.tasks.get(trajectory.task)
        if task is None:
            raise TaskError(
                f"a trajectory of task {trajectory.task}, which no task set holds",
                expected="a task: the teacher's context is written from its question and answer",
            )
        prompt = teacher.renderer.prompt(with_context(task, context, **shown))
        cut = trajectory.answer_start  # what was given of the answer stays
        tokens = np.concatenate([prompt.tokens, trajectory.tokens[cut:]]).astype(np.int32)
        if len(tokens) > teacher.context:
            raise TaskError(
                f"the teacher would read {len(tokens)} tokens of {task.key}",
                expected=f"at most its context of {teacher.context}",
                fix="shorten the context template, or max_new_tokens",
            )
        return replace(
            trajectory,
            tokens=tokens,
            prompt_length=len(prompt.tokens) + trajectory.prompt_length - cut,
            spans=(*prompt.spans, *_spans_from(trajectory, cut)),
        )

    def _route(self, task: str) -> str:
        taskset = task.rpartition("/")[0]
        route = self.spec.routes.get(taskset, self.spec.routes.get("*"))
        if route is None:
            raise ConfigError(
                f"no teacher for task set {taskset!r}",
                expected='a route for it, or a default "*"',
                fix=nearest(taskset, self.spec.routes),
            )
        return route


def _successful_siblings(group: Group, *, at_least: float) -> list[Trajectory | None]:
    """For every member the first other one whose reward is high enough."""
    good = [i for i, m in enumerate(group.members) if float(m.columns[Column.REWARD]) >= at_least]
    firsts = [next((j for j in good if j != i), None) for i in range(len(group.members))]
    return [None if j is None else group.members[j].trajectory for j in firsts]


def _verdict(member: Scored, sibling: Trajectory | None) -> Array:
    """Without a sibling there is nothing to learn; what another signal decided stays."""
    earlier = member.scalar(Column.DISCARD) or 0.0
    return np.asarray(earlier or float(Discard.NO_SUCCESS.code if sibling is None else 0))


def check_same_tokens(judge: Policy, live: Policy) -> None:
    """Refuse a judge to whom the learner's token ids mean something else.

    Raises:
        ModelError: another vocabulary, another number of output rows, or a tokenizer that cuts a
            probe text in other places.
    """
    probe = Task(taskset="probe", prompt=PROBE)
    ours, theirs = (p.renderer.prompt(probe).tokens.tolist() for p in (live, judge))
    name = judge.producer.name
    if judge.vocabulary != live.vocabulary:
        alike = "the same ids" if ours == theirs else "other ids"
        raise ModelError(
            f"{name} and the learner have different vocabularies; they give a probe text {alike}",
            expected="the same token ids and the same number of output rows",
            fix="use a teacher or reference of the same family, or the foreign_teacher signal",
        )
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        raise ModelError(
            f"{name} and the learner share a vocabulary and cut a probe text differently: "
            f"{len(theirs)} and {len(ours)} tokens, the first difference at {at}",
            expected="one tokenizer: the judge would rate token sequences it never saw",
            fix="use the learner's tokenizer files in the other folder, if they belong there",
        )


def _spans_from(trajectory: Trajectory, cut: int) -> list[Span]:
    """The spans after the prompt."""
    start, out = 0, list[Span]()
    for span in trajectory.spans:
        if start >= cut:
            out.append(span)
        start += span.length
    if sum(s.length for s in out) != len(trajectory) - cut:
        raise TaskError(
            f"trajectory {trajectory.id}: a span reaches over the end of the prompt",
            expected="a span to start where the completion starts",
        )
    return out


def _moved(values: Array, to: Trajectory, read: Trajectory, *, fill: float = np.nan) -> Array:
    """[T', ...] values of what the teacher read -> [T, ...] beside the learner's trajectory."""
    if read is to:
        return values
    out = np.full((len(to), *values.shape[1:]), fill, values.dtype)
    out[to.prompt_length :] = values[read.prompt_length :]
    return out


def _logprobs(
    policy: Policy, trajectories: Sequence[Trajectory], memory: Memory | None
) -> list[FloatArray]:
    if memory is None:
        return policy.logprobs(trajectories)
    return memory.logprobs(policy, trajectories)


def _trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    return [m.trajectory for g in groups for m in g.members]


def attach(groups: Sequence[Group], columns: Sequence[Mapping[Column, Array]]) -> list[Group]:
    """Hand out one mapping of columns per member, in order."""
    left = iter(columns)
    return [
        Group(task=g.task, members=tuple(m.with_columns(next(left)) for m in g.members))
        for g in groups
    ]
