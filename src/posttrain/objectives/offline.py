"""The code of the terms in ``composition/offline.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posttrain.composition.offline import AdvantageWeighted, LeftoverLunch, RewardGold
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.values import Stats, TermCode, Values, sequence_sums


def advantage_weighted(term: AdvantageWeighted, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −min(e^{A/β}, w_max) log π(y)."""
    # Infinity, for a very small β, is clamped like any other large weight.
    weight_N = (batch.columns[Column.ADVANTAGE] / term.beta).exp().clamp(max=term.max_weight)
    capped_N = (weight_N >= term.max_weight).float()
    return Values(-weight_N * stats[Stat.LOGPROB], {"weight": weight_N, "capped": capped_N})


def leftover_lunch(term: LeftoverLunch, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −sg(clip(ρ)) max(A, 0) log π(y), or with ρ = 1 and + β (log π − log π_ref)."""
    logprob_N = stats[Stat.LOGPROB]
    weight_N = batch.columns[Column.ADVANTAGE].clamp_min(0)
    if term.ratio == "none":
        loss_N = -weight_N * logprob_N
        if term.kl_weight:
            penalty_N = logprob_N - batch.columns[Column.REFERENCE_LOGPROB]
            loss_N = loss_N + term.kl_weight * penalty_N
        return Values(loss_N, {"weight": weight_N})
    with torch.no_grad():
        log_ratio_N = logprob_N - batch.columns[Column.REFERENCE_LOGPROB]
        if term.ratio == "sequence":
            log_ratio_N = sequence_sums(log_ratio_N, batch)[batch.sequence_N]
        ratio_N = log_ratio_N.exp().clamp(1 - term.clip, 1 + term.clip)
    return Values(-ratio_N * weight_N * logprob_N, {"weight": weight_N, "ratio": ratio_N})


def reward_gold(term: RewardGold, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −sg(max(π(y), floor)) R log π(y)."""
    logprob_N = stats[Stat.LOGPROB]
    own_N = logprob_N.detach().exp().clamp_min(term.floor)
    weight_N = own_N * batch.columns[Column.REWARD][batch.sequence_N]
    return Values(-weight_N * logprob_N, {"weight": weight_N})


TERMS: Mapping[type[Config], TermCode] = {
    AdvantageWeighted: TermCode(frozenset({Stat.LOGPROB}), advantage_weighted),
    LeftoverLunch: TermCode(frozenset({Stat.LOGPROB}), leftover_lunch),
    RewardGold: TermCode(frozenset({Stat.LOGPROB}), reward_gold),
}
