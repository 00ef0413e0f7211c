"""The code of the terms in ``composition/preference.py``.

Every loss on pairs is a function of two numbers per pair, one for each side: a :class:`Sides`.

Shape legend: ``N`` trained tokens, ``S`` sequences, ``P`` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.composition.preference import (
    BinaryClassifier,
    ContrastiveLogistic,
    OddsRatio,
    PairwiseAnchored,
    PairwiseDiscovered,
    PairwiseDivergence,
    PairwiseExact,
    PairwiseHinge,
    PairwiseLogistic,
    PairwiseMean,
    PairwiseNoiseContrastive,
    PairwiseRobust,
    PairwiseSelfPlay,
    PairwiseShared,
    PairwiseSquared,
    PairwiseTransport,
    PairwiseWeighted,
    ProspectValue,
    TargetMargin,
    TransportedReward,
)
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.values import Stats, TermCode, Values, capped_exp, sequence_sums


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """One number per pair, [P], for the chosen and for the rejected answer."""

    chosen: Tensor
    rejected: Tensor

    @property
    def gap(self) -> Tensor:
        """[P] chosen minus rejected."""
        return self.chosen - self.rejected

    def map(self, function: Callable[[Tensor], Tensor]) -> Sides:
        """The same function of both sides."""
        return Sides(function(self.chosen), function(self.rejected))


# --- what the losses are functions of --------------------------------------------------------


def log_ratio_N(stats: Stats, batch: PackedBatch) -> Tensor:
    """[N] log π − log π_ref."""
    return stats[Stat.LOGPROB] - batch.columns[Column.REFERENCE_LOGPROB]


def sums(values_N: Tensor, batch: PackedBatch) -> Sides:
    """Sums over each answer's trained tokens."""
    per_S = sequence_sums(values_N, batch)
    return Sides(per_S[batch.pairs_P2[:, 0]], per_S[batch.pairs_P2[:, 1]])


def means(values_N: Tensor, batch: PackedBatch) -> Sides:
    """Means over each answer's trained tokens."""
    total, length = sums(values_N, batch), sums(torch.ones_like(values_N), batch)
    return Sides(total.chosen / length.chosen, total.rejected / length.rejected)


def shared_sums(values_N: Tensor, batch: PackedBatch, *, tail: float) -> Sides:
    """Sums in which tokens beyond the shorter answer's length count ``tail``."""
    lengths_S = batch.sequence_N.bincount(minlength=batch.num_sequences)
    starts_S = lengths_S.cumsum(0) - lengths_S
    shared_P = lengths_S[batch.pairs_P2].min(-1).values

    def side(sequence_P: Tensor) -> Tensor:
        # One entry per (pair, token of this side): a sequence may stand in several pairs.
        length_P = lengths_S[sequence_P]
        pair_E = torch.arange(len(length_P), device=length_P.device).repeat_interleave(length_P)
        first_P = length_P.cumsum(0) - length_P
        place_E = torch.arange(len(pair_E), device=pair_E.device) - first_P[pair_E]
        value_E = values_N[starts_S[sequence_P][pair_E] + place_E]
        counted_E = torch.where(place_E < shared_P[pair_E], value_E, tail * value_E)
        return value_E.new_zeros(len(length_P)).index_add(0, pair_E, counted_E)

    return Sides(side(batch.pairs_P2[:, 0]), side(batch.pairs_P2[:, 1]))


def _paired(loss_P: Tensor, margin_P: Tensor, sides: Sides) -> Values:
    """With what tells apart "chosen up" from "both down, rejected faster"."""
    margin_P = margin_P.detach()
    shown = {
        "margin": margin_P,
        "accuracy": (margin_P > 0).float(),
        "chosen": sides.chosen.detach(),
        "rejected": sides.rejected.detach(),
    }
    return Values(loss_P, shown)


# --- pairs, relative to a reference ----------------------------------------------------------


