"""Protocols between folders. :mod:`posttrain.testing` has contract suites and fakes for them.

Shape legend: ``T`` tokens of a trajectory, ``K`` entries of a top-k distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self, runtime_checkable

from posttrain.core.learner import Lora, MovingReference, Optimizer
from posttrain.core.proofs import Proof
from posttrain.core.provenance import FloatArray, IntArray, Producer, Sampling, Span
from posttrain.core.rendering import STRICT, Rules
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.task import Message, Task
from posttrain.core.trajectory import IN_PLACE, Column, End, Group, Trajectory

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch
    from posttrain.numerics.logits import Head


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A rendered prompt: token ids, and their authors as spans."""

    tokens: IntArray  # [T]
    spans: tuple[Span, ...]


class Renderer(Protocol):
    """Turns tasks into prompts and tokens into text, for one tokenizer."""

    @property
    def has_template(self) -> bool:
        """True when prompts should be chat messages."""
        ...

    def prompt(self, task: Task) -> Prompt: ...

    def answer(self, task: Task, text: str, *, rules: Rules = STRICT) -> IntArray:
        """The tokens of an answer with this text, its end-of-turn token included."""
        ...

    def text(self, tokens: IntArray) -> str:
        """The completion as a verifier reads it: without end-of-turn tokens."""
        ...

    def token_text(self, token: int) -> str:
        """One token, special ones by name."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a turn."""
        ...

    @property
    def digest(self) -> str:
        """Equal digests give equal tokens for equal texts."""
        ...

    @property
    def remarks(self) -> Sequence[str]:
        """What every conversation gets beside its messages, in words."""
        ...

    def completion(
        self,
        prompt: str,
        completion: str,
        *,
        producer: Producer,
        task: str,
        rules: Rules = STRICT,
    ) -> Trajectory:
        """A plain-text prompt and completion, with the end token."""
        ...

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        producer: Producer,
        task: str,
        assistant_mask: Literal["template", "prefix"] = "template",
        num_prompt: int | None = None,
        rules: Rules = STRICT,
    ) -> Trajectory:
        """Messages rendered by the chat template; ``producer`` wrote the assistant's turns."""
        ...

    def show(self, trajectory: Trajectory) -> str:
        """The text as the learner reads it, each trained run of tokens in ⟦ ⟧."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One completion to sample. Equal requests with equal weights give equal completions."""

    prompt: IntArray  # [T]
    sampling: Sampling
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """A sampled completion, with log-probs under the distribution it was sampled from."""

    tokens: IntArray  # [T], the end-of-turn token included
    logprobs: FloatArray  # [T]
    end: End


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hidden:
    """A policy's hidden states and output head, in place of its distributions."""

    head: Head
    states: Callable[[Sequence[Trajectory]], list[FloatArray]]
    """[T, X] per trajectory: the final hidden states that predict the trainable tokens, each
    at the token's index; NaN elsewhere."""


class Author(Protocol):
    """A model that samples or scores tokens, live or frozen."""

    @property
    def producer(self) -> Producer: ...

    @property
    def version(self) -> int | None:
        """Optimiser steps taken, for a live learner. None for a frozen policy."""
        ...

    @property
    def renderer(self) -> Renderer: ...

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""
        ...

    @property
    def vocabulary(self) -> str:
        """Digest of its token ids: a policy can score another's tokens only if these are equal."""
        ...

    @property
    def proofs(self) -> Sequence[Proof]:
        """What was compared when it was loaded; a live learner has those of its adapters."""
        ...


