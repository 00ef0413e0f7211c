"""Special members of a group.

    guided   question │ prefix of a right answer → the policy continues
    rival    question → another policy answers
    hinted   question and a hint → the policy answers; the record has the question alone

They are the last members of their group.

    task ──▶ Opening: prompt │ given ──policy reads──▶ completion ──▶ prompt │ given │ completion
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

from posttrain.core.bounds import Count, Share, Size
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError, TaskError
from posttrain.core.provenance import IntArray, Kind, Producer, Role, Span
from posttrain.core.task import Task, with_context
from posttrain.parts.base import LEARNER, PolicyRef
from posttrain.protocols import Prompt, Renderer

WRITERS = frozenset({Kind.HUMAN, Kind.EXTERNAL, Kind.TEACHER})
"""Kinds of author of a demonstration."""

NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opening:
    """The start of one member of a group."""

    prompt: Prompt  # in the record
    reads: IntArray  # [T] tokens that the policy continues
    given: tuple[IntArray, Producer] | None = None  # a prefix of the answer by another author
    learn: bool = False  # the given prefix is trained too
    by_rival: bool = False
    whole: bool = False  # the given prefix is the whole answer
    hinted: bool = False  # the policy read another prompt than the record's


class Member(Config, tag_field="type"):
    """How the last members of a group are made. ``count`` of them; null means all."""

    count: Size | None = 1

    @property
    def rival(self) -> PolicyRef | None:
        """The other policy that answers in its place."""
        return None

    @property
    def writer(self) -> Kind | None:
        """The author of trained tokens besides the sampled policy."""
        return None

    @property
    def moves(self) -> bool:
        """True when the given prefix changes from draw to draw."""
        return False

    def sampled_from_prompt(self, kind: Kind, *, sampled: Kind) -> bool:
        """True when this author's tokens were sampled after the recorded prompt."""
        return True

    def check_task(self, task: Task) -> None:
        """Refuse, before anything is drawn, a task that cannot be used.

        Raises:
            TaskError: the task lacks a needed column.
        """

    def opening(
        self, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
    ) -> Opening:
        """The start of such a member.

        Args:
            task: the question.
            renderer: of the policy that answers.
            prompt: the rendered question.
            draw: its number, for schedules over a stage.
            seed: of the group's random choices.
        """
        raise NotImplementedError


class Guided(Member, tag="guided"):
    """The policy continues a prefix of a demonstration.

    The demonstration is the task's ``answer``, or another ``column``. A share f of its tokens is
    given; f changes from ``start`` at the first draw to ``end`` at draw ``draws``, on a cosine, and
    stays there. ``length`` gives the number of tokens L from f and the n tokens of the
    demonstration, its end-of-turn token included, for every group:

    * ``share``: L = ⌊f n⌋;
    * ``binomial``: L = ⌊k n / slices⌋, k ~ Binomial(slices, f) (UFT, arXiv 2505.16984);
    * ``uniform``: L = ⌊l n⌋, l ~ U(f, start) (Prefix-RFT, arXiv 2507.01679).

    The given prefix has its own author in the record. With ``learn`` it is trained on, by terms
    that read its author; without, it is part of the prompt, and the last token of the demonstration
    is always left to the policy. ``count`` is the number of guided members per group; null: all.
    """

    column: str = "answer"
    author: Kind = Kind.EXTERNAL
    count: Size | None = None
    start: Share = 0.75
    end: Share = 0.0
    draws: Count = 100
    length: Literal["share", "binomial", "uniform"] = "share"
    slices: Count = 5
    learn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start <= 1 or self.start == 0 or self.draws < 1:
            raise ConfigError(
                f"guided with start={self.start}, end={self.end}, draws={self.draws}",
                expected="0 <= end <= start <= 1, start above 0, and draws at least 1",
            )
        if self.author not in WRITERS or self.slices < 1:
            raise ConfigError(
                f"guided with author={self.author}, slices={self.slices}",
                expected=f"an author of {', '.join(sorted(WRITERS))}, and slices at least 1",
            )
        if self.end == 1 and (self.count is None or not self.learn):
            raise ConfigError(
                f"whole demonstrations throughout, with count={self.count}, learn={self.learn}",
                expected="count and learn: else nobody would write, or nothing be learnt",
                fix="lower end; or name a count, and learn: true",
            )

    @property
    def writer(self) -> Kind | None:
        """The author of the demonstration, with ``learn``."""
        return self.author if self.learn else None

    @property
    def moves(self) -> bool:
        """True when the share changes."""
        return self.start != self.end

    def sampled_from_prompt(self, kind: Kind, *, sampled: Kind) -> bool:
        """False for the given prefix, which was not sampled."""
        return kind is sampled

    def share(self, draw: int) -> float:
        """f at a draw, counted from 0.

        Example:
            >>> [round(Guided(start=0.8, end=0.0, draws=5).share(d), 2) for d in (0, 2, 4, 9)]
            [0.8, 0.4, 0.0, 0.0]
        """
        done = min(draw / max(self.draws - 1, 1), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))

    def num_given(self, num_tokens: int, *, draw: int, seed: int) -> int:
        """Number of a demonstration's tokens that are given.

        Example:
            >>> Guided(start=0.5, end=0.5).num_given(9, draw=3, seed=0)
            4
        """
        share, rng = self.share(draw), np.random.default_rng(seed)
        if self.length == "binomial":
            share = int(rng.binomial(self.slices, share)) / self.slices
        elif self.length == "uniform":
            share = float(rng.uniform(share, self.start))
        # Plus a small epsilon: 0.3 * 10 must not become 2 by rounding.
        most = num_tokens if self.learn else num_tokens - 1
        return min(int(share * num_tokens + 1e-9), most)

    def check_task(self, task: Task) -> None:
        """The task must have a demonstration."""
        demonstration(task, self.column)

    def opening(
        self, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
    ) -> Opening:
        """The question and the given prefix of the answer."""
        tokens = renderer.answer(task, demonstration(task, self.column))
        given = tokens[: self.num_given(len(tokens), draw=draw, seed=seed)]
        author = Producer(kind=self.author, name=f"{task.taskset}/{self.column}")
        return Opening(
            prompt=prompt,
            reads=np.concatenate([prompt.tokens, given]).astype(np.int32),
            given=(given, author) if len(given) else None,
            learn=self.learn,
            whole=len(given) == len(tokens),
        )


