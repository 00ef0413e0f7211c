"""Terms that compare the policy's next-token distribution with a teacher's, token by token.

    teacher_distribution ──TEACHER_IDS, TEACHER_LOGPROBS──┐
    policy ──logits───────────────────────────────────────┴─▶ divergence [N] ─▶ teacher_forward_kl …
    foreign_teacher ──TEACHER_SORTED, TEACHER_ALIGNED───────▶ sorted L1 [N] ──▶ teacher_sorted_l1

π is the policy, π_T the teacher. Every term takes the full vocabulary or the teacher's top-k; with
a top-k the rest of the vocabulary is one more outcome, "any other token". Merging outcomes never
increases an f-divergence, so each is then a lower bound of the full one, and still zero when both
agree. ``temperature`` τ softens both sides first (π^(1/τ), renormalised) and needs the full
vocabulary; gradients shrink about as 1/τ², which a weight of τ² compensates (arXiv 1503.02531).

The divergences are computed in :mod:`posttrain.numerics.divergence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from posttrain.core.bounds import NonNegative, Positive, Share
from posttrain.core.errors import ConfigError
from posttrain.core.lazy import torch
from posttrain.core.statistics import Divergence, DivergenceKind, Wanted
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, StageContext, Stats, TokenTerm, Values
from posttrain.parts.registry import part, tag_of

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch

TEACHER = frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS})
FORWARD = Divergence(DivergenceKind.FORWARD_KL)
REVERSE = Divergence(DivergenceKind.REVERSE_KL)
BY_RANK = Divergence(DivergenceKind.SORTED_L1)
LEAST_REST = 1e-10
"""Minimum probability outside a teacher's top-k, which may sum to 1."""


