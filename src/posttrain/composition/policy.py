"""Terms on the learner's own rollouts: policy gradients.

Every term here is a loss in r = π / behaviour, the ratio of a token's probability now to the one
it was sampled with, and in the advantage A. The ratio is against *recorded* log-probs, so only
tokens of the live learner qualify. At r = 1 (fresh rollouts, first update) all of them have the
gradient of REINFORCE, −A ∇ log π, up to how tokens and sequences are averaged; they differ in
what they do once the policy has moved.

The code behind a term is in ``objectives/policy.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import Aggregate, Term
from posttrain.composition.policy_regularisers import (
    AdaptiveEntropyBonus,
    EntropyBonus,
    LogRatioPenalty,
    PolicyRegulariser,
    ReferenceKL,
)
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column

__all__ = [
    "AdaptiveEntropyBonus",
    "ClippedPolicyGradient",
    "ClippedWeightPolicyGradient",
    "EntropyBonus",
    "GeometricPolicyGradient",
    "LogRatioPenalty",
    "Mismatch",
    "PolicyGradient",
    "PolicyTerm",
    "ReferenceKL",
    "SequencePolicyGradient",
    "ShapedWeightPolicyGradient",
    "SoftGatedPolicyGradient",
]

SequenceAggregate = Literal["sequence_mean", "sequence_sum"]


class Mismatch(Config):
    """Corrects for a sampler that is not quite the trainer: a constant weight on the loss.

    w = π_trainer / π_sampler at the version that sampled, for a ``token``, the product over its
    ``sequence``, or the sequence's ``geometric`` mean (which does not grow with length). Outside
    the bounds: ``truncate`` min(w, high), TIS; ``mask`` 0, and w inside, MIS and IcePop (arXiv
    2510.18855); ``reject`` 0, and 1 inside. With a correction r is π / π_trainer, so that w and r
    do not count the same difference twice. A weight of 0 still counts in every mean.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    outside: Literal["truncate", "mask", "reject"] = "truncate"
    low: float | None = None
    high: float = 2.0

    def __post_init__(self) -> None:
        bounded = self.outside != "truncate"
        if (self.low is not None) != bounded or self.high <= 0:
            raise ConfigError(
                f"mismatch with outside={self.outside}, low={self.low}, high={self.high}",
                expected="high > 0; low with mask and reject, and not with truncate",
            )
        if self.low is not None and not 0 <= self.low < self.high:
            raise ConfigError(
                f"mismatch with low={self.low}, high={self.high}", expected="0 <= low < high"
            )


def ratio_columns(mismatch: Mismatch | None) -> frozenset[Column]:
    """What a ratio and its correction read."""
    trainer = {Column.TRAINER_LOGPROB} if mismatch else set()
    return frozenset({Column.BEHAVIOUR_LOGPROB, Column.ADVANTAGE} | trainer)


def check_bounds(low: float, high: float) -> None:
    """Refuse a clip range that is empty or reaches below a ratio of 0."""
    if not 0 < low <= 1 or high <= 0:
        raise ConfigError(
            f"clip_low={low}, clip_high={high}", expected="0 < clip_low <= 1 and clip_high > 0"
        )


