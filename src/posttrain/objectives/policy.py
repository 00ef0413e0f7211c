"""The code of the terms in ``composition/policy.py``.

Losses per sequence return their value at every token of the sequence; averaged over the tokens
of a sequence it is itself again.

Shape legend: ``N`` trained tokens, ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from posttrain.composition.policy import (
    ClippedPolicyGradient,
    ClippedWeightPolicyGradient,
    GeometricPolicyGradient,
    PolicyGradient,
    SequencePolicyGradient,
    ShapedWeightPolicyGradient,
    SoftGatedPolicyGradient,
)
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives import policy_regularisers
from posttrain.objectives.policy_ratio import (
    log_ratio,
    sequence_advantages,
    sequence_means,
    weighed,
)
from posttrain.objectives.values import Stats, TermCode, Values, capped_exp, sequence_sums


def policy_gradient(term: PolicyGradient, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −r A."""
    log_ratio_N = log_ratio(term.mismatch, stats, batch)
    loss_N = -capped_exp(log_ratio_N) * batch.columns[Column.ADVANTAGE]
    return weighed(term.mismatch, loss_N, _shown(log_ratio_N), batch)


def clipped_policy_gradient(
    term: ClippedPolicyGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −min(r A, clip(r) A), with the second bound and the sequence mask if asked for."""
    advantage_N = batch.columns[Column.ADVANTAGE]
    log_ratio_N = log_ratio(term.mismatch, stats, batch)
    ratio_N = capped_exp(log_ratio_N)
    gain_N = ratio_N * advantage_N
    kept_N = torch.minimum(
        gain_N, ratio_N.clamp(1 - term.clip_low, 1 + term.clip_high) * advantage_N
    )
    held_N = kept_N < gain_N
    if term.dual_clip is not None:
        floor_N = term.dual_clip * advantage_N
        beyond_N = (advantage_N < 0) & (kept_N < floor_N)
        kept_N, held_N = torch.where(beyond_N, floor_N, kept_N), held_N | beyond_N
    shown = {**_shown(log_ratio_N), "clipped": held_N.float()}
    if term.sequence_mask is not None:
        left_S = sequence_means(-log_ratio_N.detach(), batch) > term.sequence_mask
        masked_N = left_S[batch.sequence_N] & (advantage_N < 0)
        kept_N = torch.where(masked_N, torch.zeros_like(kept_N), kept_N)
        shown["masked"] = masked_N.float()
    return weighed(term.mismatch, -kept_N, shown, batch)


def sequence_policy_gradient(
    term: SequencePolicyGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −min(s A, clip(s) A) of the token's sequence."""
    advantage_S = sequence_advantages(batch)
    log_ratio_N = log_ratio(term.mismatch, stats, batch)
    ratio_S = capped_exp(sequence_means(log_ratio_N, batch))
    gain_S = ratio_S * advantage_S
    kept_S = torch.minimum(
        gain_S, ratio_S.clamp(1 - term.clip_low, 1 + term.clip_high) * advantage_S
    )
    held_S = (kept_S < gain_S).float()
    shown = {**_shown(log_ratio_N), "clipped": held_S[batch.sequence_N]}
    return weighed(term.mismatch, -kept_S[batch.sequence_N], shown, batch)


def geometric_policy_gradient(
    term: GeometricPolicyGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −A exp(mean of clipped log r) of the token's sequence."""
    advantage_S = sequence_advantages(batch)
    log_ratio_N = log_ratio(term.mismatch, stats, batch)
    clipped_N = torch.where(
        advantage_S[batch.sequence_N] > 0,
        log_ratio_N.clamp(max=term.clip_high),
        log_ratio_N.clamp(min=-term.clip_low),
    )
    loss_S = -advantage_S * capped_exp(sequence_means(clipped_N, batch))
    shown = {**_shown(log_ratio_N), "clipped": (clipped_N != log_ratio_N).float()}
    return weighed(term.mismatch, loss_S[batch.sequence_N], shown, batch)


def clipped_weight_policy_gradient(
    term: ClippedWeightPolicyGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −sg(clamp(r)) A log π."""
    log_ratio_N = log_ratio(term.mismatch, stats, batch)
    ratio_N = log_ratio_N.detach().exp()
    weight_N = ratio_N.clamp(term.ratio_low, term.ratio_high)
    loss_N = -weight_N * batch.columns[Column.ADVANTAGE] * stats[Stat.SAMPLED_LOGPROB]
    shown = {**_shown(log_ratio_N), "clipped": (weight_N != ratio_N).float()}
    return weighed(term.mismatch, loss_N, shown, batch)


def soft_gated_policy_gradient(
    term: SoftGatedPolicyGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −(4/τ) σ(τ (r − 1)) A."""
    advantage_N = batch.columns[Column.ADVANTAGE]
    log_ratio_N = log_ratio(term.mismatch, stats, batch)
    tau_N = torch.where(advantage_N > 0, term.temperature_up, term.temperature_down)
    gate_N = 4 / tau_N * torch.sigmoid(tau_N * (capped_exp(log_ratio_N) - 1))
    return weighed(term.mismatch, -gate_N * advantage_N, _shown(log_ratio_N), batch)


def shaped_weight_policy_gradient(
    term: ShapedWeightPolicyGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −sg(W^k e^{λ(1−W)}) A log π."""
    advantage_N = batch.columns[Column.ADVANTAGE]
    log_ratio_N = log_ratio(term.mismatch, stats, batch)
    log_w_N = sequence_sums(log_ratio_N.detach(), batch)[batch.sequence_N]
    up_N = advantage_N > 0
    k_N = torch.where(up_N, term.up[0], term.down[0])
    lambda_N = torch.where(up_N, term.up[1], term.down[1])
    # In log space: where W overflows, the weight is exp(-inf) = 0.
    weight_N = (k_N * log_w_N + lambda_N * (1 - log_w_N.exp())).exp()
    loss_N = -weight_N * advantage_N * stats[Stat.SAMPLED_LOGPROB]
    shown = {**_shown(log_ratio_N), "sequence_weight": weight_N}
    return weighed(term.mismatch, loss_N, shown, batch)


def _shown(log_ratio_N: Tensor) -> dict[str, Tensor]:
    log_ratio_N = log_ratio_N.detach()
    return {"ratio": capped_exp(log_ratio_N), "policy_shift": -log_ratio_N}


_READS = frozenset({Stat.SAMPLED_LOGPROB, Stat.ENTROPY})

TERMS: Mapping[type[Config], TermCode] = {
    PolicyGradient: TermCode(_READS, policy_gradient),
    ClippedPolicyGradient: TermCode(_READS, clipped_policy_gradient),
    SequencePolicyGradient: TermCode(_READS, sequence_policy_gradient),
    GeometricPolicyGradient: TermCode(_READS, geometric_policy_gradient),
    ClippedWeightPolicyGradient: TermCode(_READS, clipped_weight_policy_gradient),
    SoftGatedPolicyGradient: TermCode(_READS, soft_gated_policy_gradient),
    ShapedWeightPolicyGradient: TermCode(_READS, shaped_weight_policy_gradient),
    **policy_regularisers.TERMS,
}