class Sampler(Author, Protocol):
    """A model that can be sampled. An engine that only generates, such as a server, suffices."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...


@runtime_checkable
class Scorer(Author, Protocol):
    """A model that can score given tokens."""

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: log-probs of trainable tokens at temperature 1, NaN elsewhere."""
        ...

    def entropies(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: entropy of the next-token distribution from which each trainable
        token would be drawn at the temperature that it was sampled at (1 for given text), in
        nats; NaN elsewhere."""
        ...

    def distributions(
        self, trajectories: Sequence[Trajectory], *, top_k: int | None
    ) -> list[tuple[IntArray, FloatArray]]:
        """([T, K] ids, [T, K] log-probs), most likely first; NaN where nothing is trained.

        ``top_k=None`` gives the whole vocabulary: ids [T, 0] and log-probs [T, V].
        """
        ...

    @property
    def rows(self) -> int:
        """V, the ids of its distributions: those of tokens, and of padding behind them."""
        ...

    def over(self, rows: int) -> Self:
        """The same policy, its distributions over the first ids only; itself if it has no more.

        Models of a family share a tokenizer, and pad their heads to different numbers of rows.
        """
        ...

    @property
    def hidden(self) -> Hidden | None:
        """Its hidden states and head, if its weights are in this process and never change; else
        None."""
        ...

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: the scalar head *before* each trainable token, NaN elsewhere.

        A learner with a separate critic gives the critic's. The first token of a trajectory
        without a prompt has none.

        Raises:
            LegalityError: there is no scalar head, also for no trajectories.
        """
        ...

    def scores(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: the scalar head *after* each trainable token, NaN elsewhere.

        Raises:
            LegalityError: there is no scalar head, also for no trajectories.
        """
        ...


class Policy(Sampler, Scorer, Protocol):
    """A model that samples completions and computes log-probs."""


class Stateful(Protocol):
    """State that a checkpoint must hold, so that a stage resumes bit for bit."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A data file of a source, as the ledger records it."""

    name: str
    producer: Producer  # the author of its rows, with the file's digest
    digest: str  # sha256 of the file, 64 hex digits
    licence: str | None
    rows: int  # rows that are used
    skipped: int  # rows left out: too long, or unusable
    notes: Sequence[str] = ()  # what a reader should know about its rows, in words
    proofs: Sequence[Proof] = ()  # what was compared when it was read
    questions: frozenset[str] = frozenset()  # its prompts and users' turns, with single spaces


class Stream(Protocol):
    """An open source. What it draws is a function of the step and of its recorded state."""

    @property
    def files(self) -> Sequence[DataFile]:
        """The data files that it reads."""
        ...

    @property
    def num_groups(self) -> int | None:
        """Groups of an epoch; None for a source without epochs."""
        ...

    @property
    def state(self) -> Stateful | None:
        """State to save in checkpoints; None where a draw depends on the step alone."""
        ...

    def publish(self, version: int) -> None:
        """The learner has new weights, after ``version`` updates. Called after every update."""
        ...

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]: ...


class PureStream:
    """A base for streams whose draws depend on the step and not on recorded state."""

    @property
    def files(self) -> Sequence[DataFile]:
        """None."""
        return ()

    @property
    def num_groups(self) -> int | None:
        """None: no epochs."""
        return None

    @property
    def state(self) -> Stateful | None:
        """None: no state."""
        return None

    def publish(self, version: int) -> None:
        """Nothing to do: on one device the sampler is the learner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The result of one optimiser step. ``metrics`` are reduced over the global batch."""

    loss: float
    grad_norm: float
    num_tokens: int  # tokens that went through the model
    num_trained: int  # trainable tokens in the step, whether or not a term read them
    metrics: Mapping[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A weighted sum of terms over packed batches."""

    @property
    def needs(self) -> frozenset[Column]: ...

    @property
    def moving(self) -> Mapping[str, float]:
        """Weights that follow a schedule, by metric name."""
        ...

    @property
    def scalars(self) -> frozenset[Stat]:
        """Statistics of a scalar head that :meth:`loss` needs."""
        ...

    @property
    def reads_logits(self) -> bool:
        """False when no term reads a statistic of the policy's distribution."""
        ...

    def at(self, *, step: int, steps: int, state: Mapping[str, float] | None = None) -> Objective:
        """The objective of one update, with the weights of this step and state."""
        ...

    def after(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """The state to pass to :meth:`at` for the next update, from this update's metrics."""
        ...

    def counts(self, batches: Sequence[PackedBatch]) -> tuple[int, ...]:
        """Global number of units per term, over all micro-batches of a step."""
        ...

    def loss(
        self,
        hidden_NX: Tensor,
        head: Head,
        batch: PackedBatch,
        *,
        counts: Sequence[int],
        vocab_size: int,
        scalars: Mapping[Wanted, Tensor] = ...,
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The micro-batch's share of the loss and of the metrics; shares add up."""
        ...


class Learner(Protocol):
    """The model being trained: takes steps on an objective and can be saved exactly."""

    @property
    def policy(self) -> Policy: ...

    @property
    def state(self) -> Mapping[str, float]:
        """The objective's state after earlier updates, by name. Saved with the weights."""
        ...

    @property
    def micro_batch_tokens(self) -> int:
        """Default number of tokens of a micro-batch."""
        ...

    @property
    def start(self) -> Policy | None:
        """The policy it started from, on the same weights; None where they are overwritten.

        With adapters this is the model with the adapters switched off.
        """
        ...

    @property
    def moving(self) -> Policy | None:
        """The moving reference of the learner; None when the stage declares none."""
        ...

    def step(
        self, batches: Sequence[PackedBatch], objective: Objective, *, lr_scale: float
    ) -> StepReport:
        """One optimiser step over the micro-batches, at ``lr_scale`` times the learning rate."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state, enough to resume bit for bit."""
        ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> Sequence[Proof]:
        """Write a model folder that transformers can load without posttrain.

        Returns:
            What was compared: the folder, reloaded, with the policy in memory.

        Raises:
            ModelError: the reloaded folder is another policy.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarStart:
    """The scalar head of a learner, and its initial weights."""

    trunk: Literal["shared", "separate"]
    model: str  # folder or hub id to copy the head from, and for a separate trunk the decoder
    lr: float | None = None  # of a separate trunk and its head; None for the learner's


class Engine(Protocol):
    """Makes policies and learners from model folders. Only ``api.py`` chooses one."""

    def policy(self, model: str) -> Policy:
        """A frozen policy from a folder or a hub id."""
        ...

    def learner(
        self,
        model: str,
        *,
        name: str,
        optimizer: Optimizer,
        lora: Lora | None,
        seed: int,
        moving: MovingReference | None = None,
        scalar: ScalarStart | None = None,
        activation_checkpointing: bool = False,
    ) -> Learner:
        """A learner that starts from a folder or a hub id; adapters start from ``seed``.

        ``activation_checkpointing`` recomputes activations in the backward pass.
        """
        ...


def over_shared_rows(policies: Sequence[Policy]) -> list[Policy]:
    """Policies with one tokenizer, their distributions over the ids that all of them have."""
    shared = min(policy.rows for policy in policies)
    return [policy.over(shared) for policy in policies]


def provided(group: Group) -> frozenset[Column]:
    """Columns that every member of a group has, or has a replacement for (``IN_PLACE``)."""
    return frozenset.intersection(
        *(
            frozenset(m.columns) | {c for c, other in IN_PLACE.items() if other in m.columns}
            for m in group.members
        )
    )
