"""Named methods. Each is a few lines that compose source, signals and terms.

A method is the short name of a :class:`~posttrain.composition.Composition` with its paper's
defaults; nothing else in the code knows the name. ``compose`` spells any composition out by hand.
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition import (
    Aggregate,
    ClippedPolicyGradient,
    Composition,
    CrossEntropy,
    Dataset,
    GroupAdvantage,
    PairwiseLogistic,
    PolicyRef,
    ReferenceKL,
    ReferenceLogprobs,
    Rollouts,
    SamplingSpec,
    SignalSpec,
    SourceSpec,
    TeacherDistribution,
    TeacherReverseKL,
    TermSpec,
    Verify,
)
from posttrain.config import Config
from posttrain.errors import ConfigError


class Sft(Config, frozen=True, kw_only=True, tag="sft", tag_field="name"):
    """Supervised fine-tuning: the likelihood of somebody else's answers."""

    data: Dataset
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "expansion or reshaping, decided by the data"
    formula: ClassVar[str] = "-log pi(y_t)"
    paper: ClassVar[str] = "-"

    def compose(self) -> Composition:
        """Data set; no signals; cross-entropy."""
        return Composition(source=self.data, terms=(CrossEntropy(aggregate=self.aggregate),))


class Dpo(Config, frozen=True, kw_only=True, tag="dpo", tag_field="name"):
    """Direct preference optimisation on fixed pairs."""

    data: Dataset
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: PolicyRef = "input"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-log sigmoid(beta (rho_chosen - rho_rejected)), rho = log pi/pi_ref"
    paper: ClassVar[str] = "2305.18290"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; pairwise logistic loss."""
        fields = {f: getattr(self.data, f) for f in self.data.__struct_fields__}
        return Composition(
            source=Dataset(**{**fields, "preference": True}),
            signals=(ReferenceLogprobs(policy=self.reference),),
            terms=(PairwiseLogistic(beta=self.beta, label_smoothing=self.label_smoothing),),
        )


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


class Opd(Config, frozen=True, kw_only=True, tag="opd", tag_field="name"):
    """On-policy distillation: the teacher grades every token of the learner's own rollouts."""

    tasks: tuple[str, ...]
    teachers: dict[str, PolicyRef]
    group_size: int = 1
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    top_k: int | None = None
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "on-policy"
    interface: ClassVar[str] = "teacher targets"
    tendency: ClassVar[str] = "reshaping or consolidation"
    formula: ClassVar[str] = "KL(pi || pi_teacher) per token, on samples of pi"
    paper: ClassVar[str] = "2306.13649"

    def compose(self) -> Composition:
        """Live rollouts; teacher distributions routed by task set; reverse KL."""
        return Composition(
            source=Rollouts(
                tasks=self.tasks,
                group_size=self.group_size,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
            ),
            signals=(TeacherDistribution(routes=self.teachers, top_k=self.top_k),),
            terms=(TeacherReverseKL(aggregate=self.aggregate),),
        )


class Compose(Config, frozen=True, kw_only=True, tag="compose", tag_field="name"):
    """Any legal composition, spelt out."""

    source: SourceSpec
    terms: tuple[TermSpec, ...]
    signals: tuple[SignalSpec, ...] = ()

    provenance: ClassVar[str] = "as composed"
    interface: ClassVar[str] = "as composed"
    tendency: ClassVar[str] = "measure it"
    formula: ClassVar[str] = "the weighted sum of the terms"
    paper: ClassVar[str] = "-"

    def compose(self) -> Composition:
        """Itself."""
        return Composition(source=self.source, signals=self.signals, terms=self.terms)


Method = Sft | Dpo | Grpo | Opd | Compose
