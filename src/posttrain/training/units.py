"""Which units a term reads: filtered by author, by sign of the reward, by entropy.

    batch ──as_read──▶ tokens of the term's authors ──selected_units──▶ mask over its units

In a mixed batch a column may be missing (NaN) at tokens that no term needing it reads. Masking
such values after the arithmetic is too late: 0 · NaN is NaN in the backward pass. So tokens that a
term does not read are removed before its code runs.

The masks do not depend on how a step is split into micro-batches: a reward belongs to a sequence,
and entropies are ranked within their sequence. The *number* of selected units does not depend on
the entropies, so a step's units can be counted before anything is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.parts.base import Limit, Stats, Term


def as_read(term: Term, batch: PackedBatch, stats: Stats) -> tuple[PackedBatch, Stats]:
    """The batch and the statistics, reduced to the tokens that the term reads.

    A term over tokens reads those of its authors, and one over steps those at which a labelled
    step ends. A term over sequences or pairs reads whole sequences: a sequence with a token by
    another author is left out.
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


def mask_units(term: Term, batch: PackedBatch) -> Tensor:
    """Bool mask over the units that the term reads: [N] tokens, [S] sequences, or [P] pairs.

    A sequence or pair counts only if all its trained tokens were written by the kinds in
    ``where``; a sequence without a trained token never counts.
    """
    allowed_N = batch.where(term.readable)
    if term.unit not in ("pair", "sequence"):
        return allowed_N
    barred_S = torch.zeros(batch.num_sequences, dtype=torch.bool, device=allowed_N.device)
    barred_S[batch.sequence_N[~allowed_N]] = True
    if term.unit == "sequence":
        trained_S = torch.zeros_like(barred_S)
        trained_S[batch.sequence_N] = True
        return trained_S & ~barred_S
    return ~barred_S[batch.pairs_P2].any(-1)


def selected_units(
    term: Term, batch: PackedBatch, *, entropy_N: Tensor | None = None
) -> Tensor | None:
    """Bool mask over the term's units, or None when the term has no limit.

    Args:
        term: the term, with its limit.
        batch: one micro-batch.
        entropy_N: [N] the policy's entropies. Without them the mask has the right number of
            tokens in every sequence, and serves for counting only.
    """
    limit = term.limit
    if limit == Limit():
        return None
    keep = mask_units(term, batch)
    if not bool(keep.any()):
        return keep  # a micro-batch of other authors may not have the columns
    if limit.rewards != "any":
        positive_S = batch.columns[Column.REWARD] > 0
        wanted_S = positive_S if limit.rewards == "positive" else ~positive_S
        keep = keep & (wanted_S[batch.sequence_N] if term.unit == "token" else wanted_S)
    if limit.preference != "any":
        sign = 1 if limit.preference == "chosen" else -1
        wanted_S = batch.columns[Column.PREFERENCE] * sign > 0
        keep = keep & (wanted_S[batch.sequence_N] if term.unit == "token" else wanted_S)
    if limit.marked:
        keep = keep & (batch.columns[Column.MARK] > 0)
    if limit.entropy_share is not None:
        if entropy_N is None:
            entropy_N = torch.zeros(len(batch.target_N), device=keep.device)
        keep = top_entropy(entropy_N, keep, batch.sequence_N, share=limit.entropy_share)
    return keep


def top_entropy(
    entropy_N: Tensor, readable_N: Tensor, sequence_N: Tensor, *, share: float
) -> Tensor:
    """[N] bool: the ⌈share · n⌉ readable tokens of highest entropy in every sequence.

    Of equal entropies the earlier token comes first.

    Example:
        >>> entropy, sequence = torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.tensor([0, 0, 0, 1])
        >>> top_entropy(entropy, torch.ones(4, dtype=torch.bool), sequence, share=0.34).tolist()
        [False, True, True, True]
    """
    num_readable_S = sequence_N[readable_N].bincount(minlength=1 + _largest(sequence_N))
    # Minus 1e-9: ceil(0.1 * 30) must not become 4 by rounding.
    quota_S = (num_readable_S.double() * share - 1e-9).ceil()
    ranked_N = torch.where(readable_N, entropy_N.detach(), -torch.inf)
    by_entropy_N = ranked_N.argsort(descending=True, stable=True)
    order_N = by_entropy_N[sequence_N[by_entropy_N].argsort(stable=True)]
    sizes_S = sequence_N.bincount(minlength=len(num_readable_S))
    starts_S = sizes_S.cumsum(0) - sizes_S
    rank_N = torch.empty_like(sequence_N)
    places_N = torch.arange(len(sequence_N), device=sequence_N.device)
    rank_N[order_N] = places_N - starts_S[sequence_N[order_N]]
    return readable_N & (rank_N < quota_S[sequence_N])


def _largest(sequence_N: Tensor) -> int:
    return int(sequence_N.max()) if len(sequence_N) else 0
