"""The code of the term in ``composition/values.py``.

Shape legend: ``N`` trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posttrain.composition.values import ValueLoss
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.values import Stats, TermCode, Values


def value_loss(term: ValueLoss, stats: Stats, batch: PackedBatch) -> Values:
    """[N] ½ max((V − R)², (clip(V, V_old ± ε) − R)²)."""
    value_N, return_N = stats[Stat.VALUE], batch.columns[Column.RETURN]
    plain_N = (value_N - return_N).square()
    shown = {"error": (value_N - return_N).abs()}
    if term.clip is None:
        return Values(plain_N / 2, shown)
    old_N = batch.columns[Column.OLD_VALUE]
    held_N = torch.clamp(value_N, old_N - term.clip, old_N + term.clip)
    clipped_N = (held_N - return_N).square()
    loss_N = torch.maximum(plain_N, clipped_N)
    return Values(loss_N / 2, {**shown, "clipped": (clipped_N > plain_N).float()})


TERMS: Mapping[type[Config], TermCode] = {
    ValueLoss: TermCode(frozenset({Stat.VALUE}), value_loss),
}
