"""Per-token statistics from hidden states, without the full logits in memory.

The output head runs only at trained positions and in chunks. There are two code paths:

    log-probs, entropy, divergences from whole    one function with a hand-written gradient, which
    vocabularies, of a plain linear head          is computed in place and multiplied into hidden
                                                  and weight, chunk by chunk (``fused.py``)
    anything else                                 autograd on every chunk's log-softmax, recomputed
                                                  in the backward pass when there are several

Shape legend: ``N`` trained tokens, ``n`` those of a chunk, ``X`` hidden size, ``V`` vocabulary,
``K`` top-k entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.core.statistics import Divergence, DivergenceKind, Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.numerics import logits
from posttrain.numerics.batch import PackedBatch
from posttrain.numerics.divergence import divergence
from posttrain.numerics.fused import LinearStats, Views
from posttrain.numerics.logits import Head, LinearHead, Teachers


def token_stats(
    hidden_NX: Tensor,
    head: Head,
    batch: PackedBatch,
    *,
    wanted: frozenset[Wanted],
    vocab_size: int,
    teachers: Sequence[Head] = (),
) -> Mapping[Wanted, Tensor]:
    """The wanted statistics at every trained token, in one chunked pass.

    Args:
        hidden_NX: final hidden states, already gathered with ``batch.predict_N``.
        head: maps hidden states to logits.
        batch: targets, temperatures and teacher columns.
        wanted: which statistics, and which divergences from the teacher's columns.
        vocab_size: V, which decides the chunk length.
        teachers: heads of the teachers whose hidden states are in the batch, by number.
    """
    if not wanted:
        return {}
    compared = frozenset(w for w in wanted if isinstance(w, Divergence))
    asked = Teachers.of(batch, teachers) if compared else None
    by_rank = any(w.kind is DivergenceKind.SORTED_L1 for w in compared)
    fused = not by_rank and wanted - compared <= _FUSED and (asked is not None or not compared)
    if isinstance(head, LinearHead) and fused:
        return _fused_stats(hidden_NX, head, batch, wanted=wanted, teachers=asked)
    order = sorted(wanted, key=repr)
    rows = max(logits.CHUNK_ELEMENTS // vocab_size, 1)
    num = hidden_NX.shape[0]

    def chunk(hidden: Tensor, start: int) -> tuple[Tensor, ...]:
        part = slice(start, start + rows)
        return tuple(_stats(head(hidden).float(), batch, part, order, asked))

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


def _stats(
    logits_NV: Tensor,
    batch: PackedBatch,
    part: slice,
    order: list[Wanted],
    teachers: Teachers | None,
) -> list[Tensor]:
    logp_NV = logits_NV.log_softmax(-1)
    target_N1 = batch.target_N[part, None]
    out: list[Tensor] = []
    for stat in order:
        if stat is Stat.LOGPROB:
            out.append(logp_NV.gather(-1, target_N1)[:, 0])
        elif stat is Stat.SAMPLED_LOGPROB:
            out.append(_at_temperature(logits_NV, logp_NV, batch.temperature_N[part], target_N1))
        elif stat is Stat.ENTROPY:
            divisor_N = _divisor(batch.temperature_N[part])
            if divisor_N is None:
                own_NV = logp_NV
            else:
                own_NV = (logits_NV / divisor_N[:, None]).log_softmax(-1)
            out.append(-(own_NV.exp() * own_NV).sum(-1))
        elif stat is Stat.LOG_COLLISION:
            out.append((2 * logp_NV).logsumexp(-1))
        elif isinstance(stat, Divergence):
            out.append(_compared(stat, logp_NV, batch, part, teachers))
    return out


def _compared(
    wanted: Divergence,
    logp_NV: Tensor,
    batch: PackedBatch,
    part: slice,
    teachers: Teachers | None,
) -> Tensor:
    """[N] the divergence where there is a teacher; elsewhere NaN, which has no gradient."""
    values_N = logp_NV.new_full((len(logp_NV),), float("nan"))
    by_rank = wanted.kind is DivergenceKind.SORTED_L1
    column = Column.TEACHER_SORTED if by_rank else Column.TEACHER_LOGPROBS
    if teachers is not None and not by_rank:
        with torch.no_grad():
            teacher_NK = teachers.logits(part, torch.empty_like(logp_NV)).log_softmax(-1)
        ids_NK, known_N = batch.target_N.new_empty(len(logp_NV), 0), teachers.known_N[part]
    elif column in batch.columns:
        teacher_NK = batch.columns[column][part]
        ids_NK = teacher_NK.long() if by_rank else batch.columns[Column.TEACHER_IDS][part]
        known_N = ~teacher_NK[:, 0].isnan()
    else:
        return values_N
    if bool(known_N.all()):
        return divergence(wanted, logp_NV, ids_NK, teacher_NK)
    values_N[known_N] = divergence(wanted, logp_NV[known_N], ids_NK[known_N], teacher_NK[known_N])
    return values_N


def _at_temperature(
    logits_NV: Tensor, logp_NV: Tensor, temperature_N: Tensor, target_N1: Tensor
) -> Tensor:
    divisor_N = _divisor(temperature_N)
    if divisor_N is None:
        return logp_NV.gather(-1, target_N1)[:, 0]
    scaled = (logits_NV / divisor_N[:, None]).log_softmax(-1)
    return scaled.gather(-1, target_N1)[:, 0]


def _divisor(temperature_N: Tensor) -> Tensor | None:
    """[N] what logits are divided by; None where all are divided by 1."""
    if bool((temperature_N == 1).all()):
        return None
    # A greedy token (temperature 0) has no ratio, and no term may read one. Division by 0 would
    # still make the gradient of its whole micro-batch NaN: 0 · NaN is NaN.
    return torch.where(temperature_N > 0, temperature_N, torch.ones_like(temperature_N))


# --- a linear head ---------------------------------------------------------------------------

_FUSED: frozenset[Wanted] = frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB, Stat.ENTROPY})


def _fused_stats(
    hidden_NX: Tensor,
    head: LinearHead,
    batch: PackedBatch,
    *,
    wanted: frozenset[Wanted],
    teachers: Teachers | None,
) -> Mapping[Wanted, Tensor]:
    sampled_N = None if wanted <= {Stat.LOGPROB} else _divisor(batch.temperature_N)
    at = {Stat.LOGPROB: None, Stat.SAMPLED_LOGPROB: sampled_N, Stat.ENTROPY: sampled_N}
    divisors = {stat: at[stat] for stat in at if stat in wanted}  # what each divides the logits by
    views = list({id(d): d for d in divisors.values()}.values())
    place = {stat: next(i for i, v in enumerate(views) if v is d) for stat, d in divisors.items()}
    compared = [w for w in sorted(wanted, key=repr) if isinstance(w, Divergence)]
    logp_DN, entropy_N, value_JN = LinearStats.apply(
        hidden_NX,
        head.weight_VX,
        head.bias_V,
        batch.target_N,
        Views(
            divisors=tuple(views),
            entropy=place.get(Stat.ENTROPY),
            divergences=tuple(compared),
            teachers=teachers,
            scale=head.scale,
            graded=torch.is_grad_enabled(),
        ),
    )
    found: dict[Wanted, Tensor] = {stat: logp_DN[view] for stat, view in place.items()}
    found[Stat.ENTROPY] = entropy_N
    found |= dict(zip(compared, value_JN, strict=True))
    return {stat: found[stat] for stat in sorted(wanted, key=repr)}
