"""What the policy losses share: ratios, sequence means, and the weight against a mismatch.

Shape legend: ``N`` trained tokens, ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.composition.policy import Mismatch
from posttrain.core.errors import LegalityError
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.values import Stats, Values, sequence_sums


def log_ratio(mismatch: Mismatch | None, stats: Stats, batch: PackedBatch) -> Tensor:
    """[N] log π minus the sampler's log-prob, or the trainer's where a mismatch is corrected."""
    old = Column.TRAINER_LOGPROB if mismatch else Column.BEHAVIOUR_LOGPROB
    return stats[Stat.SAMPLED_LOGPROB] - batch.columns[old]


def sequence_means(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[S] means over each sequence's trained tokens; 0 for one without any."""
    lengths_S = sequence_sums(torch.ones_like(values_N), batch)
    return sequence_sums(values_N, batch) / lengths_S.clamp_min(1)


def sequence_advantages(batch: PackedBatch) -> Tensor:
    """[S] the advantage of each sequence.

    Raises:
        LegalityError: tokens of one sequence have different advantages.
    """
    advantage_N = batch.columns[Column.ADVANTAGE]
    advantage_S = torch.zeros(
        batch.num_sequences, dtype=advantage_N.dtype, device=advantage_N.device
    )
    advantage_S[batch.sequence_N] = advantage_N
    if not torch.equal(advantage_S[batch.sequence_N], advantage_N):
        raise LegalityError(
            "tokens of one sequence with different advantages, in a loss per sequence",
            expected="one advantage per sequence",
            fix="credit outcome in group_advantage; no clip_covariance; or a loss per token",
        )
    return advantage_S


def mismatch_weight(mismatch: Mismatch, batch: PackedBatch) -> Tensor:
    """[N] the correction, a constant: both log-probs are columns."""
    log_w = batch.columns[Column.TRAINER_LOGPROB] - batch.columns[Column.BEHAVIOUR_LOGPROB]
    if mismatch.level == "sequence":
        log_w = sequence_sums(log_w, batch)[batch.sequence_N]
    elif mismatch.level == "geometric":
        log_w = sequence_means(log_w, batch)[batch.sequence_N]
    weight_N = log_w.exp()
    if mismatch.outside == "truncate":
        return weight_N.clamp(max=mismatch.high)
    inside_N = (weight_N >= (mismatch.low or 0.0)) & (weight_N <= mismatch.high)
    kept_N = weight_N if mismatch.outside == "mask" else torch.ones_like(weight_N)
    # where, not a product: a sequence's ratio may be infinite, and inf * 0 is NaN.
    return torch.where(inside_N, kept_N, torch.zeros_like(kept_N))


def weighed(
    mismatch: Mismatch | None, loss_N: Tensor, shown: Mapping[str, Tensor], batch: PackedBatch
) -> Values:
    """The loss, corrected if asked for; the correction is shown."""
    if mismatch is None:
        return Values(loss_N, shown)
    weight_N = mismatch_weight(mismatch, batch)
    return Values(weight_N * loss_N, {**shown, "correction": weight_N})
