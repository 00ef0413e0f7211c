"""Terms that compare the policy's next-token distribution with a teacher's, token by token.

π is the policy, π_T the teacher. Every term takes the full vocabulary or the teacher's top-k; with
a top-k the rest of the vocabulary is one more outcome, "any other token". An f-divergence never
grows when outcomes are merged, so each is then a lower bound of the full one, and still zero when
both agree. ``temperature`` τ softens both sides first (π^(1/τ), renormalised) and needs the full
vocabulary; gradients shrink about as 1/τ², which a weight of τ² undoes (arXiv 1503.02531).

The code behind a term is in ``objectives/distillation.py``, the formulas in ``divergence.py``.
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition.base import ANYONE, Aggregate, Term
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column

TEACHER = frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS})


class TeacherForwardKL(Term, tag="teacher_forward_kl", tag_field="type"):
    """Σ_v π_T(v) log(π_T(v) / π(v)): knowledge distillation (arXiv 1503.02531).

    Covers whatever the teacher might say.
    """

    temperature: float = 1.0
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = TEACHER
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)


class TeacherReverseKL(Term, tag="teacher_reverse_kl", tag_field="type"):
    """Σ_v π(v) log(π(v) / π_T(v)) (MiniLLM, GKD; arXiv 2306.13649).

    Avoids whatever the teacher would not say.
    """

    temperature: float = 1.0
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = TEACHER
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)


class TeacherJensenShannon(Term, tag="teacher_jensen_shannon", tag_field="type"):
    """β KL(π_T ‖ M) + (1−β) KL(π ‖ M), M = β π_T + (1−β) π (GKD, arXiv 2306.13649).

    It goes to 0 as β → 0 (divided by β: to the forward KL) and as β → 1 (divided by 1−β: to the
    reverse KL). At exactly 0 and 1 it is the forward and the reverse KL, as in GKD's code: the
    scale jumps there, so a learning rate found at β = 0.1 is not one for β = 0.
    """

    beta: float = 0.5
    temperature: float = 1.0
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = TEACHER
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"beta={self.beta}", expected="from 0 (forward KL) to 1 (reverse KL)")


class TeacherSkewKL(Term, tag="teacher_skew_kl", tag_field="type"):
    """KL(π_T ‖ α π_T + (1−α) π) (DistiLLM, arXiv 2402.03898): at most −log α, whatever π is."""

    alpha: float = 0.1
    temperature: float = 1.0
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = TEACHER
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_alpha(self.alpha, "teacher_forward_kl")


class TeacherSkewReverseKL(Term, tag="teacher_skew_reverse_kl", tag_field="type"):
    """KL(π ‖ (1−α) π_T + α π) (DistiLLM, arXiv 2402.03898): at most −log α, whatever π is."""

    alpha: float = 0.1
    temperature: float = 1.0
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = TEACHER
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_alpha(self.alpha, "teacher_reverse_kl")


class TeacherTotalVariation(Term, tag="teacher_total_variation", tag_field="type"):
    """½ Σ_v |π_T(v) − π(v)|, from 0 to 1 (f-divergence distillation, arXiv 2307.15190)."""

    temperature: float = 1.0
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = TEACHER
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)


class EntropyAwareKL(Term, tag="entropy_aware_kl", tag_field="type"):
    """KL(π ‖ π_T), plus KL(π_T ‖ π) where the teacher's entropy is above ``threshold`` nats.

    Where the teacher is unsure the reverse KL alone would settle on one of its answers (arXiv
    2603.07079). With a top-k the entropy is that of the merged outcomes.
    """

    threshold: float = 0.8
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = TEACHER
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ConfigError(f"threshold={self.threshold}", expected="0 nats or more")


class TeacherSortedL1(Term, tag="teacher_sorted_l1", tag_field="type"):
    """Σ_i |π_(i) − π_T(i)|, both sorted from the largest: ULD across tokenizers (2402.12030).

    Only the shapes of the distributions are compared, not which token is likely: use it beside
    another term (the paper: cross-entropy + 1.5 times this). It is read where both tokenizations
    have a boundary after the same text and is 0 elsewhere; those tokens count in the mean. The
    paper pairs the i-th tokens whatever they follow.
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 1.5
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.TEACHER_SORTED, Column.TEACHER_ALIGNED})
    accepts: ClassVar[frozenset[Kind]] = ANYONE


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature}", expected="above 0; 1 changes nothing")


def _check_alpha(alpha: float, at_zero: str) -> None:
    if not 0 < alpha < 1:
        raise ConfigError(
            f"alpha={alpha}", expected="above 0 and below 1", fix=f"alpha 0 is {at_zero}"
        )


DistillationTerm = (
    TeacherForwardKL
    | TeacherReverseKL
    | TeacherJensenShannon
    | TeacherSkewKL
    | TeacherSkewReverseKL
    | TeacherTotalVariation
    | EntropyAwareKL
    | TeacherSortedL1
)

Softened = (
    TeacherForwardKL
    | TeacherReverseKL
    | TeacherJensenShannon
    | TeacherSkewKL
    | TeacherSkewReverseKL
    | TeacherTotalVariation
)
"""Terms with a temperature."""
