"""Per-token statistics from hidden states, without ever keeping the full logits.

The output head runs only at trained positions and in chunks. Two ways lead through it:

    log-probs, entropy of a plain linear head    one function with a gradient of its own:
                                                 dlogits = g (1[y] − p), formed in place and
                                                 multiplied into hidden and weight, chunk by chunk
    anything else                                autograd on every chunk's log-softmax, recomputed
                                                 in the backward pass when there are several

Shape legend: ``N`` trained tokens, ``n`` those of a chunk, ``X`` hidden size, ``V`` vocabulary,
``K`` top-k entries, ``D`` divisors of the logits (temperatures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.batch import PackedBatch
from posttrain.divergence import Divergence, Shape, divergence
from posttrain.trajectory import Column

CHUNK_ELEMENTS = 2**24
"""Entries of one chunk's logits (64 MiB in float32). Their log-softmax and what the statistics
need beside it come on top, a few times that."""

CHUNK_ROWS = 256
"""Tokens of a chunk on a CPU, where a chunk that stays in the cache is worth more than a long one;
more where the vocabulary is small, fewer where ``CHUNK_ELEMENTS`` asks for it."""

KEEP_ELEMENTS = 2**25
"""Up to this many probabilities (128 MiB in float32) are kept for the backward pass. Beyond, as
with every large vocabulary, they are computed again: four products with the head, not three."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, X] -> float32 logits [N, V], everything the model does to them included."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """A head that is one product: scale · (h Wᵀ + b), in float32."""

    weight_VX: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0

    def __call__(self, hidden_NX: Tensor) -> Tensor:
        """Logits [N, V]."""
        logits_NV = F.linear(hidden_NX, self.weight_VX, self.bias_V).float()
        return logits_NV if self.scale == 1 else logits_NV * self.scale


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
    if isinstance(head, LinearHead) and wanted <= _FUSED:
        return _fused_stats(hidden_NX, head, batch, wanted=wanted)
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
    divisor_N = _divisor(temperature_N)
    if divisor_N is None:
        return logp_NV.gather(-1, target_N1)[:, 0]
    scaled = (logits_NV / divisor_N[:, None]).log_softmax(-1)
    return scaled.gather(-1, target_N1)[:, 0]


def _divisor(temperature_N: Tensor) -> Tensor | None:
    """[N] what logits are divided by; None where all are divided by 1."""
    if bool((temperature_N == 1).all()):
        return None
    # A greedy token (temperature 0) has no ratio, and no term may ask for one. Divided by 0 it
    # would still make the gradient of its whole micro-batch NaN: 0 · NaN is NaN.
    return torch.where(temperature_N > 0, temperature_N, torch.ones_like(temperature_N))


# --- log-probs and entropy of a linear head --------------------------------------------------

_FUSED: frozenset[Wanted] = frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB, Stat.ENTROPY})


def _fused_stats(
    hidden_NX: Tensor, head: LinearHead, batch: PackedBatch, *, wanted: frozenset[Wanted]
) -> Mapping[Wanted, Tensor]:
    divisors = dict[Wanted, Tensor | None]()  # which stat is read off which division of the logits
    if Stat.SAMPLED_LOGPROB in wanted:
        divisors[Stat.SAMPLED_LOGPROB] = _divisor(batch.temperature_N)
    if wanted - {Stat.SAMPLED_LOGPROB}:
        divisors[Stat.LOGPROB] = None
    views = list({id(d): d for d in divisors.values()}.values())
    logp_DN, entropy_N = _LinearStats.apply(
        hidden_NX,
        head.weight_VX,
        head.bias_V,
        batch.target_N,
        _Views(tuple(views), head.scale, Stat.ENTROPY in wanted, torch.is_grad_enabled()),
    )
    found: dict[Wanted, Tensor] = {
        stat: logp_DN[next(i for i, v in enumerate(views) if v is d)]
        for stat, d in divisors.items()
    }
    found[Stat.ENTROPY] = entropy_N
    return {stat: found[stat] for stat in sorted(wanted, key=repr)}


@dataclass(frozen=True, slots=True, eq=False)
class _Views:
    """What is read off one product with the head."""

    divisors: tuple[Tensor | None, ...]  # [N] each; the entropy is read where it is None
    scale: float
    entropy: bool
    graded: bool  # whether a backward pass may come

    def logits(
        self, hidden_nX: Tensor, weight_VX: Tensor, bias_V: Tensor | None, out_nV: Tensor
    ) -> Tensor:
        """[n, V] in float32, before any division; in ``out_nV`` where its type allows."""
        if hidden_nX.dtype == torch.float32:
            logits_nV = torch.mm(hidden_nX, weight_VX.t(), out=out_nV[: len(hidden_nX)])
            if bias_V is not None:
                logits_nV.add_(bias_V)
        else:
            logits_nV = F.linear(hidden_nX, weight_VX, bias_V).float()
        return logits_nV if self.scale == 1 else logits_nV.mul_(self.scale)

    def divided(self, logits_nV: Tensor, part: slice) -> Iterator[tuple[int, Tensor]]:
        """The logits under every division."""
        for view, divisor_N in enumerate(self.divisors):
            yield view, logits_nV if divisor_N is None else logits_nV / divisor_N[part, None]


