"""Fakes: policies, task sets and renderers about which everything can be worked out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self, final

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import LegalityError
from posttrain.core.proofs import Proof
from posttrain.core.provenance import FloatArray, IntArray, Kind, Producer, Role, Sampling, Span
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import End, Group, Scored, Trajectory
from posttrain.parts.tools import Tools
from posttrain.protocols import (
    Completion,
    Policy,
    Request,
)
from posttrain.testing.characters import CharRenderer

UNLIKELY = 1e-12
"""What a :class:`FakePolicy` gives to a token that it never writes."""


@final
@dataclass(slots=True, eq=False)
class FakePolicy:
    """A policy with a known answer distribution: one character, then the end token.

    ``answers`` maps a character to its probability, the same for every prompt, so that every
    statistic of its samples has a closed form.
    """

    answers: dict[str, float]
    name: str = "fake"
    version: int | None = None
    renderer: CharRenderer = field(default_factory=CharRenderer)
    context: int = 1024
    vocabulary: str = "code points"
    judgement: Callable[[str], float] | None = None  # its scalar head, of a text
    rows: int = 128  # ASCII codes
    hidden: None = None
    proofs: tuple[Proof, ...] = ()

    def __post_init__(self) -> None:
        if abs(sum(self.answers.values()) - 1) > 1e-9:
            raise ValueError(f"probabilities sum to {sum(self.answers.values())}")

    @property
    def producer(self) -> Producer:
        """Live when it has a version, else frozen."""
        live = self.version is not None
        return Producer(kind=Kind.LEARNER if live else Kind.TEACHER, name=self.name)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw each request's answer from its own seed; the likeliest one at temperature 0."""
        letters = list(self.answers)
        weights = np.array([self.answers[c] for c in letters])
        out = []
        for request in requests:
            rng = np.random.default_rng(request.sampling.seed)
            greedy = request.sampling.temperature == 0
            pick = int(weights.argmax() if greedy else rng.choice(len(letters), p=weights))
            out.append(
                Completion(
                    tokens=np.array([ord(letters[pick]), 0], np.int32),
                    logprobs=np.array([np.log(weights[pick]), 0.0], np.float32),
                    end=End.COMPLETED,
                )
            )
        return out

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Exact log-probs of trainable tokens; NaN elsewhere."""
        out = []
        for trajectory in trajectories:
            values = np.full(len(trajectory), np.nan, np.float32)
            for index in np.flatnonzero(trajectory.trainable):
                token = int(trajectory.tokens[index])
                values[index] = np.log(self.answers.get(chr(token), UNLIKELY)) if token else 0.0
            out.append(values)
        return out

    def entropies(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """That of the answers before a letter, 0 before the end; NaN where nothing is trained."""
        p = np.array([p for p in self.answers.values() if p])
        letter = float(-(p * np.log(p)).sum())
        return [
            np.where(t.trainable, np.where(t.tokens > 0, letter, 0.0), np.nan).astype(np.float32)
            for t in trajectories
        ]

    def over(self, rows: int) -> Self:
        """The same policy, its distributions over the first codes only."""
        return replace(self, rows=min(rows, self.rows))

    def distributions(
        self, trajectories: Sequence[Trajectory], *, top_k: int | None
    ) -> list[tuple[IntArray, FloatArray]]:
        """Exact next-token log-probs over the 128 ASCII codes: of the letters, or of the end."""
        letters, end = np.full((2, 128), np.log(UNLIKELY))
        letters[[ord(c) for c in self.answers]] = np.log(list(self.answers.values()))
        end[0] = 0.0
        full = []
        for trajectory in trajectories:
            values = np.full((len(trajectory), 128), np.nan, np.float32)
            for at in np.flatnonzero(trajectory.trainable):
                values[at] = letters if trajectory.tokens[at] else end
            full.append(values)
        return [_likeliest(values, top_k, rows=self.rows) for values in full]

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """``judgement`` of the text before each trained token."""
        return self._judged(trajectories, after=0)

    def scores(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """``judgement`` of the text up to and with each trained token."""
        return self._judged(trajectories, after=1)

    def _judged(self, trajectories: Sequence[Trajectory], *, after: int) -> list[FloatArray]:
        if self.judgement is None:
            raise LegalityError(f"{self.name} has no scalar head")
        out = [np.full(len(t), np.nan, np.float32) for t in trajectories]
        for values, t in zip(out, trajectories, strict=True):
            for at in np.flatnonzero(t.trainable):
                values[at] = self.judgement(self.renderer.text(t.tokens[: at + after]))
        return out


def _likeliest(
    values_TV: FloatArray, top_k: int | None, *, rows: int
) -> tuple[IntArray, FloatArray]:
    """(token ids, log-probs) of the likeliest of the first tokens; without ids, of all of them."""
    if rows < values_TV.shape[1]:
        values_TV = values_TV[:, :rows]
        values_TV = values_TV - np.logaddexp.reduce(values_TV, -1, keepdims=True)
    if top_k is None:
        return np.zeros((len(values_TV), 0), np.int32), values_TV
    ids = np.argsort(-values_TV, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    return ids, np.take_along_axis(values_TV, ids.astype(np.int64), 1)


def no_scalar_head(policy: Policy, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
    """``values`` and ``scores`` of a policy without a scalar head."""
    raise LegalityError(f"{policy.producer.name} has no scalar head")


@final
@dataclass(frozen=True, slots=True, eq=False)
class TablePolicy:
    """A policy given by its next-character table, so that everything about it can be worked out.

    ``next`` maps the text so far, prompt included, to the probabilities of each character of
    ``alphabet`` and, last, of ending the turn.

    Example:
        >>> coin = TablePolicy("ab", lambda text: (0.25, 0.25, 0.5))
        >>> [(text, round(float(np.exp(logp)), 4)) for text, logp in coin.answers("?", longest=1)]
        [('', 0.5), ('a', 0.25), ('b', 0.25)]
    """

    alphabet: str
    next: Callable[[str], Sequence[float]]
    name: str = "table"
    renderer: CharRenderer = field(default_factory=CharRenderer)
    context: int = 1024
    vocabulary: str = "code points"
    version: int | None = None
    rows: int = 128  # ASCII codes
    hidden: None = None
    proofs: tuple[Proof, ...] = ()
    _seen: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False)

    @property
    def producer(self) -> Producer:
        """Frozen."""
        return Producer(kind=Kind.TEACHER, name=self.name)

    def answers(self, prompt: str, *, longest: int) -> Iterator[tuple[str, float]]:
        """Every (answer, log-prob) it can write in ``longest`` tokens; they sum to 1.

        An answer of ``longest`` characters is one that the budget cut off.
        """
        if not longest:
            yield "", 0.0
            return
        *letters, end = self._row(prompt)
        if end > 0:
            yield "", float(np.log(end))
        for letter, p in zip(self.alphabet, letters, strict=True):
            if p > 0:
                for rest, logp in self.answers(prompt + letter, longest=longest - 1):
                    yield letter + rest, float(np.log(p)) + logp

    def _row(self, text: str) -> npt.NDArray[np.float64]:
        row = self._seen.get(text)
        if row is None:
            row = np.asarray(self.next(text), np.float64)
            fits = row.shape == (len(self.alphabet) + 1,) and row.min() >= 0
            if not fits or abs(row.sum() - 1) > 1e-9:
                raise ValueError(f"{row} is no distribution over {self.alphabet!r} and the end")
            self._seen[text] = row
        return row

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw each request from its own seed, with its temperature; refuses truncation."""
        return [self._generate(request) for request in requests]

    def _generate(self, request: Request) -> Completion:
        tokens: list[int] = []
        logprobs: list[float] = []
        heat = request.sampling.temperature
        if request.sampling.is_truncated and heat > 0:
            raise NotImplementedError("TablePolicy does not truncate")
        draws = np.random.default_rng(request.sampling.seed).random(request.max_new_tokens)
        codes = [*(ord(c) for c in self.alphabet), 0]
        text = "".join(chr(t) for t in request.prompt)
        for draw in draws.tolist():
            row = self._row(text)
            if heat != 1:
                row = np.eye(len(row))[row.argmax()] if heat == 0 else row ** (1 / heat)
                row = row / row.sum()
            chances = row.tolist()
            pick, left = 0, draw
            while pick < len(chances) - 1 and (left >= chances[pick] or not chances[pick]):
                left -= chances[pick]
                pick += 1
            while not chances[pick]:  # rounding carried the draw past the last possible token
                pick -= 1
            tokens.append(codes[pick])
            logprobs.append(math.log(chances[pick]))
            if not tokens[-1]:
                break
            text += self.alphabet[pick]
        return Completion(
            tokens=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            end=End.LENGTH if tokens[-1] else End.COMPLETED,
        )

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Exact log-probs of trainable tokens; NaN elsewhere."""
        out = []
        places = {ord(c): i for i, c in enumerate(self.alphabet)} | {0: len(self.alphabet)}
        for trajectory in trajectories:
            values = np.full(len(trajectory), np.nan, np.float32)
            whole = "".join(chr(t) for t in trajectory.tokens)
            for at in np.flatnonzero(trajectory.trainable):
                place = places.get(int(trajectory.tokens[at]))
                chance = 0.0 if place is None else float(self._row(whole[:at])[place])
                values[at] = math.log(chance) if chance else -np.inf
            out.append(values)
        return out

    def entropies(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Exact entropies of trainable tokens; NaN elsewhere."""
        full = self.distributions(trajectories, top_k=None)
        return [-(np.exp(v) * np.where(np.isneginf(v), 0.0, v)).sum(-1) for _, v in full]

    def over(self, rows: int) -> Self:
        """The same policy, its distributions over the first codes only."""
        return replace(self, rows=min(rows, self.rows))

    def distributions(
        self, trajectories: Sequence[Trajectory], *, top_k: int | None
    ) -> list[tuple[IntArray, FloatArray]]:
        """Exact next-token log-probs over the 128 ASCII codes."""
        out = []
        codes = [*(ord(c) for c in self.alphabet), 0]
        for trajectory in trajectories:
            values = np.full((len(trajectory), 128), np.nan, np.float32)
            whole = "".join(chr(t) for t in trajectory.tokens)
            for at in np.flatnonzero(trajectory.trainable):
                values[at] = -np.inf
                with np.errstate(divide="ignore"):
                    values[at, codes] = np.log(self._row(whole[:at]))
            out.append(_likeliest(values, top_k, rows=self.rows))
        return out

    values = scores = no_scalar_head


