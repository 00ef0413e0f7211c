"""Distillation with a teacher's distribution as the target."""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from posttrain.core.bounds import (
    Count,
    Inner,
    NonNegative,
    Number,
    Positive,
    Rate,
    Share,
    Size,
    Tokens,
)
from posttrain.core.errors import ConfigError
from posttrain.core.learner import MOVING, MovingReference
from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.parts.base import Aggregate, PolicyRef, Source, Term, WeightSchedule
from posttrain.parts.composition import Composition, Method
from posttrain.parts.distillation.divergences import (
    EntropyAwareKL,
    SkewedKL,
    TeacherForwardKL,
    TeacherJensenShannon,
    TeacherReverseKL,
    TeacherSkewKL,
    TeacherSkewReverseKL,
    TeacherSortedL1,
    TeacherTotalVariation,
)
from posttrain.parts.distillation.foreign import ForeignTeacher
from posttrain.parts.distillation.teachers import TeacherDistribution
from posttrain.parts.policy.shapes import rollouts
from posttrain.parts.registry import part
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.mix import Mix
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy

ANSWER_SHOWN = "{question}\nThe correct answer is {answer}. Answer in your own words."
DEMONSTRATION_SHOWN = (
    "{question}\nThis is an example of a response to the question:\n{answer}\n"
    "Now answer with a response of your own."
)
SUCCESS_SHOWN = (
    "{question}\nThis answer to the question was correct:\n{success}\n"
    "Now solve the question in your own words."
)


class OnTasks(Method):
    """Methods on task sets: prompts, group size and decoding."""

    tasks: tuple[str, ...]
    group_size: Size = 1
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()

    tendency: ClassVar[str] = "reshaping or consolidation"
    interface: ClassVar[str] = "teacher targets"


@part
class SeqKd(OnTasks):
    """Sequence-level distillation: cross-entropy on a teacher's answers."""

    teacher: PolicyRef
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    formula: ClassVar[str] = "-log pi(y_t), y ~ pi_teacher"
    paper: ClassVar[str] = "1606.07947"

    def compose(self) -> Composition:
        """Rollouts of the teacher; no signals; cross-entropy."""
        source = rollouts(self, policy=self.teacher)
        return Composition(source=source, terms=(CrossEntropy(aggregate=self.aggregate),))


@part
class Kd(Method):
    """Logit distillation: the teacher's distribution at every token of given answers.

    With ``temperature`` τ the loss is multiplied by τ², so that its gradient keeps its scale.
    """

    data: Dataset
    teachers: dict[str, PolicyRef]
    temperature: Positive = 1.0
    top_k: Count | None = None
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "teacher targets"
    tendency: ClassVar[str] = "consolidation"
    formula: ClassVar[str] = "tau^2 KL(pi_teacher || pi) per token, both at temperature tau"
    paper: ClassVar[str] = "1503.02531"

    def compose(self) -> Composition:
        """Data set; teacher distributions; forward KL."""
        term = TeacherForwardKL(
            temperature=self.temperature, weight=self.temperature**2, aggregate=self.aggregate
        )
        signal = TeacherDistribution(routes=self.teachers, top_k=self.top_k)
        return Composition(source=self.data, signals=(signal,), terms=(term,))


class OnOwnRollouts(OnTasks):
    """Methods in which teachers score the learner's rollouts with their distributions."""

    teachers: dict[str, PolicyRef]
    top_k: Count | None = None
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "on-policy"


def _graded(method: OnOwnRollouts, term: Term) -> Composition:
    """Live rollouts; the distributions of the method's teachers; the term."""
    signal = TeacherDistribution(routes=method.teachers, top_k=method.top_k)
    return Composition(source=rollouts(method), signals=(signal,), terms=(term,))


@part
class Opd(OnOwnRollouts):
    """On-policy distillation: the teacher scores every token of the learner's own rollouts.

    Several teachers, each for its own task sets, make it MOPD (arXiv 2601.02780):
    ``teachers: {sums: path:adder, "*": base}``.
    """

    formula: ClassVar[str] = "KL(pi || pi_teacher) per token, on samples of pi"
    paper: ClassVar[str] = "2306.13649"

    def compose(self) -> Composition:
        """Live rollouts; teacher distributions routed by task set; reverse KL."""
        return _graded(self, TeacherReverseKL(aggregate=self.aggregate))


