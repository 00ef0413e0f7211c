"""Shapes of methods on the learner's own rollouts.

    tasks, group_size, sampling ── rollouts ──▶ source ──┐
    rewards, then the method's own signals ──────────────┼── on_rollouts ──▶ Composition
    the method's terms ──────────────────────────────────┘

    kl_beta   ── kl_in_reward ──▶ two signals of a reward
    max_draws ── redrawn ──▶ a source around the rollouts

A method that is one term on the group's advantage fills ``GroupedRollouts``.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from msgspec.structs import replace

from posttrain.core.bounds import Size, Tokens
from posttrain.core.learner import ScalarHead
from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.parts import unions
from posttrain.parts.base import PolicyRef, Signal, Term
from posttrain.parts.composition import Composition, Method, TermMethod
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.shaping import KLPenalty
from posttrain.parts.logprobs import ReferenceLogprobs, TrainerLogprobs
from posttrain.parts.policy.ratio import Mismatch, RatioTerm
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.members import AnyMember, Guided
from posttrain.parts.sources.redraw import Redraw
from posttrain.parts.sources.rollouts import Rollouts


class Answering(Protocol):
    """Prompts and decoding of a method with rollouts."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def group_size(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def sampling(self) -> SamplingSpec: ...


class Demonstrating(Protocol):
    """The task's column with a demonstration, and its author."""

    @property
    def demonstration(self) -> str: ...
    @property
    def author(self) -> Kind: ...


class OnRollouts(Method):
    """Methods on the learner's rollouts: prompts, decoding and reward signals."""

    tasks: tuple[str, ...]
    group_size: Size = 8
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    rewards: tuple[unions.AnyJudge, ...] = (Verify(),)

    provenance: ClassVar[str] = "on-policy"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"


def rollouts(
    method: Answering, *, policy: PolicyRef = "learner", members: AnyMember | None = None
) -> Rollouts:
    """Rollouts of a policy on the method's prompts."""
    return Rollouts(
        tasks=method.tasks,
        policy=policy,
        group_size=method.group_size,
        max_new_tokens=method.max_new_tokens,
        sampling=method.sampling,
        members=members,
    )


def demonstrated(method: Demonstrating) -> Guided:
    """One member of every group is a whole demonstration, which is trained on."""
    return Guided(
        column=method.demonstration, author=method.author, count=1, start=1, end=1, learn=True
    )


def on_rollouts(
    method: OnRollouts,
    signals: tuple[Signal, ...],
    terms: tuple[Term, ...],
    *,
    mismatch: Mismatch | None = None,
    scalar_head: ScalarHead | None = None,
) -> Composition:
    """Live rollouts, the method's ``rewards``, then ``signals``, and the terms.

    ``mismatch`` is that of the terms: it needs the trainer's log-probs. ``scalar_head`` is for
    terms on values.
    """
    trainer: tuple[Signal, ...] = (TrainerLogprobs(),) if mismatch else ()
    return Composition(
        source=rollouts(method),
        signals=(*method.rewards, *signals, *trainer),
        terms=terms,
        scalar_head=scalar_head,
    )


def redrawn(
    method: Answering,
    once: Composition,
    *,
    keep: tuple[unions.AnySieve, ...],
    max_draws: int,
) -> Composition:
    """The composition with a source that redraws; ``keep`` filters there, not as signals.

    With ``max_draws`` 1 it is the composition itself.
    """
    if max_draws == 1:
        return once
    source = Redraw(source=rollouts(method), keep=keep, max_draws=max_draws)
    return replace(once, source=source, signals=tuple(s for s in once.signals if s not in keep))


def kl_in_reward(beta: float, reference: PolicyRef) -> tuple[Signal, ...]:
    """The signals of a KL penalty in the reward; none for 0."""
    return (ReferenceLogprobs(policy=reference), KLPenalty(beta=beta)) if beta else ()


class GroupedRollouts(OnRollouts, TermMethod):
    """A loss in the ratio and in the advantage over the group, on live rollouts."""

    def around(self, term: Term) -> Composition:
        """Live rollouts; rewards and group advantage; the term."""
        assert isinstance(term, RatioTerm)
        return on_rollouts(self, (GroupAdvantage(),), (term,), mismatch=term.mismatch)