class Rival(Member, tag="rival"):
    """Another, frozen policy answers the same question."""

    policy: PolicyRef = "input"
    count: Size | None = 1

    def __post_init__(self) -> None:
        if self.policy == LEARNER:
            raise ConfigError("the learner as its own rival", expected="a frozen policy")

    @property
    def rival(self) -> PolicyRef | None:
        """The policy."""
        return self.policy

    @property
    def writer(self) -> Kind | None:
        """A frozen policy."""
        return Kind.TEACHER

    def opening(
        self, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
    ) -> Opening:
        """The question."""
        return Opening(prompt=prompt, reads=prompt.tokens, by_rival=True)


class Hinted(Member, tag="hinted"):
    """The policy reads a hint, which the recorded prompt does not have (STaR, 2203.14465).

    ``context`` is a template with ``{question}`` and ``{answer}``. The answer was sampled after
    another prompt than the recorded one, so its tokens have no behaviour log-probs: a term that
    needs a ratio cannot read them.
    """

    context: str
    count: Size | None = 1

    def __post_init__(self) -> None:
        try:
            parts = string.Formatter().parse(self.context)
            fields = {name for _, name, _, _ in parts if name is not None}
        except ValueError as error:
            raise ConfigError(
                f"context {self.context!r}: {error}", fix="write {{ for a brace"
            ) from None
        if fields != {"question", "answer"}:
            raise ConfigError(
                f"hinted with context {self.context!r}",
                expected="a template with {question} and {answer}, and nothing else in braces",
            )

    def sampled_from_prompt(self, kind: Kind, *, sampled: Kind) -> bool:
        """False: it was sampled after the prompt with the hint."""
        return False

    def check_task(self, task: Task) -> None:
        """The task must have an answer for the hint."""
        demonstration(task, "answer")

    def opening(
        self, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
    ) -> Opening:
        """The question for the record; the hint for the policy."""
        hint = renderer.prompt(with_context(task, self.context))
        return Opening(prompt=prompt, reads=hint.tokens, hinted=True)


AnyMember = Guided | Rival | Hinted


def demonstration(task: Task, column: str) -> str:
    """The text of the demonstration.

    Raises:
        TaskError: the task has none.
    """
    text = task.answer if column == "answer" else task.columns.get(column)
    if not isinstance(text, str) or not text:
        raise TaskError(
            f"task {task.key} has no text under {column!r} to guide with: {text!r}",
            expected="a demonstration in every task",
            fix="name the column that holds one, or drop the guidance",
        )
    return text


def openings(
    member: Member | None, task: Task, renderer: Renderer, *, size: int, draw: int, seed: int
) -> list[Opening]:
    """One per member of a group, the special ones last.

    Args:
        member: the kind of the last members.
        task: the question.
        renderer: of the policy that answers.
        size: members of the group.
        draw: its number, for schedules over a stage.
        seed: of the group's random choices.
    """
    prompt = renderer.prompt(task)
    plain = Opening(prompt=prompt, reads=prompt.tokens)
    if member is None:
        return [plain] * size
    number = size if member.count is None else member.count
    other = member.opening(task, renderer, prompt, draw=draw, seed=seed)
    return [plain] * (size - number) + [other] * number


def spans_of(opening: Opening, completion: Span | None) -> tuple[Span, ...]:
    """The spans with their authors, from the prompt to the end."""
    spans = list(opening.prompt.spans)
    if opening.given is not None:
        tokens, author = opening.given
        spans.append(Span(length=len(tokens), role=Role.ASSISTANT, producer=author))
    return (*spans, completion) if completion is not None else tuple(spans)
