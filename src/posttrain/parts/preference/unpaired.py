"""Losses on answers labelled good or bad, and on two samples of answers.

    LABEL, MISMATCHED_KL ──▶ kto            PREFERENCE, QUANTILE ──▶ aot_unpaired
    LABEL, LOG_RATIO_CENTRE ──▶ bco

Throughout, ρ = log π(y) − log π_ref(y) summed over an answer's trained tokens, w the chosen and l
the rejected answer. Shape legend: ``S`` sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from posttrain.core.bounds import Positive
from posttrain.core.lazy import F
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, PolicyRef, Signal, Stats, Term, Unit, Values
from posttrain.parts.preference.ranking import LogRatioCentre, MatchQuantiles, MismatchedKL
from posttrain.parts.preference.shapes import OnLabels, OnPairs
from posttrain.parts.preference.sides import judged, log_ratio_N
from posttrain.parts.registry import part
from posttrain.parts.tensors import sequence_sums

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch


class UnpairedTerm(Term):
    """A loss on answers labelled good or bad. Every answer has equal weight."""

    unit: ClassVar[Unit] = "sequence"
    aggregate: ClassVar[str] = "per_sequence"


@part(method=OnLabels)
class Kto(UnpairedTerm):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): gains and losses from a zero point.

    Good answers λ_D (1 − σ(β(ρ − z₀))), bad ones λ_U (1 − σ(β(z₀ − ρ))). z₀ = max(0, mean ρ of
    other prompts' answers) comes from the ``mismatched_kl`` signal and carries no gradient. With
    n_D good and n_U bad answers, keep n_D λ_D / (n_U λ_U) between 1 and 4/3 (the paper's advice).

    Draws need at least two prompts: the zero point is over answers to other prompts.
    """

    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0

    formula: ClassVar[str] = "w (1 - s(beta label (rho - z0))), z0 = max(0, mismatched rho)"
    paper: ClassVar[str] = "2402.01306"
    needs: ClassVar[Columns] = frozenset(
        {Column.REFERENCE_LOGPROB, Column.LABEL, Column.MISMATCHED_KL}
    )

    def signals(self, reference: PolicyRef) -> tuple[Signal, ...]:
        """The signal of the zero point."""
        return (MismatchedKL(policy=reference),)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[S] λ (1 − σ(β · label · (ρ − z₀)))."""
        rho_S = sequence_sums(log_ratio_N(stats, batch), batch)
        label_S = batch.columns[Column.LABEL].sign()
        baseline_S = batch.columns[Column.MISMATCHED_KL].clamp(min=0)
        gain_S = self.beta * (rho_S - baseline_S)
        weights = rho_S.new_tensor([self.undesirable_weight, self.desirable_weight])
        values = judged(
            (-label_S * gain_S).sigmoid() * weights[(label_S > 0).long()], gain_S, label_S
        )
        return Values(values.loss, {**values.shown, "kl_baseline": baseline_S})


@part(method=OnLabels)
class Bco(UnpairedTerm):
    """Binary classifier optimisation (arXiv 2404.04656): the log-ratio is the classifier's logit.

    −log σ(r − δ) on good answers, −log σ(δ − r) on bad ones, r = βρ. δ/β comes from the
    ``log_ratio_centre`` signal: half the sum of the mean ρ of good and of bad answers of the draw.
    TRL keeps a running mean of δ over steps, which would need state across a resume; here it is
    that of the draw alone, and noisier on small draws.

    Unconfirmed: a library's document and its code disagree on the formula; this is the code's.
    """

    beta: Positive = 0.01

    formula: ClassVar[str] = "-log s(label (beta rho - delta)), delta between good and bad"
    paper: ClassVar[str] = "2404.04656"
    needs: ClassVar[Columns] = frozenset(
        {Column.REFERENCE_LOGPROB, Column.LABEL, Column.LOG_RATIO_CENTRE}
    )

    def signals(self, reference: PolicyRef) -> tuple[Signal, ...]:
        """The signal of the classifier's threshold."""
        return (LogRatioCentre(),)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[S] −log σ(label · (r − δ)), r = βρ."""
        rho_S = sequence_sums(log_ratio_N(stats, batch), batch)
        label_S = batch.columns[Column.LABEL].sign()
        logit_S = self.beta * (rho_S - batch.columns[Column.LOG_RATIO_CENTRE])
        return judged(-F.logsigmoid(label_S * logit_S), logit_S, label_S)


@part(method=OnPairs)
class AotUnpaired(UnpairedTerm):
    """Optimal transport between all chosen and all rejected answers of a draw (arXiv 2406.05882).

    −log σ(β · sign · (ρ − q)), with q the log-ratio of the same rank on the other side, of any
    prompt: a constant, from ``match_quantiles`` of rewards. Both sides have equal size, since they
    come in pairs. The mean over answers has the value and the gradient of the mean over matched
    pairs of −log σ(β(ρ_w − ρ_l)): the gradient is doubled, since each side moves one of the two.
    """

    beta: Positive = 0.01

    formula: ClassVar[str] = "-log s(beta (rho_w_(i) - rho_l_(i))), rho_(i) the i-th smallest"
    paper: ClassVar[str] = "2406.05882"
    needs: ClassVar[Columns] = frozenset(
        {Column.PREFERENCE, Column.QUANTILE, Column.REFERENCE_LOGPROB}
    )

    def signals(self, reference: PolicyRef) -> tuple[Signal, ...]:
        """Ranks of rewards."""
        return (MatchQuantiles(of="rewards"),)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[S] −log σ(β · sign · (ρ − q)), its gradient doubled."""
        rho_S = sequence_sums(log_ratio_N(stats, batch), batch)
        sign_S = batch.columns[Column.PREFERENCE].sign()
        z_S = self.beta * sign_S * (rho_S - batch.columns[Column.QUANTILE])
        cost_S = -F.logsigmoid(z_S)
        return judged(2 * cost_S - cost_S.detach(), self.beta * rho_S, sign_S)
