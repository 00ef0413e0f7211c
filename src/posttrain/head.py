"""Per-token statistics from hidden states, without ever keeping the full logits.

The output head runs only at trained positions and in chunks; each chunk is recomputed in the
backward pass when there is more than one. Log-prob, entropy and divergence come out of one pass.

Shape legend: ``N`` trained tokens, ``X`` hidden size, ``V`` vocabulary, ``K`` top-k entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.batch import PackedBatch
from posttrain.trajectory import Column

CHUNK_ELEMENTS = 2**24
"""Logits held at once (64 MiB in float32)."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, X] -> float32 logits [N, V], everything the model does to them included."""


class Stat(StrEnum):
    """What can be read off a token's logits. All are float32 [N]."""

    LOGPROB = "logprob"  # log pi(y)
    SAMPLED_LOGPROB = "sampled_logprob"  # log pi(y) at the temperature the token was sampled at
    ENTROPY = "entropy"  # -sum_v pi log pi
    TEACHER_REVERSE_KL = "teacher_reverse_kl"  # sum_v pi log(pi / pi_T)


def token_stats(
    hidden_NX: Tensor, head: Head, batch: PackedBatch, *, wanted: frozenset[Stat], vocab_size: int
) -> Mapping[Stat, Tensor]:
    """The wanted statistics at every trained token, in one chunked pass.

    Args:
        hidden_NX: final hidden states, already gathered with ``batch.predict_N``.
        head: maps hidden states to logits.
        batch: targets, temperatures and teacher columns.
        wanted: which statistics to compute.
        vocab_size: V, which decides the chunk length.
    """
    order = sorted(wanted)
    rows = max(CHUNK_ELEMENTS // vocab_size, 1)
    num = hidden_NX.shape[0]

    def chunk(hidden: Tensor, start: int) -> tuple[Tensor, ...]:
        part = slice(start, start + rows)
        return tuple(_stats(head(hidden).float(), batch, part, order))

    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, num, rows):
        hidden = hidden_NX[start : start + rows]
        if num > rows and torch.is_grad_enabled():
            parts.append(checkpoint(chunk, hidden, start, use_reentrant=False))
        else:
            parts.append(chunk(hidden, start))
    if not parts:
        return {stat: hidden_NX.new_zeros(0, dtype=torch.float32) for stat in order}
    return {stat: torch.cat([p[i] for p in parts]) for i, stat in enumerate(order)}


def _stats(logits_NV: Tensor, batch: PackedBatch, part: slice, order: list[Stat]) -> list[Tensor]:
    logp_NV = logits_NV.log_softmax(-1)
    target_N1 = batch.target_N[part, None]
    out: list[Tensor] = []
    for stat in order:
        if stat is Stat.LOGPROB:
            out.append(logp_NV.gather(-1, target_N1)[:, 0])
        elif stat is Stat.SAMPLED_LOGPROB:
            out.append(_at_temperature(logits_NV, logp_NV, batch.temperature_N[part], target_N1))
        elif stat is Stat.ENTROPY:
            out.append(-(logp_NV.exp() * logp_NV).sum(-1))
        else:
            ids_NK = batch.columns[Column.TEACHER_IDS][part]
            teacher_NK = batch.columns[Column.TEACHER_LOGPROBS][part]
            out.append(reverse_kl(logp_NV, ids_NK, teacher_NK))
    return out


def _at_temperature(
    logits_NV: Tensor, logp_NV: Tensor, temperature_N: Tensor, target_N1: Tensor
) -> Tensor:
    if bool((temperature_N == 1).all()):
        return logp_NV.gather(-1, target_N1)[:, 0]
    scaled = (logits_NV / temperature_N[:, None]).log_softmax(-1)
    return scaled.gather(-1, target_N1)[:, 0]


def reverse_kl(logp_NV: Tensor, ids_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """KL(π ‖ π_T) per token. [N, 0] ids mean that the teacher gave its whole vocabulary [N, V].

    With K < V the unseen tokens are one outcome, whose probabilities are what is left on both
    sides. Merging outcomes never increases a KL, so this is a lower bound of the full one.

    Example:
        >>> p = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> q = torch.tensor([[0.5, 0.5]]).log()  # teacher: token 0 and token 2, nothing else
        >>> full = reverse_kl(p, torch.empty(1, 0, dtype=torch.int64), p)
        >>> bool(full.abs() < 1e-6)
        True
    """
    if ids_NK.shape[1] == 0:
        return (logp_NV.exp() * (logp_NV - teacher_NK)).sum(-1)
    seen_NK = logp_NV.gather(-1, ids_NK)
    kl_N = (seen_NK.exp() * (seen_NK - teacher_NK)).sum(-1)
    if ids_NK.shape[1] == logp_NV.shape[1]:
        return kl_N
    rest_N = logp_NV.scatter(-1, ids_NK, float("-inf")).logsumexp(-1)
    left_N = (1 - teacher_NK.exp().sum(-1)).clamp_min(1e-10).log()
    return kl_N + rest_N.exp() * (rest_N - left_N)
