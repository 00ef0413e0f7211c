"""Policy-gradient methods."""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition import (
    Aggregate,
    ClippedPolicyGradient,
    Composition,
    GroupAdvantage,
    PolicyRef,
    ReferenceKL,
    ReferenceLogprobs,
    Rollouts,
    SamplingSpec,
    SignalSpec,
    TermSpec,
    Verify,
)
from posttrain.config import Config
from posttrain.errors import ConfigError


class Grpo(Config, frozen=True, kw_only=True, tag="grpo", tag_field="name"):
    """Group-relative policy optimisation on the learner's own rollouts."""

    tasks: tuple[str, ...]
    group_size: int = 8
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    reference: PolicyRef = "input"
    aggregate: Aggregate = "sequence_mean"

    provenance: ClassVar[str] = "on-policy"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-min(r A, clip(r) A), A = (R - mean) / std over the group"
    paper: ClassVar[str] = "2402.03300"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"grpo with group_size={self.group_size}",
                expected="at least 2: a group of one has no baseline",
            )

    def compose(self) -> Composition:
        """Live rollouts; verifier and group advantage; clipped policy gradient, optional KL."""
        signals: list[SignalSpec] = [Verify(), GroupAdvantage()]
        terms: list[TermSpec] = [
            ClippedPolicyGradient(
                clip_low=self.clip_low, clip_high=self.clip_high, aggregate=self.aggregate
            )
        ]
        if self.kl_weight:
            signals.append(ReferenceLogprobs(policy=self.reference))
            terms.append(ReferenceKL(weight=self.kl_weight, aggregate=self.aggregate))
        source = Rollouts(
            tasks=self.tasks,
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
        )
        return Composition(source=source, signals=tuple(signals), terms=tuple(terms))


PolicyMethod = Grpo
