"""Reduction of values per token or pair to one number. The only place that normalises losses.

Every term is divided by its own *global* count, over all micro-batches of an optimiser step.
Splitting a step into more micro-batches therefore changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.numerics.batch import PackedBatch
from posttrain.parts.base import Term
from posttrain.training.units import mask_units


def per_unit(term: Term) -> bool:
    """True when the term is divided by the number of units; False for that of sequences."""
    return term.aggregate not in ("sequence_mean", "sequence_sum")


def count_units(
    term: Term, batches: Sequence[PackedBatch], *, keep: Sequence[Tensor | None] = ()
) -> int:
    """How many tokens, sequences or pairs the term averages over in this step.

    ``keep`` holds an additional mask over units per batch, from ``units.selected_units``.
    """
    total = 0
    for batch, kept in zip(batches, keep or [None] * len(batches), strict=True):
        mask = mask_units(term, batch)
        if kept is not None:
            mask = mask & kept
        if per_unit(term):
            total += int(mask.sum())
        else:
            total += int(batch.sequence_N[mask].unique().numel())
    return total


def reduce_units(
    term: Term,
    values: Tensor,
    batch: PackedBatch,
    *,
    count: int,
    keep: Tensor | None = None,
    shown: bool = False,
) -> Tensor:
    """This micro-batch's share of the term: the sum over its units divided by the global count.

    Args:
        term: decides the mask and the aggregation.
        values: [N] or [P], one per unit.
        batch: where the values come from.
        count: from :func:`count_units` over *all* micro-batches of the step.
        keep: an additional mask over units, from ``units.selected_units``.
        shown: True for a metric, which is averaged where the loss is summed.
    """
    mask = mask_units(term, batch)
    if keep is not None:
        mask = mask & keep
    if count == 0:
        return values.sum() * 0.0
    # torch.where, not a product: a masked value may be infinite, and inf * 0 is NaN.
    kept = torch.where(mask, values, torch.zeros_like(values))
    if per_unit(term) or (term.aggregate == "sequence_sum" and not shown):
        return kept.sum() / count
    lengths_S = torch.zeros(batch.num_sequences, device=values.device)
    lengths_S.index_add_(0, batch.sequence_N, mask.float())
    return (kept / lengths_S[batch.sequence_N].clamp_min(1)).sum() / count
