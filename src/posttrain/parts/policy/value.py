"""The loss that trains a learned value.

    REWARD, TOKEN_REWARD ─┐
                          ├─gae──▶ ADVANTAGE ──▶ policy gradient
    value head (live) ────┘  └───▶ OLD_VALUE, RETURN ──▶ value_loss ──▶ value head

The value V_t is the expected return before token t is generated.

Shape legend: ``N`` trained tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from posttrain.core.bounds import Positive
from posttrain.core.lazy import torch
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, Stats, TokenTerm, Values
from posttrain.parts.registry import part

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch


@part
class ValueLoss(TokenTerm):
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), V the value head before each token.

    The loss of PPO's critic (arXiv 1707.06347). R is ``RETURN`` and V_old ``OLD_VALUE``, both
    constants. The clipped branch keeps the critic within ε of its value before the update, as in
    PPO's reference code; ``clip: null`` is the plain squared error.
    """

    clip: Positive | None = 0.2

    formula: ClassVar[str] = "max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2"
    paper: ClassVar[str] = "1707.06347"
    needs: ClassVar[Columns] = frozenset({Column.RETURN, Column.OLD_VALUE})
    reads: ClassVar[frozenset[Wanted]] = frozenset({Stat.VALUE})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] ½ max((V − R)², (clip(V, V_old ± ε) − R)²)."""
        value_N, return_N = stats[Stat.VALUE], batch.columns[Column.RETURN]
        plain_N = (value_N - return_N).square()
        shown = {"error": (value_N - return_N).abs()}
        if self.clip is None:
            return Values(plain_N / 2, shown)
        old_N = batch.columns[Column.OLD_VALUE]
        held_N = torch.clamp(value_N, old_N - self.clip, old_N + self.clip)
        clipped_N = (held_N - return_N).square()
        loss_N = torch.maximum(plain_N, clipped_N)
        return Values(loss_N / 2, {**shown, "clipped": (clipped_N > plain_N).float()})