@final
@dataclass(frozen=True, slots=True, eq=False)
class FakeTaskSet:
    """Prompts ``0``, ``1``, … whose right answer is always the same letter."""

    name: str = "letters"
    answer: str = "a"
    size: int = 8
    success: float = 1.0

    @property
    def train(self) -> Sequence[Task]:
        """``size`` prompts."""
        return [self._task(i) for i in range(self.size)]

    @property
    def held_out(self) -> Sequence[Task]:
        """``size`` other prompts."""
        return [self._task(self.size + i) for i in range(self.size)]

    def _task(self, index: int) -> Task:
        return Task(taskset=self.name, prompt=str(index), answer=self.answer)

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        """1 for the right letter."""
        return [float(c == t.answer) for t, c in zip(tasks, completions, strict=True)]


@final
@dataclass(frozen=True, slots=True, eq=False)
class RuleTaskSet:
    """Plain prompts whose answers are judged by a rule on (prompt, answer).

    ``prompts`` are held out; those of ``practice`` may be trained on.
    """

    prompts: tuple[str, ...]
    rule: Callable[[str, str], bool]
    practice: tuple[str, ...] = ()
    name: str = "rule"
    success: float = 1.0

    @property
    def train(self) -> Sequence[Task]:
        """The prompts of ``practice``."""
        return [Task(taskset=self.name, prompt=p) for p in self.practice]

    @property
    def held_out(self) -> Sequence[Task]:
        """The prompts that only probes may use."""
        return [Task(taskset=self.name, prompt=p) for p in self.prompts]

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        """1 where the rule holds."""
        return [float(self.rule(t.text, c)) for t, c in zip(tasks, completions, strict=True)]