class _LinearStats(torch.autograd.Function):
    """([D, N] log-probs of the targets under every division, [N] entropy or nothing).

    With p = softmax(z / τ): d log p_y / dz = (1[y] − p) / τ, and dH / dz = −p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NX: Tensor,
        weight_VX: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        views: _Views,
    ) -> tuple[Tensor, Tensor]:
        num, vocab, num_views = len(hidden_NX), len(weight_VX), len(views.divisors)
        keep = views.graded and num_views * num * vocab <= KEEP_ELEMENTS
        rows = _rows(vocab, hidden_NX.device)
        logp_DN = hidden_NX.new_empty(num_views, num, dtype=torch.float32)
        entropy_N = logp_DN.new_empty(num if views.entropy else 0)
        p_DNV = logp_DN.new_empty(num_views, num if keep else min(rows, num), vocab)
        scratch_nV = logp_DN.new_empty(min(rows, num), vocab)
        for part in _parts(num, rows):
            logits_nV = views.logits(hidden_NX[part], weight_VX, bias_V, scratch_nV)
            for view, z_nV in views.divided(logits_nV, part):
                p_nV = p_DNV[view, part if keep else slice(len(z_nV))]
                torch.softmax(z_nV, -1, out=p_nV)
                # log Σ exp z, from the largest entry: z = log p + log Σ exp z at every one.
                log_sum_n = z_nV.amax(-1) - p_nV.amax(-1).log()
                logp_DN[view, part] = z_nV.gather(-1, target_N[part, None])[:, 0] - log_sum_n
                if views.entropy and views.divisors[view] is None:
                    entropy_N[part] = log_sum_n - torch.linalg.vecdot(p_nV, z_nV)
        ctx.views, ctx.kept = views, p_DNV if keep else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NX, weight_VX, bias_V, target_N, entropy_N)
        return logp_DN, entropy_N

    @staticmethod
    def backward(ctx: Any, logp_grad_DN: Tensor | None, entropy_grad_N: Tensor | None) -> Any:
        hidden_NX, weight_VX, bias_V, target_N, entropy_N = ctx.saved_tensors
        views: _Views = ctx.views
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_grad_NX = torch.empty_like(hidden_NX) if wants_hidden else None
        # Float32, or what many chunks add up to would be rounded as often.
        weight_grad_VX = torch.zeros_like(weight_VX, dtype=torch.float32) if wants_weight else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias else None
        if logp_grad_DN is None:
            num_views = len(views.divisors)
            logp_grad_DN = hidden_NX.new_zeros(num_views, len(hidden_NX), dtype=torch.float32)
        # What was kept is overwritten: a second backward pass computes it again.
        kept_DNV, ctx.kept = ctx.kept, None
        for part in _parts(len(hidden_NX), _rows(len(weight_VX), hidden_NX.device)):
            hidden_nX = hidden_NX[part]
            if kept_DNV is None:
                empty_nV = logp_grad_DN.new_empty(len(hidden_nX), len(weight_VX))
                logits_nV = views.logits(hidden_nX, weight_VX, bias_V, empty_nV)
                p_DnV = torch.stack([z.softmax(-1) for _, z in views.divided(logits_nV, part)])
            else:
                p_DnV = kept_DNV[:, part]
            grads = (logp_grad_DN, entropy_grad_N)
            d_nV = _logits_grad(p_DnV, views, part, target_N, entropy_N, grads)
            d_nV = d_nV.to(hidden_NX.dtype)
            if hidden_grad_NX is not None:
                torch.mm(d_nV, weight_VX, out=hidden_grad_NX[part])
            if weight_grad_VX is not None and d_nV.dtype == torch.float32:
                weight_grad_VX.addmm_(d_nV.t(), hidden_nX)
            elif weight_grad_VX is not None:
                weight_grad_VX.add_(d_nV.t() @ hidden_nX)
            if bias_grad_V is not None:
                bias_grad_V.add_(d_nV.sum(0))
        found = (hidden_grad_NX, weight_grad_VX, bias_grad_V)
        return *(None if g is None else g.to(hidden_NX.dtype) for g in found), None, None


def _logits_grad(
    p_DnV: Tensor,
    views: _Views,
    part: slice,
    target_N: Tensor,
    entropy_N: Tensor,
    grads: tuple[Tensor, Tensor | None],
) -> Tensor:
    """[n, V] gradient of a chunk's logits, written over its probabilities.

    ``grads`` are those of the log-probs [D, N] and of the entropy [N].
    """
    total_nV: Tensor | None = None
    logp_grad_DN, entropy_grad_N = grads
    for view, divisor_N in enumerate(views.divisors):
        p_nV, grad_n1 = p_DnV[view], logp_grad_DN[view, part, None]
        away_nV: Tensor | None = None
        if entropy_grad_N is not None and views.entropy and divisor_N is None:
            away_nV = torch.xlogy(p_nV, p_nV).add_(p_nV * entropy_N[part, None])
            away_nV.mul_(entropy_grad_N[part, None])
        d_nV = p_nV.mul_(-grad_n1).scatter_add_(-1, target_N[part, None], grad_n1)
        if away_nV is not None:
            d_nV.sub_(away_nV)
        if divisor_N is not None:
            d_nV.div_(divisor_N[part, None])
        total_nV = d_nV if total_nV is None else total_nV.add_(d_nV)
    assert total_nV is not None  # there is at least one view
    return total_nV if views.scale == 1 else total_nV.mul_(views.scale)


def _rows(vocab: int, device: torch.device) -> int:
    """Tokens of a chunk."""
    most = max(CHUNK_ELEMENTS // vocab, 1)
    return min(most, max(CHUNK_ROWS, 2**20 // vocab)) if device.type == "cpu" else most


def _parts(num: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, num, rows))


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
