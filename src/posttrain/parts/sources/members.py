"""Members of a group that are made in another way than the rest.

    guided   question │ beginning of a right answer → the policy goes on
    rival    question → another policy answers
    hinted   question and a hint → the policy answers; the record shows the question alone

They are the last members of their group.

    task ──▶ Opening: prompt │ given ──policy reads──▶ completion ──▶ prompt │ given │ completion
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Literal

import numpy as np

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError, TaskError
from posttrain.core.provenance import IntArray, Kind, Producer, Role, Span
from posttrain.core.task import Task, with_context
from posttrain.parts.base import LEARNER, PolicyRef
from posttrain.protocols import Prompt, Renderer

WRITERS = frozenset({Kind.HUMAN, Kind.EXTERNAL, Kind.TEACHER})
"""Who may have written a demonstration."""

NO_TOKENS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opening:
    """Where one member of a group starts from."""

    prompt: Prompt  # in the record
    reads: IntArray  # [T] what the policy is given to go on from
    given: tuple[IntArray, Producer] | None = None  # somebody else's start of the answer
    learn: bool = False  # what is given is trained too
    by_rival: bool = False
    whole: bool = False  # nothing is left to write
    hinted: bool = False  # the policy read another prompt than the record's


class Member(Config, tag_field="type"):
    """How the last members of a group are made. ``count`` of them; null means all."""

    count: int | None = 1

    @property
    def rival(self) -> PolicyRef | None:
        """The other policy that answers in its place."""
        return None

    @property
    def writer(self) -> Kind | None:
        """Who has tokens that are trained, beside the sampled policy."""
        return None

    @property
    def moves(self) -> bool:
        """True when what is given changes from draw to draw."""
        return False

    def sampled_from_prompt(self, kind: Kind, *, sampled: Kind) -> bool:
        """True when what this author wrote was sampled after the recorded prompt."""
        return True

    def check_task(self, task: Task) -> None:
        """Find a task without what is needed before anything is drawn.

        Raises:
            TaskError: as said.
        """

    def opening(
        self, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
    ) -> Opening:
        """How such a member begins.

        Args:
            task: the question.
            renderer: of the policy that answers.
            prompt: the rendered question.
            draw: its number, for what moves over a stage.
            seed: of the group's own choices.
        """
        raise NotImplementedError


class Guided(Member, tag="guided"):
    """The policy goes on from the beginning of a demonstration.

    The demonstration is the task's ``answer``, or its ``column`` of another name. A share f of its
    tokens is given; f moves from ``start`` at the first draw to ``end`` at draw ``draws``, on a
    cosine, and stays there. ``length`` makes a number of tokens L out of f and of the n tokens of
    the demonstration, its end-of-turn token included, anew for every group:

    * ``share``: L = ⌊f n⌋;
    * ``binomial``: L = ⌊k n / slices⌋, k ~ Binomial(slices, f) (UFT, arXiv 2505.16984);
    * ``uniform``: L = ⌊l n⌋, l ~ U(f, start) (Prefix-RFT, arXiv 2507.01679).

    What is given has its own author in the record. With ``learn`` it is part of what is trained,
    under terms that read its author; without it is part of the prompt, and its last token is
    always left to the policy. ``count`` is how many of a group are guided; null: all.
    """

    column: str = "answer"
    author: Kind = Kind.EXTERNAL
    count: int | None = None
    start: float = 0.75
    end: float = 0.0
    draws: int = 100
    length: Literal["share", "binomial", "uniform"] = "share"
    slices: int = 5
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
        """The author of the demonstration, where it is learnt from."""
        return self.author if self.learn else None

    @property
    def moves(self) -> bool:
        """True when the share moves."""
        return self.start != self.end

    def sampled_from_prompt(self, kind: Kind, *, sampled: Kind) -> bool:
        """What was given was sampled by nobody."""
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
        """How many of a demonstration's tokens are given.

        Example:
            >>> Guided(start=0.5, end=0.5).num_given(9, draw=3, seed=0)
            4
        """
        share, rng = self.share(draw), np.random.default_rng(seed)
        if self.length == "binomial":
            share = int(rng.binomial(self.slices, share)) / self.slices
        elif self.length == "uniform":
            share = float(rng.uniform(share, self.start))
        # A hair up: 0.3 * 10 must not become 2 by rounding.
        most = num_tokens if self.learn else num_tokens - 1
        return min(int(share * num_tokens + 1e-9), most)

    def check_task(self, task: Task) -> None:
        """It has a demonstration."""
        demonstration(task, self.column)

    def opening(
        self, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
    ) -> Opening:
        """The question and the given beginning of the answer."""
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
    count: int | None = 1

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
    """The policy reads a hint, and the record says that it answered without (STaR, 2203.14465).

    ``context`` is a template with ``{question}`` and ``{answer}``. What was sampled after one
    prompt stands behind another, so these tokens have no behaviour log-probs: nothing that needs
    a ratio may read them.
    """

    context: str
    count: int | None = 1

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
        """It was sampled after the prompt with the hint."""
        return False

    def check_task(self, task: Task) -> None:
        """It has an answer to hint at."""
        demonstration(task, "answer")

    def opening(
        self, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
    ) -> Opening:
        """The question in the record; the hint in what the policy reads."""
        hint = renderer.prompt(with_context(task, self.context))
        return Opening(prompt=prompt, reads=hint.tokens, hinted=True)


AnyMember = Guided | Rival | Hinted


def demonstration(task: Task, column: str) -> str:
    """The text that guides.

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
    """One per member of a group, those that differ last.

    Args:
        member: how the last members differ.
        task: the question.
        renderer: of the policy that answers.
        size: members of the group.
        draw: its number, for what moves over a stage.
        seed: of the group's own choices.
    """
    prompt = renderer.prompt(task)
    plain = Opening(prompt=prompt, reads=prompt.tokens)
    if member is None:
        return [plain] * size
    number = size if member.count is None else member.count
    other = member.opening(task, renderer, prompt, draw=draw, seed=seed)
    return [plain] * (size - number) + [other] * number


def spans_of(opening: Opening, completion: Span | None) -> tuple[Span, ...]:
    """Who wrote what, from the prompt to the end."""
    spans = list(opening.prompt.spans)
    if opening.given is not None:
        tokens, author = opening.given
        spans.append(Span(length=len(tokens), role=Role.ASSISTANT, producer=author))
    return (*spans, completion) if completion is not None else tuple(spans)
