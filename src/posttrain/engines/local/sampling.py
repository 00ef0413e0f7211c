"""Sampling tokens: one uniform number per row, through the inverse CDF of its distribution.

Shape legend: ``R`` rows, ``V`` vocabulary, ``B`` blocks of it, ``W`` tokens of a block,
``U`` ids that no token has.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posttrain.core.provenance import Sampling

BLOCK = 128
"""Neighbouring tokens whose probabilities are summed before the exact sums in double precision."""


def sample(
    logits_RV: Tensor,
    sampling: Sampling,
    uniform_R: Tensor,
    *,
    unused_U: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a token per row by inverting its CDF at ``uniform_R`` (double) in [0, 1).

    Log-probs are those of the sampled distribution: after temperature and truncation. A token of
    probability 0 is never sampled. Greedy rows (temperature 0) have log-prob 0, since that
    distribution is one point.

    Ids in ``unused_U`` are never sampled, and are no part of what truncation keeps. Without
    truncation the log-prob is still the softmax's over all ids: the one that training computes.

    Returns:
        token ids [R] int64, and their log-probs [R] float32.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]]).repeat(2, 1)
        >>> tokens, logprobs = sample(logits, Sampling(), torch.tensor([0.2, 0.7]).double())
        >>> tokens.tolist(), [round(v, 4) for v in logprobs.tolist()]
        ([0, 1], [-0.6931, -0.6931])
    """
    if sampling.temperature == 0:
        return _without(logits_RV, unused_U).argmax(-1), torch.zeros_like(logits_RV[:, 0])
    scaled_RV = logits_RV if sampling.temperature == 1 else logits_RV / sampling.temperature
    if sampling.is_truncated:
        scaled_RV = _truncate(_without(scaled_RV, unused_U).log_softmax(-1), sampling)
    prob_RV = scaled_RV.softmax(-1)
    if unused_U is not None:
        prob_RV.index_fill_(-1, unused_U, 0.0)  # the others keep theirs
    token_R = _invert(prob_RV, uniform_R)
    return token_R, prob_RV.gather(-1, token_R[:, None])[:, 0].log()


def _without(logits_RV: Tensor, unused_U: Tensor | None) -> Tensor:
    return logits_RV if unused_U is None else logits_RV.index_fill(-1, unused_U, -float("inf"))


def _invert(prob_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token at which each row's CDF exceeds its uniform number, as a share of the row's sum.

    Two levels. A CDF over all tokens in single precision would lose unlikely tokens, and in
    double precision it costs more than the softmax. So blocks are summed in single precision,
    which is exact to 1e-7 of a block's own mass; the CDF over blocks, and the CDF within one
    block, are in double precision.
    """
    num_rows, size = prob_RV.shape
    even = size - size % BLOCK
    sums = [prob_RV[:, :even].reshape(num_rows, -1, BLOCK).sum(-1)]
    if even < size:
        sums.append(prob_RV[:, even:].sum(-1, keepdim=True))
    cdf_RB = torch.cat(sums, -1).cumsum(-1, dtype=torch.float64)
    target_R1 = uniform_R[:, None] * cdf_RB[:, -1:]
    block_R1 = _first_above(cdf_RB, target_R1)
    before_R1 = torch.where(block_R1 > 0, cdf_RB.gather(-1, (block_R1 - 1).clamp_min(0)), 0.0)
    at_RW = block_R1 * BLOCK + torch.arange(BLOCK, device=prob_RV.device)
    if even == size:
        inside_RW = prob_RV.gather(-1, at_RW)
    else:
        inside_RW = prob_RV.gather(-1, at_RW.clamp_max(size - 1)).masked_fill(at_RW >= size, 0.0)
    cdf_RW = inside_RW.cumsum(-1, dtype=torch.float64)
    return (block_R1 * BLOCK + _first_above(cdf_RW, target_R1 - before_R1))[:, 0]


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """First place where the CDF is above the target; never one of probability 0."""
    below_the_end = cdf[:, -1:] * (1 - torch.finfo(torch.float64).eps)
    return torch.searchsorted(cdf, torch.minimum(target, below_the_end), right=True)


def _truncate(logp_RV: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs with −inf where top-k, top-p or min-p, in that order, excludes a token."""
    barred = torch.zeros_like(logp_RV, dtype=torch.bool)
    if 0 < sampling.top_k < logp_RV.shape[1]:
        # By index, not by value: with equal logits exactly k tokens stay.
        kept = logp_RV.topk(sampling.top_k, -1).indices
        barred |= torch.ones_like(barred).scatter(-1, kept, False)
    if sampling.top_p < 1:
        masked = logp_RV.masked_fill(barred, float("-inf")).softmax(-1)
        ordered, order = masked.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        barred |= beyond.scatter(-1, order, beyond)
    if sampling.min_p > 0:
        barred |= logp_RV < logp_RV.amax(-1, keepdim=True) + float(np.log(sampling.min_p))
    return logp_RV.masked_fill(barred, float("-inf"))