def example_trajectory(
    *, prompt: Sequence[int] = (1, 2, 3), answer: Sequence[int] = (4, 5), kind: Kind = Kind.EXTERNAL
) -> Trajectory:
    """A two-span trajectory with answers by ``kind``, for tests.

    Example:
        >>> example_trajectory().trainable.tolist()
        [False, False, False, True, True]
    """
    author = Producer(kind=kind, name="example")
    live = kind is Kind.LEARNER
    asker = Producer(kind=Kind.ENVIRONMENT, name="example")
    return Trajectory(
        task="example/0",
        tokens=np.array([*prompt, *answer], np.int32),
        prompt_length=len(prompt),
        spans=(
            Span(length=len(prompt), role=Role.USER, producer=asker),
            Span(
                length=len(answer),
                role=Role.ASSISTANT,
                producer=author,
                versions=(0, 0) if live else None,
                sampling=Sampling() if live else None,
            ),
        ),
    )


def fake_tools(
    live: Policy | None = None,
    *,
    policies: Mapping[str, Policy] = MappingProxyType({}),
    tasksets: Mapping[str, TaskSet] = MappingProxyType({}),
    **more: Any,
) -> Tools:
    """What a part may use of a stage, without one.

    Args:
        live: the policy being trained; by default one that answers ``a`` or ``b``.
        policies: by reference, those that the part asks; ``learner`` is ``live``.
        tasksets: by name; all of them are drawn from.
        more: other fields of :class:`~posttrain.parts.tools.Tools`.

    Example:
        >>> fake_tools().live.producer.name
        'fake'
    """
    live = live or FakePolicy({"a": 0.5, "b": 0.5}, version=0)
    found = {"learner": live, **policies}
    usual: dict[str, Any] = {"drawn": tuple(tasksets), "stage": "fake", "longest": live.context}
    return Tools(
        live=live,
        policy=found.__getitem__,
        any_policy=found.__getitem__,
        sampler=found.__getitem__,
        tasksets=tasksets,
        **{**usual, **more},
    )


def as_group(*trajectories: Trajectory) -> Group:
    """A group of unscored members."""
    return Group(
        task=trajectories[0].task, members=tuple(Scored(trajectory=t) for t in trajectories)
    )
