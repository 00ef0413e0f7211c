"""Teachers: distributions and log-probs of a frozen policy, or of the learner with more context.

    teacher ─┬─ teacher_distribution ──TEACHER_IDS, TEACHER_LOGPROBS──▶ terms of divergences.py
             ├─ teacher_logprobs ─────TEACHER_LOGPROB──▶ teacher_advantage ──ADVANTAGE──▶ policy
             ├─ delta_advantage ──────ADVANTAGE──▶ policy gradients                    gradients
             ├─ span_advantage ───────ADVANTAGE──▶ policy gradients
             └─ foreign_teacher ──────TEACHER_SORTED, TEACHER_ALIGNED──▶ teacher_sorted_l1

A teacher may have more context than the learner. Then its own prompt precedes the same completion,
and its values at the completion's tokens are moved to their positions in the learner's trajectory:

    learner   q₀ q₁ q₂      | y₀ y₁ y₂        columns    –  –  –       | c₀ c₁ c₂
    teacher   q₀ q₁ q₂ a₀ a₁| y₀ y₁ y₂        values     –  –  –  –  – | c₀ c₁ c₂
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from posttrain.core import clock
from posttrain.core.bounds import Count, Number
from posttrain.core.errors import ConfigError, TaskError, nearest
from posttrain.core.learner import MOVING
from posttrain.core.provenance import Span
from posttrain.core.rendering import SAMPLED, STRICT
from posttrain.core.task import with_context
from posttrain.core.trajectory import Array, Column, Discard, Group, Scored, Trajectory
from posttrain.parts.base import LEARNER, Columns, PolicyRef, Signal, StageContext
from posttrain.parts.columns import attach, discarded, trajectories_of
from posttrain.parts.logprobs import remembered_logprobs
from posttrain.parts.registry import part, tag_of
from posttrain.parts.tools import Tools
from posttrain.protocols import Policy


class RoutedTeacher(Signal):
    """Base class of signals from one teacher per task set, optionally with more context."""

    routes: dict[str, PolicyRef]
    context: str | None = None

    may_ask_learner: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("answer",)  # fields of a context besides the question

    def __post_init__(self) -> None:
        if not self.routes:
            raise ConfigError("no teacher", expected='at least one route, such as {"*": base}')
        check_context(self.context, self.routes, shown=self.shown)

    def references(self) -> tuple[PolicyRef, ...]:
        """The teachers."""
        return tuple(self.routes.values())

    def check(self, at: StageContext) -> None:
        """Every task set has a teacher, and every teacher a task set; contexts need tasks."""
        routed = set(self.routes)
        asked = {name for s in at.drawn for name in s.row_names}
        if ("*" not in routed and asked - routed) or routed - asked - {"*"}:
            raise ConfigError(
                f"stage {at.stage}: teachers for {sorted(routed)}, groups of {sorted(asked)}",
                expected='one route per task set or data set, or a default "*", and no other',
            )
        if self.context is not None:
            need_tasks(self, at)

    def prepare(self, tools: Tools) -> None:
        """Load the teachers; refuse a task without the answer that the context needs."""
        for reference in self.references():
            tools.policy(reference)
        if self.context is None or "{answer}" not in self.context:
            return
        for task in tools.drawn_tasks.values():
            if task.answer is None:
                raise TaskError(
                    f"task {task.key} has no answer, and the teacher's context asks for it",
                    expected="an answer in every task",
                    fix="drop {answer} from the context, or use tasks with answers",
                )

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with their teacher's columns on every member."""
        by_teacher: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            by_teacher.setdefault(self._route(group.task), []).append(index)
        out: list[Group | None] = [None] * len(groups)
        for reference, indices in by_teacher.items():
            chosen = [groups[i] for i in indices]
            with clock.timed("teacher"):
                columns = self.ask(reference, chosen, tools)
            for index, group in zip(indices, attach(chosen, columns), strict=True):
                out[index] = group
        return [g for g in out if g is not None]

    def ask(
        self, reference: PolicyRef, groups: Sequence[Group], tools: Tools
    ) -> list[Mapping[Column, Array]]:
        """One teacher's columns of every member."""
        raise NotImplementedError

    def _route(self, task: str) -> str:
        taskset = task.rpartition("/")[0]
        route = self.routes.get(taskset, self.routes.get("*"))
        if route is None:
            raise ConfigError(
                f"no teacher for task set {taskset!r}",
                expected='a route for it, or a default "*"',
                fix=nearest(taskset, self.routes),
            )
        return route

    def _read(
        self, trajectories: Sequence[Trajectory], teacher: Policy, tools: Tools
    ) -> list[tuple[Trajectory, Trajectory]]:
        """The learner's trajectories, and for each the one that the teacher reads."""
        if self.context is None:
            return [(t, t) for t in trajectories]
        return [(t, read_with(t, teacher, self.context, tools)) for t in trajectories]