@part
class EntropyAwareOpd(OnOwnRollouts):
    """OPD that adds the forward KL where the teacher's entropy is high.

    Unconfirmed: read at second hand; the threshold's unit and the second part's weight are ours.
    """

    top_k: Count | None = 16
    threshold: NonNegative = 0.8

    formula: ClassVar[str] = "KL(pi || pi_T) + [H(pi_T) > threshold] KL(pi_T || pi)"
    paper: ClassVar[str] = "2603.07079"

    def compose(self) -> Composition:
        """Live rollouts; teacher distributions; both KLs."""
        term = EntropyAwareKL(threshold=self.threshold, aggregate=self.aggregate)
        return _graded(self, term)


@part
class TvDistillation(OnOwnRollouts):
    """Total variation to a teacher on the learner's own rollouts: a bounded loss per token.

    The paper adds a second half on the teacher's own samples; here there is the learner's only.

    Unconfirmed: the divergence is standard; its use in the paper is from general knowledge.
    """

    formula: ClassVar[str] = "1/2 sum_v |pi_teacher - pi|, on samples of pi"
    paper: ClassVar[str] = "2307.15190"

    def compose(self) -> Composition:
        """Live rollouts; teacher distributions; total variation."""
        return _graded(self, TeacherTotalVariation(aggregate=self.aggregate))


class OnMix(OnTasks):
    """Methods on a share ``own`` of the learner's own rollouts, the rest given answers.

    1 is rollouts only, 0 is data only.
    """

    teachers: dict[str, PolicyRef]
    data: Dataset | None = None
    own: Share = 0.5
    top_k: Count | None = None
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        if not 0 <= self.own <= 1 or (self.own < 1) != (self.data is not None):
            raise ConfigError(
                f"own={self.own} with {'data' if self.data else 'no data'}",
                expected="a share of rollouts from 0 to 1, and data exactly when it is below 1",
            )


def _graded_mix(method: OnMix, term: Term) -> Composition:
    """A mix of data and live rollouts; the distributions of the method's teachers; the term."""
    signal = TeacherDistribution(routes=method.teachers, top_k=method.top_k)
    source = mixed(method.data, rollouts(method), own=method.own)
    return Composition(source=source, signals=(signal,), terms=(term,))


@part
class Gkd(OnMix):
    """Generalised distillation: a share λ of the learner's own rollouts, the rest given answers.

    ``own`` is λ: 1 is rollouts only, 0 is data only. ``beta`` goes from the forward KL at 0 to the
    reverse KL at 1; between them the loss is smaller, see teacher_jensen_shannon.
    """

    beta: Share = 0.5

    formula: ClassVar[str] = (
        "beta KL(pi_T || M) + (1-beta) KL(pi || M), M = beta pi_T + (1-beta) pi"
    )
    paper: ClassVar[str] = "2306.13649"

    def compose(self) -> Composition:
        """A mix of data and live rollouts; teacher distributions; generalised Jensen-Shannon."""
        return _graded_mix(self, TeacherJensenShannon(beta=self.beta, aggregate=self.aggregate))


@part
class Distillm(OnMix):
    """Skewed KL on a mix of given answers and the learner's own rollouts.

    The paper also replays old rollouts and adapts their share; here rollouts are on-policy, and
    the share is fixed.
    """

    alpha: Inner = 0.1
    reverse: bool = True

    formula: ClassVar[str] = "KL(pi || (1-alpha) pi_T + alpha pi); or KL(pi_T || alpha pi_T + ...)"
    paper: ClassVar[str] = "2402.03898"

    def compose(self) -> Composition:
        """A mix of data and live rollouts; teacher distributions; a skew KL."""
        kind = TeacherSkewReverseKL if self.reverse else TeacherSkewKL
        return _graded_mix(self, kind(alpha=self.alpha, aggregate=self.aggregate))


