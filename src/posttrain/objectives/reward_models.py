"""The code of the terms in ``composition/reward_models.py``.

Shape legend: ``N`` trained tokens, ``S`` sequences, ``P`` pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from posttrain.composition.reward_models import BradleyTerry, OutcomeClassifier, StepClassifier
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.values import Stats, TermCode, Values, sequence_sums


def last_scores(stats: Stats, batch: PackedBatch) -> Tensor:
    """[S] the score after the last trained token of each sequence."""
    ones_N = torch.ones_like(batch.sequence_N)
    # A sequence's tokens stand together and in order.
    lasts_S = sequence_sums(ones_N, batch).cumsum(0) - 1
    return stats[Stat.SCORE][lasts_S.clamp_min(0)]


def bradley_terry(term: BradleyTerry, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −log σ(s_w − s_l − m) + η (s_w + s_l)²."""
    score_P2 = last_scores(stats, batch)[batch.pairs_P2]
    gap_P, sum_P = score_P2[:, 0] - score_P2[:, 1], score_P2.sum(-1)
    if term.margin == "column":
        margin_P = batch.columns[Column.MARGIN][batch.pairs_P2[:, 0]]
    else:
        margin_P = torch.full_like(gap_P, term.margin)
    loss_P = -F.logsigmoid(gap_P - margin_P) + term.centring * sum_P.square()
    shown = {"accuracy": (gap_P > 0).float(), "gap": gap_P, "mean_score": sum_P / 2}
    return Values(loss_P, shown)


def outcome_bce(term: OutcomeClassifier, stats: Stats, batch: PackedBatch) -> Values:
    """[N] the loss of each token's sequence, or of each token."""
    if term.target == "label":
        target_S = (batch.columns[Column.LABEL] + 1) / 2
    else:
        target_S = batch.columns[Column.REWARD].clamp(0, 1)
    target_N = target_S[batch.sequence_N]
    if term.at == "last":
        score_N = last_scores(stats, batch)[batch.sequence_N]
    else:
        score_N = stats[Stat.SCORE]
    return _classified(score_N, target_N)


def step_bce(term: StepClassifier, stats: Stats, batch: PackedBatch) -> Values:
    """[N] the loss at the end of each step: the term sees no other tokens."""
    return _classified(stats[Stat.SCORE], batch.columns[Column.STEP_LABEL])


def _classified(score_N: Tensor, target_N: Tensor) -> Values:
    target_N = target_N.to(score_N.dtype)
    loss_N = F.binary_cross_entropy_with_logits(score_N, target_N, reduction="none")
    right_N = (score_N > 0) == (target_N > 0.5)
    return Values(loss_N, {"accuracy": right_N.float(), "mean_target": target_N})


_SCORE = frozenset({Stat.SCORE})

TERMS: Mapping[type[Config], TermCode] = {
    BradleyTerry: TermCode(_SCORE, bradley_terry),
    OutcomeClassifier: TermCode(_SCORE, outcome_bce),
    StepClassifier: TermCode(_SCORE, step_bce),
}
