"""Terms on the learner's own rollouts: policy gradients and their regularisers.

The code behind a term is in ``objectives/policy.py``.
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition.base import Aggregate
from posttrain.config import Config
from posttrain.errors import ConfigError
from posttrain.provenance import Kind
from posttrain.trajectory import Column


class ClippedPolicyGradient(
    Config, frozen=True, kw_only=True, tag="clipped_policy_gradient", tag_field="type"
):
    """−min(r A, clip(r, 1−ε_low, 1+ε_high) A), r = π / behaviour (arXiv 1707.06347).

    The ratio is against the recorded behaviour log-probs, so only tokens of the live learner
    qualify: a ratio to somebody else's policy is not this objective.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.ADVANTAGE})
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1 or self.clip_high <= 0:
            raise ConfigError(
                f"clip_low={self.clip_low}, clip_high={self.clip_high}",
                expected="0 < clip_low <= 1 and clip_high > 0",
            )


class ReferenceKL(Config, frozen=True, kw_only=True, tag="reference_kl", tag_field="type"):
    """KL(π ‖ π_ref) on the learner's own tokens, whose *gradient* is that of the KL.

    The value is the k3 estimate e^{−u} + u − 1 with u = log π − log π_ref. Differentiating k3
    itself gives the gradient of another divergence (survey section 5, trap 11); on samples of π
    the unbiased gradient is that of r·k3 with r = π / behaviour, which is what is used here
    (arXiv 2512.02556).
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 0.001
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset(
        {Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB}
    )
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


PolicyTerm = ClippedPolicyGradient | ReferenceKL
