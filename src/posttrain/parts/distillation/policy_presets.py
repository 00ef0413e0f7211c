"""Distillation as a policy gradient: teacher log-probs are the rewards of sampled tokens."""

from __future__ import annotations

from typing import ClassVar

from posttrain.core.bounds import Count, NonNegative, Positive, Size
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.parts.base import Aggregate, PolicyRef, Signal, Term
from posttrain.parts.composition import Composition
from posttrain.parts.distillation.divergences import TeacherReverseKL
from posttrain.parts.distillation.foreign import SpanAdvantage
from posttrain.parts.distillation.presets import OnTasks
from posttrain.parts.distillation.teacher_credit import DeltaAdvantage, TeacherAdvantage
from posttrain.parts.distillation.teachers import TeacherDistribution, TeacherLogprobs
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient, PolicyGradient
from posttrain.parts.policy.shapes import rollouts
from posttrain.parts.registry import part


class Sampled(OnTasks):
    """Methods with an advantage per sampled token; ``aggregate`` averages the token losses."""

    group_size: Size = 4
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "on-policy"


def _sampled(method: Sampled, signals: tuple[Signal, ...], terms: tuple[Term, ...]) -> Composition:
    return Composition(source=rollouts(method), signals=signals, terms=terms)


@part
class OpdSampled(Sampled):
    """OPD from one log-prob per token: the expected gradient of opd, with sampling noise.

    Needs only the teacher's log-probs of given tokens. The form of Thinking Machines' write-up: no
    discount, importance sampling, no clip.
    """

    teachers: dict[str, PolicyRef]

    formula: ClassVar[str] = "-r A, A = log pi_teacher(y_t) - log pi(y_t)"
    paper: ClassVar[str] = "-"

    def compose(self) -> Composition:
        """Live rollouts; teacher log-probs as advantages; policy gradient."""
        signals = (TeacherLogprobs(routes=self.teachers), TeacherAdvantage())
        return _sampled(self, signals, (PolicyGradient(aggregate=self.aggregate),))


@part
class IwOpd(Sampled):
    """Sampled OPD with more weight on early tokens, whose errors affect all later ones.

    Unconfirmed: the formula was read at second hand.
    """

    teachers: dict[str, PolicyRef]
    early: NonNegative = 0.5

    formula: ClassVar[str] = "-r w A, w_t = 1 + early (1 - sum_{s<t} |A_s| / sum_s |A_s|)"
    paper: ClassVar[str] = "2606.22600"

    def __post_init__(self) -> None:
        if self.early <= 0:
            raise ConfigError(
                f"iw_opd with early={self.early}", expected="above 0", fix="0 is opd_sampled"
            )

    def compose(self) -> Composition:
        """Live rollouts; weighted advantages; policy gradient."""
        signals = (TeacherLogprobs(routes=self.teachers), TeacherAdvantage(early=self.early))
        return _sampled(self, signals, (PolicyGradient(aggregate=self.aggregate),))


@part
class GOpd(Sampled):
    """Sampled OPD that extrapolates beyond the teacher with λ above 1.

    ``reference`` is the policy that the teacher was trained from; by default this stage's input.

    Unconfirmed: the formula was read at second hand.
    """

    teachers: dict[str, PolicyRef]
    extrapolation: Positive = 1.25
    reference: PolicyRef = "input"

    formula: ClassVar[str] = "-r A, A = lambda log(pi_T / pi_ref) - log(pi / pi_ref)"
    paper: ClassVar[str] = "2602.12125"

    def __post_init__(self) -> None:
        if self.extrapolation == 1:
            raise ConfigError(
                "g_opd with extrapolation=1, which no reference enters",
                expected="above 1 to go beyond the teacher, below 1 to stop short of it",
                fix="use opd_sampled",
            )

    def compose(self) -> Composition:
        """Live rollouts; teacher and reference log-probs; policy gradient."""
        signals: tuple[Signal, ...] = (
            TeacherLogprobs(routes=self.teachers),
            ReferenceLogprobs(policy=self.reference),
            TeacherAdvantage(extrapolation=self.extrapolation),
        )
        return _sampled(self, signals, (PolicyGradient(aggregate=self.aggregate),))


@part
class Opd2(Sampled):
    """Distils the difference between a teacher and its base, where plain OPD agrees in sign.

    Unconfirmed: the formula was read at second hand.
    """

    teacher: PolicyRef
    teacher_base: PolicyRef
    scale: Positive = 0.1
    group_size: Size = 1
    sampling: SamplingSpec = SamplingSpec(temperature=0.7)
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    formula: ClassVar[str] = "-min(r A, clip(r) A), A = centred log(pi_T / pi_base) if OPD agrees"
    paper: ClassVar[str] = "2607.15161"

    def compose(self) -> Composition:
        """Live rollouts; the teacher's delta as advantage; clipped policy gradient."""
        signal = DeltaAdvantage(teacher=self.teacher, base=self.teacher_base, scale=self.scale)
        term = ClippedPolicyGradient(
            clip_low=self.clip_low, clip_high=self.clip_high, aggregate=self.aggregate
        )
        return _sampled(self, (signal,), (term,))


@part
class SpanOpd(Sampled):
    """Sampled OPD from a teacher with another tokenizer, by spans of text common to both.

    The alignment is that of GOLD. ``uld`` compares whole distributions instead, by rank.
    """

    teacher: PolicyRef

    formula: ClassVar[str] = "-r A, A = log pi_T(span) - log pi(span), the span of y_t"
    paper: ClassVar[str] = "GOLD, Hugging Face 2025"

    def compose(self) -> Composition:
        """Live rollouts; a foreign teacher's log-probs of spans as advantages; policy gradient."""
        signals = (SpanAdvantage(teacher=self.teacher),)
        return _sampled(self, signals, (PolicyGradient(aggregate=self.aggregate),))


@part
class Minillm(Sampled):
    """The reverse KL between whole sequences: one step exactly, the rest by policy gradient.

    The exact part is the next-token reverse KL; the rest credits a token with the mean log-ratio
    of later tokens, the paper's length normalisation. Not implemented: sampling from a mixture of
    teacher and learner, and a pre-training loss (mix in a data set for that).

    The authors' code also whitens the rewards, and discounts them by 0.95 per token.
    """

    teachers: dict[str, PolicyRef]
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    top_k: Count | None = None

    formula: ClassVar[str] = "KL(pi || pi_T) per token, - clip(r) mean_{s>t} log(pi_T / pi)(y_s)"
    paper: ClassVar[str] = "2306.08543"

    def compose(self) -> Composition:
        """Live rollouts; teacher distributions and log-probs; reverse KL and policy gradient."""
        signals: tuple[Signal, ...] = (
            TeacherDistribution(routes=self.teachers, top_k=self.top_k),
            TeacherLogprobs(routes=self.teachers),
            TeacherAdvantage(credit="future_mean"),
        )
        exact = TeacherReverseKL(aggregate=self.aggregate)
        rest = ClippedPolicyGradient(
            clip_low=self.clip_low, clip_high=self.clip_high, aggregate=self.aggregate
        )
        return _sampled(self, signals, (exact, rest))
