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
from posttrain.divergence import Divergence, Shape, divergence
from posttrain.trajectory import Column

CHUNK_ELEMENTS = 2**24
"""Entries of one chunk's logits (64 MiB in float32). Their log-softmax and what the statistics
need beside it come on top, a few times that."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, X] -> float32 logits [N, V], everything the model does to them included."""


class Stat(StrEnum):
    """What can be read off a token's logits, or off a scalar head. All are float32 [N]."""

    LOGPROB = "logprob"  # log pi(y)
    SAMPLED_LOGPROB = "sampled_logprob"  # log pi(y) at the temperature the token was sampled at
    ENTROPY = "entropy"  # -sum_v pi log pi
    LOG_COLLISION = "log_collision"  # log sum_v pi^2: two samples are the same token
    VALUE = "value"  # the scalar head before the token, where it is predicted
    SCORE = "score"  # the scalar head after the token, where it has been read


SCALARS = frozenset({Stat.VALUE, Stat.SCORE})
"""Statistics that are not functions of logits: the learner computes them beside these."""


Wanted = Stat | Divergence
"""A statistic of the policy alone, or a divergence from the teacher's columns."""


def token_stats(
    hidden_NX: Tensor,
    head: Head,
    batch: PackedBatch,
    *,
    wanted: frozenset[Wanted],
    vocab_size: int,
) -> Mapping[Wanted, Tensor]:
    """The wanted statistics at every trained token, in one chunked pass.

    Args:
        hidden_NX: final hidden states, already gathered with ``batch.predict_N``.
        head: maps hidden states to logits.
        batch: targets, temperatures and teacher columns.
        wanted: which statistics, and which divergences from the teacher's columns.
        vocab_size: V, which decides the chunk length.
    """
    if not wanted:
        return {}
    order = sorted(wanted, key=repr)
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


def _stats(logits_NV: Tensor, batch: PackedBatch, part: slice, order: list[Wanted]) -> list[Tensor]:
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
        elif stat is Stat.LOG_COLLISION:
            out.append((2 * logp_NV).logsumexp(-1))
        elif isinstance(stat, Divergence):
            out.append(_compared(stat, logp_NV, batch, part))
    return out


def _compared(wanted: Divergence, logp_NV: Tensor, batch: PackedBatch, part: slice) -> Tensor:
    """[N] the divergence where there is a teacher; elsewhere NaN, which has no gradient."""
    values_N = logp_NV.new_full((len(logp_NV),), float("nan"))
    by_rank = wanted.shape is Shape.SORTED_L1
    column = Column.TEACHER_SORTED if by_rank else Column.TEACHER_LOGPROBS
    if column not in batch.columns:
        return values_N
    teacher_NK = batch.columns[column][part]
    ids_NK = teacher_NK.long() if by_rank else batch.columns[Column.TEACHER_IDS][part]
    known_N = ~teacher_NK[:, 0].isnan()
    if bool(known_N.all()):
        return divergence(wanted, logp_NV, ids_NK, teacher_NK)
    values_N[known_N] = divergence(wanted, logp_NV[known_N], ids_NK[known_N], teacher_NK[known_N])
    return values_N


def _at_temperature(
    logits_NV: Tensor, logp_NV: Tensor, temperature_N: Tensor, target_N1: Tensor
) -> Tensor:
    if bool((temperature_N == 1).all()):
        return logp_NV.gather(-1, target_N1)[:, 0]
    # A greedy token (temperature 0) has no ratio, and no term may ask for one. Divided by 0 it
    # would still make the gradient of its whole micro-batch NaN: 0 · NaN is NaN.
    divisor_N = torch.where(temperature_N > 0, temperature_N, torch.ones_like(temperature_N))
    scaled = (logits_NV / divisor_N[:, None]).log_softmax(-1)
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
    return divergence(Divergence(Shape.REVERSE_KL), logp_NV, ids_NK, teacher_NK)