class PolicyGradient(Term, tag="policy_gradient", tag_field="type"):
    """−r A, not clipped: REINFORCE on fresh rollouts, token importance sampling after that.

    ``sequence_sum`` makes it the gradient of the expected reward (arXiv 2402.14740).
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    @property
    def needs(self) -> frozenset[Column]:
        """Advantage and log-probs."""
        return ratio_columns(self.mismatch)


class ClippedPolicyGradient(Term, tag="clipped_policy_gradient", tag_field="type"):
    """−min(r A, clip(r, 1−ε_low, 1+ε_high) A), r = π / behaviour (PPO, arXiv 1707.06347).

    ``dual_clip`` c bounds the loss of a bad token that became likelier: −max(·, c A) where A < 0
    (arXiv 1912.09729, c = 3). Two-sided clipping, r ≤ δ (arXiv 2505.07291, δ = 4), is the same
    loss with c = δ.

    ``sequence_mask`` δ drops sequences with A < 0 that the policy has left: those with
    mean_t log(behaviour / π) > δ (arXiv 2512.02556).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    sequence_mask: float | None = None
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        check_bounds(self.clip_low, self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(
                f"dual_clip={self.dual_clip}, clip_high={self.clip_high}",
                expected="dual_clip above 1 + clip_high",
            )
        if self.sequence_mask is not None and self.sequence_mask < 0:
            raise ConfigError(f"sequence_mask={self.sequence_mask}", expected="0 or more, in nats")

    @property
    def needs(self) -> frozenset[Column]:
        """Advantage and log-probs."""
        return ratio_columns(self.mismatch)


class SequencePolicyGradient(Term, tag="sequence_policy_gradient", tag_field="type"):
    """GSPO (arXiv 2507.18071): −min(s A, clip(s) A), s = exp(mean_t log r), one per sequence.

    With ``sequence_sum`` it is LUSPO (arXiv 2602.05261): the same times the sequence's length.
    The advantage must be the same at all tokens of a sequence.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    aggregate: SequenceAggregate = "sequence_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        check_bounds(self.clip_low, self.clip_high)
        check_level(self.mismatch)

    @property
    def needs(self) -> frozenset[Column]:
        """Advantage and log-probs."""
        return ratio_columns(self.mismatch)


class GeometricPolicyGradient(Term, tag="geometric_policy_gradient", tag_field="type"):
    """GMPO (arXiv 2507.20673): −A exp(mean_t l), l = log r clipped before the mean is taken.

    Only in the direction that the advantage pushes: l ≤ ``clip_high`` where A > 0 and
    l ≥ −``clip_low`` where A < 0, in log space. The advantage is one per sequence.
    """

    clip_low: float = 0.4
    clip_high: float = 0.4
    aggregate: SequenceAggregate = "sequence_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        if self.clip_low <= 0 or self.clip_high <= 0:
            raise ConfigError(
                f"clip_low={self.clip_low}, clip_high={self.clip_high}",
                expected="both above 0: they are in nats",
            )
        check_level(self.mismatch)

    @property
    def needs(self) -> frozenset[Column]:
        """Advantage and log-probs."""
        return ratio_columns(self.mismatch)


class ClippedWeightPolicyGradient(Term, tag="clipped_weight_policy_gradient", tag_field="type"):
    """CISPO (arXiv 2506.13585): −sg(clamp(r, low, high)) A log π. No token loses its gradient.

    The bounds are *absolute* ratios, as in ScaleRL (arXiv 2510.13786: no lower one, upper 5).
    Libraries that write clip(r, 1−ε_low, 1+ε_high) mean ratio_low = 1 − ε_low and
    ratio_high = 1 + ε_high here.
    """

    ratio_low: float = 0.0
    ratio_high: float = 5.0
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        if not 0 <= self.ratio_low <= 1 < self.ratio_high:
            raise ConfigError(
                f"ratio_low={self.ratio_low}, ratio_high={self.ratio_high}",
                expected="0 <= ratio_low <= 1 < ratio_high: bounds on the ratio itself",
                fix="an epsilon of 0.28 is ratio_high 1.28",
            )

    @property
    def needs(self) -> frozenset[Column]:
        """Advantage and log-probs."""
        return ratio_columns(self.mismatch)


class SoftGatedPolicyGradient(Term, tag="soft_gated_policy_gradient", tag_field="type"):
    """SAPO (arXiv 2511.20347): −(4/τ) σ(τ (r − 1)) A, a smooth gate in place of the clip.

    τ is ``temperature_up`` where A > 0 and ``temperature_down`` elsewhere; a larger one lets go
    sooner. The slope in r is 4 σ(1 − σ): 1 at r = 1, and towards 0 away from it.
    """

    temperature_up: float = 1.0
    temperature_down: float = 1.05
    aggregate: Aggregate = "sequence_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        if self.temperature_up <= 0 or self.temperature_down <= 0:
            raise ConfigError(
                f"temperatures {self.temperature_up} and {self.temperature_down}",
                expected="both above 0",
            )

    @property
    def needs(self) -> frozenset[Column]:
        """Advantage and log-probs."""
        return ratio_columns(self.mismatch)


class ShapedWeightPolicyGradient(Term, tag="shaped_weight_policy_gradient", tag_field="type"):
    """VESPO (arXiv 2602.10693): −sg(W^k e^{λ(1−W)}) A log π, W = Π_t r the sequence's ratio.

    (k, λ) is ``up`` where A > 0 and ``down`` elsewhere. The weight is 1 at W = 1 and goes to 0
    both where the policy left the sequence and where it rushed to it.
    """

    up: tuple[float, float] = (2.0, 3.0)
    down: tuple[float, float] = (3.0, 2.0)
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        if min(*self.up, *self.down) <= 0:
            raise ConfigError(f"up={self.up}, down={self.down}", expected="four numbers above 0")

    @property
    def needs(self) -> frozenset[Column]:
        """Advantage and log-probs."""
        return ratio_columns(self.mismatch)


def check_level(mismatch: Mismatch | None) -> None:
    """Refuse weights per token on a loss per sequence."""
    if mismatch is not None and mismatch.level == "token":
        raise ConfigError(
            "a mismatch correction per token on a loss per sequence",
            expected="level sequence or geometric",
        )


PolicyTerm = (
    PolicyGradient
    | ClippedPolicyGradient
    | SequencePolicyGradient
    | GeometricPolicyGradient
    | ClippedWeightPolicyGradient
    | SoftGatedPolicyGradient
    | ShapedWeightPolicyGradient
    | PolicyRegulariser
)
