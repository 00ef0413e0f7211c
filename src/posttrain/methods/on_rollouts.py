"""What methods on the learner's own rollouts have in common."""

from __future__ import annotations

from typing import ClassVar, Protocol

from msgspec.structs import replace

from posttrain.composition import (
    Aggregate,
    ClippedPolicyGradient,
    Composition,
    Guided,
    Judge,
    KLPenalty,
    Mismatch,
    PolicyRef,
    Redraw,
    ReferenceLogprobs,
    Rollouts,
    SamplingSpec,
    ScalarHead,
    SignalSpec,
    TermSpec,
    TrainerLogprobs,
    Verify,
    WeightSchedule,
)
from posttrain.composition.company import Company
from posttrain.composition.sources import Sieve
from posttrain.core.config import Config
from posttrain.core.provenance import Kind


class Answering(Protocol):
    """Whose prompts are answered, and how."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def group_size(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def sampling(self) -> SamplingSpec: ...


class Clipping(Protocol):
    """How far a ratio may go from 1."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...


class Demonstrating(Protocol):
    """Which column of a task holds a demonstration, and who wrote it."""

    @property
    def demonstration(self) -> str: ...
    @property
    def author(self) -> Kind: ...


class OnRollouts(Config):
    """Which prompts are drawn, how they are answered, and who judges. Methods add what they do."""

    tasks: tuple[str, ...]
    group_size: int = 8
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    rewards: tuple[Judge, ...] = (Verify(),)

    provenance: ClassVar[str] = "on-policy"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"


def rollouts(
    method: Answering, *, policy: PolicyRef = "learner", company: Company | None = None
) -> Rollouts:
    """The method's prompts, answered by a policy."""
    return Rollouts(
        tasks=method.tasks,
        policy=policy,
        group_size=method.group_size,
        max_new_tokens=method.max_new_tokens,
        sampling=method.sampling,
        company=company,
    )


def demonstrated(method: Demonstrating) -> Guided:
    """One member of every group is a whole demonstration, and is trained on."""
    return Guided(
        column=method.demonstration, author=method.author, members=1, start=1, end=1, learn=True
    )


def clipped(
    method: Clipping,
    *,
    aggregate: Aggregate = "token_mean",
    weight: float = 1.0,
    weight_schedule: WeightSchedule | None = None,
    mismatch: Mismatch | None = None,
) -> ClippedPolicyGradient:
    """The clipped policy gradient with the method's bounds."""
    return ClippedPolicyGradient(
        clip_low=method.clip_low,
        clip_high=method.clip_high,
        aggregate=aggregate,
        weight=weight,
        weight_schedule=weight_schedule,
        mismatch=mismatch,
    )


def on_rollouts(
    method: OnRollouts,
    signals: tuple[SignalSpec, ...],
    terms: tuple[TermSpec, ...],
    *,
    mismatch: Mismatch | None = None,
    scalar_head: ScalarHead | None = None,
) -> Composition:
    """Live rollouts, judged by the method's ``rewards`` and then by ``signals``, under ``terms``.

    ``mismatch`` is that of the terms: it needs the trainer's log-probs. ``scalar_head`` is what
    terms on values read.
    """
    trainer: tuple[SignalSpec, ...] = (TrainerLogprobs(),) if mismatch else ()
    return Composition(
        source=rollouts(method),
        signals=(*method.rewards, *signals, *trainer),
        terms=terms,
        scalar_head=scalar_head,
    )


def redrawn(once: Composition, *, keep: tuple[Sieve, ...], max_draws: int) -> Composition:
    """The same with a source that draws again, where ``keep`` judges in place of the signals.

    With ``max_draws`` 1 it is the same.
    """
    if max_draws == 1:
        return once
    assert isinstance(once.source, Rollouts)
    source = Redraw(source=once.source, keep=keep, max_draws=max_draws)
    return replace(once, source=source, signals=tuple(s for s in once.signals if s not in keep))


def kl_in_reward(beta: float, reference: PolicyRef) -> tuple[SignalSpec, ...]:
    """The signals of a KL penalty in the reward; none for 0."""
    return (ReferenceLogprobs(policy=reference), KLPenalty(beta=beta)) if beta else ()
