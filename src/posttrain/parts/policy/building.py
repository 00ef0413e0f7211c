"""Pieces of compositions that several policy-gradient methods use.

    clip_low, clip_high ── clipped ──▶ clipped_policy_gradient
    kl_beta             ── kl_in_reward ──▶ reference_logprobs, kl_penalty
    max_draws           ── redrawn ──▶ redraw around the rollouts

Options on the left, in the methods; parts on the right.
"""

from __future__ import annotations

from typing import Protocol

from msgspec.structs import replace

from posttrain.parts import unions
from posttrain.parts.base import Aggregate, PolicyRef, Signal, WeightSchedule
from posttrain.parts.composition import Composition
from posttrain.parts.credit.shaping import KLPenalty
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.ratio import Mismatch
from posttrain.parts.policy.shapes import Answering, rollouts
from posttrain.parts.sources.redraw import Redraw


class Clipping(Protocol):
    """How far a ratio may go from 1."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...


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


def redrawn(
    method: Answering,
    once: Composition,
    *,
    keep: tuple[unions.AnySieve, ...],
    max_draws: int,
) -> Composition:
    """The composition with a source that draws again; ``keep`` decides there, not as signals.

    With ``max_draws`` 1 it is the composition itself.
    """
    if max_draws == 1:
        return once
    source = Redraw(source=rollouts(method), keep=keep, max_draws=max_draws)
    return replace(once, source=source, signals=tuple(s for s in once.signals if s not in keep))


def kl_in_reward(beta: float, reference: PolicyRef) -> tuple[Signal, ...]:
    """The signals of a KL penalty in the reward; none for 0."""
    return (ReferenceLogprobs(policy=reference), KLPenalty(beta=beta)) if beta else ()
