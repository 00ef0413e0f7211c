"""The code of the terms in ``composition/supervised.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posttrain.composition.supervised import (
    BalancedCrossEntropy,
    CrossEntropy,
    DynamicCrossEntropy,
    ProbabilityLoss,
    ProximalCrossEntropy,
    WeightedCrossEntropy,
)
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.values import Stats, TermCode, Values, capped_exp


def cross_entropy(term: CrossEntropy, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −log π(y)."""
    return Values(-stats[Stat.LOGPROB])


def weighted_cross_entropy(term: WeightedCrossEntropy, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −w log π(y)."""
    weight_N = batch.columns[term.column][batch.sequence_N]
    return Values(-weight_N * stats[Stat.LOGPROB], {term.by: weight_N})


def dynamic_cross_entropy(term: DynamicCrossEntropy, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −sg(π(y)) log π(y)."""
    logprob_N = stats[Stat.LOGPROB]
    probability_N = logprob_N.detach().exp()
    return Values(-probability_N * logprob_N, {"probability": probability_N})


def balanced_cross_entropy(term: BalancedCrossEntropy, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −sg(p (1 − p)) log p."""
    logprob_N = stats[Stat.LOGPROB]
    probability_N = logprob_N.detach().exp()
    weight_N = probability_N * (1 - probability_N)
    return Values(-weight_N * logprob_N, {"probability": probability_N, "balance": weight_N})


def probability_loss(term: ProbabilityLoss, stats: Stats, batch: PackedBatch) -> Values:
    """[N] (1 − π(y)^α) / α above the threshold, else 0."""
    logprob_N = stats[Stat.LOGPROB]
    probability_N = logprob_N.detach().exp()
    # expm1 keeps small exponents exact: their limit is −log π.
    loss_N = -torch.expm1(term.alpha * logprob_N) / term.alpha if term.alpha else -logprob_N
    trusted_N = probability_N >= term.at_least
    loss_N = torch.where(trusted_N, loss_N, torch.zeros_like(loss_N))
    return Values(loss_N, {"probability": probability_N, "trusted": trusted_N.float()})


def proximal_cross_entropy(term: ProximalCrossEntropy, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −min(r, 1 + ε)."""
    log_ratio_N = stats[Stat.LOGPROB] - batch.columns[Column.TRAINER_LOGPROB]
    ratio_N = capped_exp(log_ratio_N)
    bound = 1 + term.clip_high
    shown = {"ratio": ratio_N.detach(), "clipped": (ratio_N > bound).float()}
    return Values(-ratio_N.clamp(max=bound), shown)


TERMS: Mapping[type[Config], TermCode] = {
    CrossEntropy: TermCode(frozenset({Stat.LOGPROB}), cross_entropy),
    WeightedCrossEntropy: TermCode(frozenset({Stat.LOGPROB}), weighted_cross_entropy),
    DynamicCrossEntropy: TermCode(frozenset({Stat.LOGPROB}), dynamic_cross_entropy),
    BalancedCrossEntropy: TermCode(frozenset({Stat.LOGPROB}), balanced_cross_entropy),
    ProbabilityLoss: TermCode(frozenset({Stat.LOGPROB}), probability_loss),
    ProximalCrossEntropy: TermCode(frozenset({Stat.LOGPROB}), proximal_cross_entropy),
}