@part
class TeacherDistribution(RoutedTeacher):
    """A teacher's next-token distribution at every generated token.

    ``routes`` chooses the teacher by task set; ``"*"`` is the default. ``top_k`` keeps the
    teacher's K most likely tokens (not the learner's); null keeps the full vocabulary.

    ``context`` is the teacher's prompt in place of the question: a template with ``{question}``
    and optionally ``{answer}`` of the task. The completion's tokens are the same; only the prompt
    differs. With a context the teacher may be the ``learner`` itself (SDFT 2601.19897, OPSD
    2601.18734; context distillation 2209.15189).

    ``{success}`` is the first *other* answer of the group with a reward of at least ``success``
    (SDPO 2601.20802). An answer without such a sibling is discarded.

    Writes ``TEACHER_IDS`` [T, K] and ``TEACHER_LOGPROBS`` [T, K]; for the whole vocabulary [T, 0]
    and [T, V]. When the loss has the teacher's output head, it writes hidden states instead:
    ``TEACHER_STATES`` [T, X] and ``TEACHER_HEAD``.
    """

    top_k: Count | None = None
    success: Number = 1.0

    formula: ClassVar[str] = "log pi_T(v | context, y_<t) of every v, or of the K likeliest"
    paper: ClassVar[str] = "2209.15189, 2601.18734, 2601.19897 (contexts), 2601.20802 (success)"
    shown: ClassVar[tuple[str, ...]] = ("answer", "success")

    @property
    def shows_success(self) -> bool:
        """True when the context has another answer of the group."""
        return "success" in _fields(self.context)

    @property
    def min_group(self) -> int:
        """Two where the context has another member."""
        return 2 if self.shows_success else 1

    @property
    def needs(self) -> Columns:
        """Rewards, if the context has successful answers."""
        return frozenset({Column.REWARD} if self.shows_success else ())

    @property
    def provides(self) -> Columns:
        """The distribution, and verdicts on answers without a successful sibling."""
        verdict = {Column.DISCARD} if self.shows_success else set()
        return frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS} | verdict)

    @property
    def distributions_of(self) -> tuple[PolicyRef, ...]:
        """Frozen teachers whose full distribution is used."""
        if self.top_k is not None:
            return ()
        frozen = (r for r in self.references() if r not in (LEARNER, MOVING))
        return tuple(dict.fromkeys(frozen))

    @property
    def num_entries(self) -> int | None:
        """``top_k``."""
        return self.top_k

    def ask(
        self, reference: PolicyRef, groups: Sequence[Group], tools: Tools
    ) -> list[Mapping[Column, Array]]:
        """The teacher's distribution at the tokens of every member."""
        if self.shows_success:
            return self._ask_with_siblings(reference, groups, tools)
        pairs = self._read(trajectories_of(groups), tools.policy(reference), tools)
        return self._distributions(reference, pairs, tools)

    def _ask_with_siblings(
        self, reference: PolicyRef, groups: Sequence[Group], tools: Tools
    ) -> list[Mapping[Column, Array]]:
        """Distributions with a sibling's text in the context, and verdicts."""
        teacher, context = tools.policy(reference), self.context or ""
        members = [m for g in groups for m in g.members]
        siblings = [s for g in groups for s in _successful_siblings(g, at_least=self.success)]
        pairs = []
        for member, sibling in zip(members, siblings, strict=True):
            own = read = member.trajectory
            if sibling is not None:
                text = teacher.renderer.text(sibling.tokens[sibling.answer_start :])
                read = read_with(own, teacher, context, tools, success=text)
            pairs.append((own, read))
        verdicts = [_verdict(m, s) for m, s in zip(members, siblings, strict=True)]
        said = self._distributions(reference, pairs, tools)
        return [{**c, Column.DISCARD: v} for c, v in zip(said, verdicts, strict=True)]

    def _distributions(
        self,
        reference: PolicyRef,
        pairs: Sequence[tuple[Trajectory, Trajectory]],
        tools: Tools,
    ) -> list[Mapping[Column, Array]]:
        """A teacher's columns, from pairs (learner's trajectory, teacher's trajectory)."""
        teacher, read = tools.policy(reference), [read for _, read in pairs]
        number = tools.heads.get(reference) if self.top_k is None else None
        if number is not None and teacher.hidden is not None:
            states = zip(pairs, teacher.hidden.states(read), strict=True)
            which = np.asarray(float(number))
            return [
                {Column.TEACHER_HEAD: which, Column.TEACHER_STATES: _moved(values, *pair)}
                for pair, values in states
            ]
        tops = teacher.distributions(read, top_k=self.top_k)
        return [
            {
                Column.TEACHER_IDS: _moved(ids, *pair, fill=-1),
                Column.TEACHER_LOGPROBS: _moved(values, *pair),
            }
            for pair, (ids, values) in zip(pairs, tops, strict=True)
        ]