@part
class Distillm2(OnTasks):
    """Raises the likelihood of the teacher's answers, lowers that of the learner's.

    Skew KL on the teacher's rollouts with weight 2 − β, skew reverse KL on the learner's with β,
    and β changing from ``beta`` to ``beta_end``. The paper also adapts α per sample; here it is
    constant. Each half is averaged over its own tokens.

    In the authors' code no gradient flows through the mixture of the skew reverse KL; here one
    does, as its definition has it. β goes to 1.5 there too.

    Unconfirmed: the formula is that of the authors' code; the paper was not opened.
    """

    teacher: PolicyRef
    alpha: Inner = 0.1
    beta: Positive = 1.0
    beta_end: Positive = 1.5
    top_k: Count | None = None
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "mixed"
    formula: ClassVar[str] = "(2-beta) SKL on y ~ pi_T, plus beta SRKL on y ~ pi"
    paper: ClassVar[str] = "2503.07067"

    def __post_init__(self) -> None:
        if not (0 < self.beta < 2 and 0 < self.beta_end < 2 and self.beta != self.beta_end):
            raise ConfigError(
                f"distillm2 with beta={self.beta}, beta_end={self.beta_end}",
                expected="two different numbers between 0 and 2",
            )

    def compose(self) -> Composition:
        """Half teacher, half learner; teacher distributions; one skew KL on each."""
        first, last = self.beta, self.beta_end
        raised = _skewed(self, TeacherSkewKL, Kind.TEACHER, weight=2 - first, end=2 - last)
        lowered = _skewed(self, TeacherSkewReverseKL, Kind.LEARNER, weight=first, end=last)
        parts = (rollouts(self, policy=self.teacher), rollouts(self))
        return Composition(
            source=Mix(parts=parts, shares=(0.5, 0.5)),
            signals=(TeacherDistribution(routes={"*": self.teacher}, top_k=self.top_k),),
            terms=(raised, lowered),
        )


def _skewed(
    method: Distillm2,
    kind: type[SkewedKL],
    author: Kind,
    *,
    weight: float,
    end: float,
) -> Term:
    """A skew KL on the tokens of one of the two, with a weight schedule."""
    return kind(
        alpha=method.alpha,
        aggregate=method.aggregate,
        weight=weight,
        weight_schedule=WeightSchedule(end=end),
        where=(author,),
    )


@part
class Uld(OnTasks):
    """Distillation from a teacher with another tokenizer, by sorted probabilities.

    Cross-entropy on given answers, and on the learner's own rollouts the L1 distance of sorted
    probabilities where both tokenizers have a boundary. The paper compares on the given answers,
    token by token from the start, even if different text precedes them.
    """

    teacher: PolicyRef
    data: Dataset
    own: Share = 0.5
    top_k: Count = 100
    weight: NonNegative = 1.5
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "mixed"
    formula: ClassVar[str] = "-log pi(y_t) on data, + weight sum_i |pi_(i) - pi_T(i)| on rollouts"
    paper: ClassVar[str] = "2402.12030"

    def compose(self) -> Composition:
        """Data and live rollouts; a foreign teacher on the rollouts; both losses."""
        by_rank = TeacherSortedL1(
            weight=self.weight, aggregate=self.aggregate, where=(Kind.LEARNER,)
        )
        written = CrossEntropy(aggregate=self.aggregate, where=(self.data.author,))
        return Composition(
            source=mixed(self.data, rollouts(self), own=self.own),
            signals=(ForeignTeacher(teacher=self.teacher, top_k=self.top_k),),
            terms=(written, by_rank),
        )


class Privileged(OnTasks):
    """Methods whose teacher has a privileged context."""

    teacher: PolicyRef = "input"
    top_k: Count | None = None
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "on-policy"
    tendency: ClassVar[str] = "reshaping, or consolidation of what a prompt can do"


@part
class ContextDistillation(Privileged):
    """Distils a policy with an instruction in its prompt into the policy without it.

    On the learner's own rollouts (OPCD, arXiv 2602.12275); its first form (2209.15189) imitates
    the instructed policy's answers, which is seq_kd from such data.
    """

    context: str

    formula: ClassVar[str] = "KL(pi(. | x) || pi_teacher(. | context, x)), on samples of pi"
    paper: ClassVar[str] = "2602.12275"

    def compose(self) -> Composition:
        """Live rollouts; the distribution of a teacher with more context; reverse KL."""
        return _privileged(self, self.context, TeacherReverseKL(aggregate=self.aggregate))


