"""What a term gets to see: the tokens it reads, and nothing else.

In a mixed batch a column may be missing (NaN) at tokens that no term needing it reads. Masking
such values after the arithmetic would be too late: 0 · NaN is NaN in the backward pass. So tokens
that a term does not read are taken out before its code runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.parts.base import Stats, Term


def as_read(term: Term, batch: PackedBatch, stats: Stats) -> tuple[PackedBatch, Stats]:
    """The batch and the statistics, reduced to the tokens that the term reads.

    A term over tokens reads those of its authors, and one over steps those at which a labelled
    step ends. A term over sequences or pairs reads whole sequences: one with a token by anybody
    else is left out.
    """
    kept_N = read_tokens(term, batch)
    if bool(kept_N.all()):
        return batch, stats
    return batch.only(kept_N), {stat: values_N[kept_N] for stat, values_N in stats.items()}


def read_tokens(term: Term, batch: PackedBatch) -> Tensor:
    """[N] bool: tokens that the term reads."""
    allowed_N = batch.where(term.readable)
    if term.unit == "token":
        return allowed_N
    if term.unit == "step":
        label_N = batch.columns.get(Column.STEP_LABEL)
        return allowed_N & (label_N >= 0) if label_N is not None else allowed_N & False
    whole_S = torch.ones(batch.num_sequences, dtype=torch.bool, device=allowed_N.device)
    whole_S[batch.sequence_N[~allowed_N]] = False
    return whole_S[batch.sequence_N]
