"""The code of the terms in ``composition/preference.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F

from posttrain.batch import PackedBatch
from posttrain.composition.preference import PairwiseLogistic
from posttrain.config import Config
from posttrain.head import Stat
from posttrain.objectives.values import Stats, TermCode, Values, sequence_sums
from posttrain.trajectory import Column


def pairwise_logistic(term: PairwiseLogistic, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    rho_S = sequence_sums(stats[Stat.LOGPROB] - batch.columns[Column.REFERENCE_LOGPROB], batch)
    margin_P = term.beta * (rho_S[batch.pairs_P2[:, 0]] - rho_S[batch.pairs_P2[:, 1]])
    eps = term.label_smoothing
    loss_P = -(1 - eps) * F.logsigmoid(margin_P) - eps * F.logsigmoid(-margin_P)
    margin = margin_P.detach()
    return Values(loss_P, {"margin": margin, "accuracy": (margin > 0).float()})


TERMS: Mapping[type[Config], TermCode] = {
    PairwiseLogistic: TermCode(frozenset({Stat.LOGPROB}), pairwise_logistic),
}