@part
class TeacherLogprobs(RoutedTeacher):
    """A teacher's log-prob of every generated token.

    ``routes`` and ``context`` as in ``teacher_distribution``. Writes ``TEACHER_LOGPROB`` [T].
    """

    formula: ClassVar[str] = "log pi_T(y_t | context, y_<t)"
    provides: ClassVar[Columns] = frozenset({Column.TEACHER_LOGPROB})
    remembered: ClassVar[bool] = True

    def ask(
        self, reference: PolicyRef, groups: Sequence[Group], tools: Tools
    ) -> list[Mapping[Column, Array]]:
        """The teacher's log-probs of the tokens of every member."""
        teacher = tools.policy(reference)
        pairs = self._read(trajectories_of(groups), teacher, tools)
        said = remembered_logprobs(teacher, [read for _, read in pairs], tools.memory)
        values = zip(pairs, said, strict=True)
        return [{Column.TEACHER_LOGPROB: _moved(v, *pair)} for pair, v in values]


# --- contexts --------------------------------------------------------------------------------


def check_context(
    context: str | None, routes: Mapping[str, PolicyRef], *, shown: tuple[str, ...] = ("answer",)
) -> None:
    """Refuse an invalid context template, and the learner as a teacher without a context.

    Raises:
        ConfigError: either is the case.
    """
    if context is None:
        if LEARNER in routes.values():
            raise ConfigError(
                "the learner as its own teacher, with nothing more to read",
                expected="a context: without one, teacher and policy are equal",
                fix='for example context: "{question} (the answer is {answer})"',
            )
        return
    fields = _fields(context)
    if "question" not in fields or not fields <= {"question", *shown}:
        more = " and ".join(f"{{{name}}}" for name in shown)
        raise ConfigError(
            f"context {context!r}",
            expected=f"a template with {{question}}, and {more} if the teacher is to know it",
        )
    if context == "{question}":
        raise ConfigError(f"context {context!r}", expected="more than the question alone")


def need_tasks(signal: Signal, at: StageContext) -> None:
    """Refuse rows of files for a signal that reads the task of a trajectory.

    Raises:
        LegalityError: the signal reads rows of files.
    """
    for source in at.rows:
        raise at.refuse(
            f"{tag_of(signal)} on rows of {source.files[0]}",
            expected="rollouts: what the teacher reads is written from a task's question and "
            "answer, and rows of a data set have no task",
            fix="use rollouts, or a teacher without a context",
        )


def read_with(
    trajectory: Trajectory, teacher: Policy, context: str, tools: Tools, **shown: str
) -> Trajectory:
    """The same completion after the prompt that the teacher reads.

    Raises:
        TaskError: the trajectory has no task, or the teacher's context is too short.
    """
    task = tools.drawn_tasks.get(trajectory.task)
    if task is None:
        raise TaskError(
            f"a trajectory of task {trajectory.task}, which no task set holds",
            expected="a task: the teacher's context is written from its question and answer",
        )
    # What is shown was sampled: control tokens in it are tokens, as the policy wrote them.
    rules = SAMPLED if shown else STRICT
    prompt = teacher.renderer.prompt(with_context(task, context, **shown), rules=rules)
    cut = trajectory.answer_start  # keeps the given part of the answer
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


def _fields(context: str | None) -> set[str]:
    """Names in braces.

    Raises:
        ConfigError: the template cannot be read.
    """
    try:
        parts = string.Formatter().parse(context or "")
        return {name for _, name, _, _ in parts if name is not None}
    except ValueError as error:
        raise ConfigError(f"context {context!r}: {error}", fix="write {{ for a brace") from None


def _successful_siblings(group: Group, *, at_least: float) -> list[Trajectory | None]:
    """For every member the first other one whose reward is high enough."""
    good = [i for i, m in enumerate(group.members) if float(m.columns[Column.REWARD]) >= at_least]
    firsts = [next((j for j in good if j != i), None) for i in range(len(group.members))]
    return [None if j is None else group.members[j].trajectory for j in firsts]


def _verdict(member: Scored, sibling: Trajectory | None) -> Array:
    """Discards a member without a sibling; verdicts of other signals stay."""
    return np.asarray(discarded(member) or float(Discard.NO_SUCCESS.code if sibling is None else 0))


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
    """[T', ...] values of the teacher's trajectory -> [T, ...] of the learner's."""
    if read is to:
        return values
    out = np.full((len(to), *values.shape[1:]), fill, values.dtype)
    out[to.prompt_length :] = values[read.prompt_length :]
    return out