class TeacherDivergence(TokenTerm):
    """Base class of losses that compare the next-token distribution with a teacher's."""

    temperature: Positive = 1.0

    kind: ClassVar[DivergenceKind]
    needs: ClassVar[Columns] = TEACHER
    by_divergence: ClassVar[bool] = True
    name_shown: ClassVar[str] = "divergence"

    @property
    def coefficient(self) -> float:
        """The β or α of the divergence, if it has one."""
        return 0.0

    @property
    def divergence(self) -> Divergence:
        """The divergence that the output head computes at every token."""
        return Divergence(self.kind, coefficient=self.coefficient, temperature=self.temperature)

    @property
    def reads(self) -> frozenset[Wanted]:
        """The divergence."""
        return frozenset({self.divergence})

    def check(self, at: StageContext) -> None:
        """A temperature needs the full vocabulary: the tokens outside a top-k are unknown."""
        tops = [s.num_entries for s in at.signals if s.num_entries]
        if tops and self.temperature != 1:
            raise at.refuse(
                f"{tag_of(self)} at temperature {self.temperature} with a teacher's top "
                f"{min(tops)}",
                expected="temperature 1, or the full vocabulary: what a temperature does to the "
                "tokens that the teacher left out is not known",
                fix="drop top_k, or drop temperature",
            )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] the divergence over the next token."""
        values_N = stats[self.divergence]
        return Values(values_N, {self.name_shown: values_N.detach()})


@part
class TeacherForwardKL(TeacherDivergence):
    """Σ_v π_T(v) log(π_T(v) / π(v)): knowledge distillation (arXiv 1503.02531).

    Mode-covering.
    """

    formula: ClassVar[str] = "sum_v pi_T(v) log(pi_T(v) / pi(v))"
    paper: ClassVar[str] = "1503.02531"
    kind: ClassVar[DivergenceKind] = DivergenceKind.FORWARD_KL
    name_shown: ClassVar[str] = "kl"


@part
class TeacherReverseKL(TeacherDivergence):
    """Σ_v π(v) log(π(v) / π_T(v)) (MiniLLM, GKD; arXiv 2306.13649).

    Mode-seeking.
    """

    formula: ClassVar[str] = "sum_v pi(v) log(pi(v) / pi_T(v))"
    paper: ClassVar[str] = "2306.13649"
    kind: ClassVar[DivergenceKind] = DivergenceKind.REVERSE_KL
    name_shown: ClassVar[str] = "kl"


@part
class TeacherJensenShannon(TeacherDivergence):
    """β KL(π_T ‖ M) + (1−β) KL(π ‖ M), M = β π_T + (1−β) π (GKD, arXiv 2306.13649).

    It goes to 0 as β → 0 (divided by β: to the forward KL) and as β → 1 (divided by 1−β: to the
    reverse KL). At exactly 0 and 1 it is the forward and the reverse KL, as in GKD's code: the
    scale jumps there, so a learning rate tuned at β = 0.1 does not transfer to β = 0.
    """

    beta: Share = 0.5

    formula: ClassVar[str] = (
        "beta KL(pi_T || M) + (1-beta) KL(pi || M), M = beta pi_T + (1-beta) pi"
    )
    paper: ClassVar[str] = "2306.13649"
    kind: ClassVar[DivergenceKind] = DivergenceKind.JENSEN_SHANNON

    @property
    def coefficient(self) -> float:
        """β."""
        return self.beta


class SkewedKL(TeacherDivergence):
    """A KL to a mixture with a share α of its first argument."""

    alpha: Share = 0.1

    at_zero: ClassVar[str]  # the term that it equals at α = 0
    paper: ClassVar[str] = "2402.03898"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(
                f"alpha={self.alpha}",
                expected="above 0 and below 1",
                fix=f"alpha 0 is {self.at_zero}",
            )

    @property
    def coefficient(self) -> float:
        """α."""
        return self.alpha


@part
class TeacherSkewKL(SkewedKL):
    """KL(π_T ‖ α π_T + (1−α) π) (DistiLLM, arXiv 2402.03898): at most −log α for any π."""

    formula: ClassVar[str] = "KL(pi_T || alpha pi_T + (1-alpha) pi)"
    kind: ClassVar[DivergenceKind] = DivergenceKind.SKEW_KL
    at_zero: ClassVar[str] = "teacher_forward_kl"


@part
class TeacherSkewReverseKL(SkewedKL):
    """KL(π ‖ (1−α) π_T + α π) (DistiLLM, arXiv 2402.03898): at most −log α for any π."""

    formula: ClassVar[str] = "KL(pi || (1-alpha) pi_T + alpha pi)"
    kind: ClassVar[DivergenceKind] = DivergenceKind.SKEW_REVERSE_KL
    at_zero: ClassVar[str] = "teacher_reverse_kl"


@part
class TeacherTotalVariation(TeacherDivergence):
    """½ Σ_v |π_T(v) − π(v)|, from 0 to 1 (f-divergence distillation, arXiv 2307.15190)."""

    formula: ClassVar[str] = "1/2 sum_v |pi_T(v) - pi(v)|"
    paper: ClassVar[str] = "2307.15190"
    kind: ClassVar[DivergenceKind] = DivergenceKind.TOTAL_VARIATION


@part
class EntropyAwareKL(TokenTerm):
    """KL(π ‖ π_T), plus KL(π_T ‖ π) where the teacher's entropy is above ``threshold`` nats.

    Where the teacher's entropy is high, the reverse KL alone would collapse to one of its modes
    (arXiv 2603.07079). With a top-k the entropy is that of the merged outcomes.
    """

    threshold: NonNegative = 0.8

    formula: ClassVar[str] = "KL(pi || pi_T) + [H(pi_T) > threshold] KL(pi_T || pi)"
    paper: ClassVar[str] = "2603.07079"
    needs: ClassVar[Columns] = TEACHER
    reads: ClassVar[frozenset[Wanted]] = frozenset({FORWARD, REVERSE})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] reverse KL, plus forward KL where the teacher's entropy is high."""
        teacher_NK = batch.columns[Column.TEACHER_LOGPROBS]
        rest_N = (1 - teacher_NK.exp().sum(-1)).clamp_min(LEAST_REST)
        entropy_N = -(teacher_NK.exp() * teacher_NK).sum(-1) - rest_N * rest_N.log()
        unsure_N = entropy_N > self.threshold
        loss_N = stats[REVERSE] + torch.where(unsure_N, stats[FORWARD], 0.0)
        return Values(loss_N, {"kl": stats[REVERSE].detach(), "unsure": unsure_N.float()})


@part
class TeacherSortedL1(TokenTerm):
    """Σ_i |π_(i) − π_T(i)|, both sorted from the largest: ULD across tokenizers (2402.12030).

    Only the shapes of the distributions are compared, not which token is likely: use it with
    another term (the paper: cross-entropy + 1.5 times this). It is computed where both
    tokenizations have a boundary after the same text and is 0 elsewhere; those tokens count in the
    mean. The paper pairs the i-th tokens even if different text precedes them.
    """

    weight: NonNegative = 1.5

    formula: ClassVar[str] = "sum_i |pi_(i) - pi_T(i)|, both sorted"
    paper: ClassVar[str] = "2402.12030"
    needs: ClassVar[Columns] = frozenset({Column.TEACHER_SORTED, Column.TEACHER_ALIGNED})
    reads: ClassVar[frozenset[Wanted]] = frozenset({BY_RANK})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] L1 of sorted probabilities where the teacher has read the same text."""
        aligned_N = batch.columns[Column.TEACHER_ALIGNED]
        return Values(aligned_N * stats[BY_RANK], {"aligned": aligned_N})