@part
class Opsd(Privileged):
    """On-policy self-distillation: the teacher is the policy with the right answer in context.

    The teacher is the frozen input of the stage; ``teacher: learner`` uses the current weights.

    Unconfirmed: the divergence and its ``beta``, the paper was not opened.
    """

    context: str = ANSWER_SHOWN
    beta: Share = 0.5

    formula: ClassVar[str] = "JSD_beta(pi_teacher(. | x, answer), pi(. | x)), on samples of pi"
    paper: ClassVar[str] = "2601.18734"

    def compose(self) -> Composition:
        """Live rollouts; the distribution of a teacher with more context; Jensen-Shannon."""
        term = TeacherJensenShannon(beta=self.beta, aggregate=self.aggregate)
        return _privileged(self, self.context, term)


@part
class Sdft(Privileged):
    """Self-distillation fine-tuning: the teacher is the learner with a demonstration in context.

    The demonstration is the task's ``answer``. The teacher is a moving average of the learner
    (``rate`` per step); ``teacher: learner`` is the learner at every draw, and any other policy
    is frozen.

    The divergence is the paper's reverse KL, over the whole vocabulary: ``beta`` 1 of the
    Jensen-Shannon family. A fork of the authors' code has the forward KL (``beta: 0``), and leaves
    out the first 3 tokens of an answer, which is not offered; TRL has ``beta`` 0.5, ``rate`` 0.05.

    Unconfirmed: the default of ``rate``, which is that fork's.
    """

    teacher: PolicyRef = MOVING
    rate: Rate = 0.01
    context: str = DEMONSTRATION_SHOWN
    beta: Share = 1.0

    formula: ClassVar[str] = "KL(pi(. | x) || pi_ema(. | x, demonstration)), on samples of pi"
    paper: ClassVar[str] = "2601.19897"

    def compose(self) -> Composition:
        """Live rollouts; the learner's own distribution after a demonstration; reverse KL."""
        term = TeacherJensenShannon(beta=self.beta, aggregate=self.aggregate)
        return _privileged(self, self.context, term, rate=self.rate)


@part
class Sdpo(Privileged):
    """Self-distillation policy optimisation: the teacher reads a successful answer of the group.

    The teacher, a moving average of the learner, reads the first other answer of the group with a
    reward of at least ``success``; answers without one are left out. The paper also shows textual
    feedback of an environment; here there are only rewards.

    The authors' code compares the learner's 100 likeliest tokens, and bounds the importance ratio
    by 2. Here they are the teacher's, and there is no ratio, which is 1 at a draw's first update.
    """

    teacher: PolicyRef = MOVING
    rate: Rate = 0.05
    group_size: Size = 8
    success: Number = 1.0
    top_k: Count | None = 100
    context: str = SUCCESS_SHOWN
    beta: Share = 0.5

    interface: ClassVar[str] = "verifier reward, then teacher targets"
    formula: ClassVar[str] = "JSD_beta(pi_ema(. | x, a sibling that succeeded), pi(. | x))"
    paper: ClassVar[str] = "2601.20802"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"sdpo with group_size={self.group_size}",
                expected="at least 2: a single answer has no sibling",
            )

    def compose(self) -> Composition:
        """Live rollouts; verifier; a moving teacher with a sibling in context; Jensen-Shannon."""
        term = TeacherJensenShannon(beta=self.beta, aggregate=self.aggregate)
        plain = _privileged(self, self.context, term, rate=self.rate, success=self.success)
        return replace(plain, signals=(Verify(), *plain.signals))


def _privileged(
    method: Privileged, context: str, term: Term, *, rate: float = 1.0, success: float = 1.0
) -> Composition:
    signal = TeacherDistribution(
        routes={"*": method.teacher}, top_k=method.top_k, context=context, success=success
    )
    moving = MovingReference(rate=rate) if method.teacher == MOVING else None
    return Composition(source=rollouts(method), signals=(signal,), terms=(term,), moving=moving)


def mixed(data: Dataset | None, drawn: Rollouts, *, own: float) -> Source:
    """A share ``own`` of rollouts, the rest data; only one of the two at 1 and 0."""
    if data is None:
        return drawn
    if own == 0:
        return data
    return Mix(parts=(data, drawn), shares=(1 - own, own))