def pairwise_logistic(term: PairwiseLogistic, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    z, eps = term.beta * rho.gap, term.label_smoothing
    return _paired(-(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z), z, rho)


def pairwise_robust(term: PairwiseRobust, stats: Stats, batch: PackedBatch) -> Values:
    """[P] [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    z, eps = term.beta * rho.gap, term.flip_rate
    loss = (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)
    return _paired(loss, z, rho)


def pairwise_squared(term: PairwiseSquared, stats: Stats, batch: PackedBatch) -> Values:
    """[P] (ρ̄_w − ρ̄_l − 1/(2τ))²."""
    rho = means(log_ratio_N(stats, batch), batch)
    return _paired((rho.gap - 1 / (2 * term.tau)).square(), rho.gap, rho)


def pairwise_hinge(term: PairwiseHinge, stats: Stats, batch: PackedBatch) -> Values:
    """[P] max(0, 1 − βΔ)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    z = term.beta * rho.gap
    return _paired((1 - z).relu(), z, rho)


def pairwise_exact(term: PairwiseExact, stats: Stats, batch: PackedBatch) -> Values:
    """[P] q log(q / (1−ε)) + (1−q) log((1−q) / ε), q = σ(βΔ)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    z, eps = term.beta * rho.gap, term.label_smoothing
    loss = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-eps))
    loss = loss + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(eps))
    return _paired(loss, z, rho)


def pairwise_noise_contrastive(
    term: PairwiseNoiseContrastive, stats: Stats, batch: PackedBatch
) -> Values:
    """[P] −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    r = rho.map(lambda side: term.beta * side)
    down = F.logsigmoid(-r.chosen) + F.logsigmoid(-r.rejected)
    return _paired(-F.logsigmoid(r.chosen) - 0.5 * down, r.gap, rho)


def pairwise_self_play(term: PairwiseSelfPlay, stats: Stats, batch: PackedBatch) -> Values:
    """[P] (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))²."""
    rho = sums(log_ratio_N(stats, batch), batch)
    half = 1 / (2 * term.beta)
    loss = (rho.chosen - half).square() + (rho.rejected + half).square()
    return _paired(loss, term.beta * rho.gap, rho)


def pairwise_anchored(term: PairwiseAnchored, stats: Stats, batch: PackedBatch) -> Values:
    """[P] zero: 1 − σ(r_w) + σ(r_l); down: σ(r_w) + 1 − σ(r_w − r_l)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    r = rho.map(lambda side: term.beta * side)
    if term.direction == "zero":
        loss = (-r.chosen).sigmoid() + r.rejected.sigmoid()
    else:
        loss = r.chosen.sigmoid() + (-r.gap).sigmoid()
    return _paired(loss, r.gap, rho)


def pairwise_divergence(term: PairwiseDivergence, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(β f'(e^{ρ_w}) − β f'(e^{ρ_l}))."""

    def derivative(rho_P: Tensor) -> Tensor:
        if term.divergence == "js":
            return F.logsigmoid(rho_P)
        alpha = 1.0 if term.alpha is None else term.alpha  # forward KL is the end of the family
        return -capped_exp(-alpha * rho_P) / alpha

    rho = sums(log_ratio_N(stats, batch), batch)
    z = term.beta * rho.map(derivative).gap
    return _paired(-F.logsigmoid(z), z, rho)


def pairwise_mean(term: PairwiseMean, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(β(ρ̄_w − ρ̄_l))."""
    rho = means(log_ratio_N(stats, batch), batch)
    z = term.beta * rho.gap
    return _paired(-F.logsigmoid(z), z, rho)


def pairwise_shared(term: PairwiseShared, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(βΔ), tokens beyond the shorter answer's length counting ``tail``."""
    rho = shared_sums(log_ratio_N(stats, batch), batch, tail=term.tail)
    z = term.beta * rho.gap
    return _paired(-F.logsigmoid(z), z, rho)


def pairwise_weighted(term: PairwiseWeighted, stats: Stats, batch: PackedBatch) -> Values:
    """[P] min(1, w_w w_l) · −log σ(βΔ)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    z = term.beta * rho.gap
    with torch.no_grad():
        sure = means(stats[Stat.LOGPROB] - stats[Stat.LOG_COLLISION], batch)
        weight_P = (sure.chosen + sure.rejected).clamp(max=0).exp()
    values = _paired(-weight_P * F.logsigmoid(z), z, rho)
    return Values(values.loss, {**values.shown, "pair_weight": weight_P})


def pairwise_discovered(term: PairwiseDiscovered, stats: Stats, batch: PackedBatch) -> Values:
    """[P] (1−m) · −log σ(z) + m e^{−z}, z = βΔ, m = σ(z/τ)."""
    rho = sums(log_ratio_N(stats, batch), batch)
    z = term.beta * rho.gap
    m = (z / term.tau).sigmoid()
    return _paired(-(1 - m) * F.logsigmoid(z) + m * capped_exp(-z), z, rho)


def pairwise_transport(term: PairwiseTransport, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(β(m − q))."""
    logp = sums(stats[Stat.LOGPROB], batch)
    z = term.beta * (logp.gap - batch.columns[Column.QUANTILE][batch.pairs_P2[:, 0]])
    return _paired(-F.logsigmoid(z), z, logp)


# --- pairs, without a reference --------------------------------------------------------------


def odds_ratio(term: OddsRatio, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(log odds_w − log odds_l)."""
    logp = means(stats[Stat.LOGPROB], batch)
    # 1 − p̄ would be 0 for an answer that is certain: a millionth is left to the others.
    other = logp.map(lambda side: (-torch.expm1(side.clamp(max=-1e-6))).log())
    z = logp.gap - other.gap
    return _paired(-F.logsigmoid(z), z, logp)


def contrastive_logistic(term: ContrastiveLogistic, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(β(log π(y_w) − log π(y_l)))."""
    logp = sums(stats[Stat.LOGPROB], batch)
    z = term.beta * logp.gap
    return _paired(-F.logsigmoid(z), z, logp)


def target_margin(term: TargetMargin, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(β(r_w − r_l) − γ), r the mean log-prob m, or (1 − e^{−αm})/α."""

    def reward(mean_P: Tensor) -> Tensor:
        if term.alpha == 0:
            return mean_P
        return (1 - capped_exp(-term.alpha * mean_P)) / term.alpha

    logp = means(stats[Stat.LOGPROB], batch)
    z = term.beta * logp.map(reward).gap
    return _paired(-F.logsigmoid(z - term.gamma), z, logp)


# --- answers judged one by one ---------------------------------------------------------------


def _judged(loss_S: Tensor, reward_S: Tensor, label_S: Tensor) -> Values:
    right_S = (reward_S.detach() * label_S > 0).float()
    return Values(loss_S, {"reward": reward_S.detach(), "accuracy": right_S})


def prospect_value(term: ProspectValue, stats: Stats, batch: PackedBatch) -> Values:
    """[S] λ (1 − σ(β · label · (ρ − z₀)))."""
    rho_S = sequence_sums(log_ratio_N(stats, batch), batch)
    label_S = batch.columns[Column.LABEL].sign()
    baseline_S = batch.columns[Column.MISMATCHED_KL].clamp(min=0)
    gain_S = term.beta * (rho_S - baseline_S)
    weights = rho_S.new_tensor([term.undesirable_weight, term.desirable_weight])
    values = _judged((-label_S * gain_S).sigmoid() * weights[(label_S > 0).long()], gain_S, label_S)
    return Values(values.loss, {**values.shown, "kl_baseline": baseline_S})


def binary_classifier(term: BinaryClassifier, stats: Stats, batch: PackedBatch) -> Values:
    """[S] −log σ(label · (r − δ)), r = βρ."""
    rho_S = sequence_sums(log_ratio_N(stats, batch), batch)
    label_S = batch.columns[Column.LABEL].sign()
    logit_S = term.beta * (rho_S - batch.columns[Column.LOG_RATIO_CENTRE])
    return _judged(-F.logsigmoid(label_S * logit_S), logit_S, label_S)


def transported_reward(term: TransportedReward, stats: Stats, batch: PackedBatch) -> Values:
    """[S] −log σ(β · sign · (ρ − q)), its gradient doubled."""
    rho_S = sequence_sums(log_ratio_N(stats, batch), batch)
    sign_S = batch.columns[Column.PREFERENCE].sign()
    z_S = term.beta * sign_S * (rho_S - batch.columns[Column.QUANTILE])
    cost_S = -F.logsigmoid(z_S)
    return _judged(2 * cost_S - cost_S.detach(), term.beta * rho_S, sign_S)


_LOGPROB = frozenset({Stat.LOGPROB})
TERMS: Mapping[type[Config], TermCode] = {
    PairwiseLogistic: TermCode(_LOGPROB, pairwise_logistic),
    PairwiseRobust: TermCode(_LOGPROB, pairwise_robust),
    PairwiseSquared: TermCode(_LOGPROB, pairwise_squared),
    PairwiseHinge: TermCode(_LOGPROB, pairwise_hinge),
    PairwiseExact: TermCode(_LOGPROB, pairwise_exact),
    PairwiseNoiseContrastive: TermCode(_LOGPROB, pairwise_noise_contrastive),
    PairwiseSelfPlay: TermCode(_LOGPROB, pairwise_self_play),
    PairwiseAnchored: TermCode(_LOGPROB, pairwise_anchored),
    PairwiseDivergence: TermCode(_LOGPROB, pairwise_divergence),
    PairwiseMean: TermCode(_LOGPROB, pairwise_mean),
    PairwiseShared: TermCode(_LOGPROB, pairwise_shared),
    PairwiseWeighted: TermCode(_LOGPROB | {Stat.LOG_COLLISION}, pairwise_weighted),
    PairwiseDiscovered: TermCode(_LOGPROB, pairwise_discovered),
    PairwiseTransport: TermCode(_LOGPROB, pairwise_transport),
    TransportedReward: TermCode(_LOGPROB, transported_reward),
    OddsRatio: TermCode(_LOGPROB, odds_ratio),
    ContrastiveLogistic: TermCode(_LOGPROB, contrastive_logistic),
    TargetMargin: TermCode(_LOGPROB, target_margin),
    ProspectValue: TermCode(_LOGPROB, prospect_value),
    BinaryClassifier: TermCode(_LOGPROB, binary_classifier),
}
