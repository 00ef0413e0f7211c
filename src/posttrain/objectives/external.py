"""The code of the terms in ``composition/external.py``.

Shape legend: ``N`` trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posttrain.composition.external import (
    AssumedCertainGradient,
    AssumedOwnGradient,
    ExplorationBonus,
)
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.values import Stats, TermCode, Values, capped_exp


def assumed_certain_gradient(
    term: AssumedCertainGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −p / (p + γ) A."""
    probability_N = stats[Stat.LOGPROB].exp()
    loss_N = -probability_N / (probability_N + term.gamma) * batch.columns[Column.ADVANTAGE]
    return Values(loss_N, {"probability": probability_N.detach()})


def assumed_own_gradient(term: AssumedOwnGradient, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −min(r A, clip(r) A)."""
    advantage_N = batch.columns[Column.ADVANTAGE]
    ratio_N = capped_exp(stats[Stat.LOGPROB] - batch.columns[Column.TRAINER_LOGPROB])
    gain_N = ratio_N * advantage_N
    kept_N = torch.minimum(
        gain_N, ratio_N.clamp(1 - term.clip_low, 1 + term.clip_high) * advantage_N
    )
    shown = {"ratio": ratio_N.detach(), "clipped": (kept_N < gain_N).float()}
    return Values(-kept_N, shown)


def exploration_bonus(term: ExplorationBonus, stats: Stats, batch: PackedBatch) -> Values:
    """[N] log π(y)."""
    return Values(stats[Stat.LOGPROB])


TERMS: Mapping[type[Config], TermCode] = {
    AssumedCertainGradient: TermCode(frozenset({Stat.LOGPROB}), assumed_certain_gradient),
    AssumedOwnGradient: TermCode(frozenset({Stat.LOGPROB}), assumed_own_gradient),
    ExplorationBonus: TermCode(frozenset({Stat.LOGPROB}), exploration_bonus),
}
