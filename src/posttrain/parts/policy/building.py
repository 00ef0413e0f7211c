"""Pieces of compositions that several policy-gradient methods use."""

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
from posttrain.parts.sources.redraw import Redraw
from posttrain.parts.sources.rollouts import Rollouts


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


def redrawn(once: Composition, *, keep: tuple[unions.AnySieve, ...], max_draws: int) -> Composition:
    """The same with a source that draws again, where ``keep`` judges in place of the signals.

    With ``max_draws`` 1 it is the same.
    """
    if max_draws == 1:
        return once
    assert isinstance(once.source, Rollouts)
    source = Redraw(source=once.source, keep=keep, max_draws=max_draws)
    return replace(once, source=source, signals=tuple(s for s in once.signals if s not in keep))


def kl_in_reward(beta: float, reference: PolicyRef) -> tuple[Signal, ...]:
    """The signals of a KL penalty in the reward; none for 0."""
    return (ReferenceLogprobs(policy=reference), KLPenalty(beta=beta)) if beta else ()
