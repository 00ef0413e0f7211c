"""Attention of packed, prefix-shared tokens in two kinds of tiles, with an exact gradient.

    group: prompt p, completions a, b        tiles
    ─────────────────────────────────        ──────────────────────────────────────────────
    p p p                                    own: p reads p, causal
          a a                                own: a reads a, causal        prefix: a and b together
          b b b                              own: b reads b, causal                read p, no mask

The keys of a shared prompt are read once per group: the queries of all its completions are in one
tile. A prompt with one completion is one run with it.

Where a query reads two tiles, their outputs are merged by the logs of their sums,

    out = Σ_i out_i exp(lse_i − lse),   lse = log Σ_i exp lse_i,

and in the backward pass every tile gets the merged output and log-sum: then its probabilities
exp(s − lse) are those of the full softmax, and the gradients of the tiles add up. FlashAttention
(arXiv 2205.14135) combines its blocks the same way.

Shape legend: ``T`` packed tokens, ``H`` query heads, ``J`` key/value heads, ``D`` head size,
``B`` rows of a tile, ``Q`` and ``K`` its queries and keys, ``N`` = B·Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.numerics.batch import Segment

ALONE = 128
"""Runs from this length on get a tile of their own: no copy and no padding."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Runs of packed tokens as rows [B, Q]: a view where they follow each other.

    Outputs have one row more than there are tokens, [T + 1, ...]: padding is written there.
    """

    shape: tuple[int, int]
    start: int | None  # of the first, where they follow each other without padding
    read_N: Tensor | None = None  # else the index of each token; padding repeats a token
    write_N: Tensor | None = None  # index to write to; padding goes to T
    padding: Tensor | None = None  # indices in N of the padding; None without padding

    @classmethod
    def of(
        cls, runs: Sequence[tuple[int, int]], num_tokens: int, device: torch.device
    ) -> TokenRows:
        """From (start, length) of each run."""
        width = max(length for _, length in runs)
        first = runs[0][0]
        if all(run == (first + i * width, width) for i, run in enumerate(runs)):
            return cls((len(runs), width), first)
        return cls.at([np.arange(s, s + n) for s, n in runs], num_tokens, device)

    @classmethod
    def at(cls, indices: Sequence[np.ndarray], num_tokens: int, device: torch.device) -> TokenRows:
        """From the tokens of each row."""
        lengths = np.array([len(row) for row in indices])
        width = int(lengths.max())
        at = np.arange(width)
        read = np.concatenate(indices)[
            np.cumsum(lengths)[:, None] - lengths[:, None] + np.minimum(at, lengths[:, None] - 1)
        ]
        padded = at >= lengths[:, None]
        write = np.where(padded, num_tokens, read)
        padding = np.flatnonzero(padded)

        return cls(
            (len(indices), width),
            None,
            torch.from_numpy(read.ravel()).to(device),
            torch.from_numpy(write.ravel()).to(device),
            torch.from_numpy(padding).to(device) if len(padding) else None,
        )

    def take(self, x_T: Tensor, *, padding: float | None = None) -> Tensor:
        """[T, ...] -> [B, Q, ...], with padding set to ``padding`` if it is given."""
        if self.read_N is None:
            return self._view(x_T)
        taken_N = x_T.index_select(0, self.read_N)
        if padding is not None and self.padding is not None:
            taken_N.index_fill_(0, self.padding, padding)
        return taken_N.view(*self.shape, *x_T.shape[1:])

    def put(self, out_T: Tensor, x_BQ: Tensor) -> None:
        """Write [B, Q, ...] to its tokens in [T + 1, ...]."""
        if self.write_N is None:
            self._view(out_T).copy_(x_BQ)
        else:
            out_T.index_copy_(0, self.write_N, x_BQ.flatten(0, 1).to(out_T.dtype))

    def add(self, out_T: Tensor, x_BQ: Tensor) -> None:
        """Add [B, Q, ...] to its tokens in [T, ...]. Padding must be 0."""
        if self.read_N is None:
            self._view(out_T).add_(x_BQ)
        else:
            out_T.index_add_(0, self.read_N, x_BQ.flatten(0, 1).to(out_T.dtype))

    def _view(self, x_T: Tensor) -> Tensor:
        assert self.start is not None  # where there are no indices
        num, width = self.shape
        return x_T[self.start : self.start + num * width].view(num, width, *x_T.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Shared prompts of one length, and the queries that attend to them."""

    queries: TokenRows
    prefix: TokenRows


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """All tiles of a batch, laid out once for all layers."""

    own: tuple[TokenRows, ...]
    families: tuple[Family, ...]

    @classmethod
    def of(cls, segments: Sequence[Segment], *, device: torch.device) -> Tiles:
        """Group runs of similar length, to keep padding small."""
        num = sum(s.length for s in segments)
        children: dict[int, list[Segment]] = {}
        for segment in segments:
            if segment.parent is not None:
                children.setdefault(segment.parent, []).append(segment)
        plain: dict[tuple[int, int], list[tuple[int, int]]] = {}
        readers: dict[tuple[int, int], list[tuple[Segment, list[Segment]]]] = {}

        def run(start: int, length: int) -> None:
            key = start if length >= ALONE else -1
            plain.setdefault((key, grid(length)), []).append((start, length))

        for number, prompt in enumerate(segments):
            own = children.get(number, [])
            if prompt.parent is not None:
                continue
            if len(own) == 1 and own[0].start == prompt.start + prompt.length:
                run(prompt.start, prompt.length + own[0].length)
                continue
            for segment in (prompt, *own):
                run(segment.start, segment.length)
            if own:
                total = sum(s.length for s in own)
                alone = total * prompt.length >= ALONE**2
                key = number + num if alone else total.bit_length()
                readers.setdefault((prompt.length, key), []).append((prompt, own))
        families = []
        for groups in readers.values():
            prompts = [(prompt.start, prompt.length) for prompt, _ in groups]
            queries = _together([own for _, own in groups], num, device)
            families.append(Family(queries, TokenRows.of(prompts, num, device)))
        rows = [TokenRows.of(runs, num, device) for runs in plain.values()]
        return cls(tuple(rows), tuple(families))


def _tokens(segment: Segment) -> np.ndarray:
    return np.arange(segment.start, segment.start + segment.length)


def grid(length: int) -> int:
    """The length rounded up to a multiple of 4, and to one of eight steps per doubling.

    Example:
        >>> [grid(n) for n in (1, 7, 9, 17, 100)]
        [4, 8, 12, 20, 104]
    """
    step = max(1 << max(length.bit_length() - 4, 0), 4)
    return -(-length // step) * step


def _together(
    groups: Sequence[Sequence[Segment]], num_tokens: int, device: torch.device
) -> TokenRows:
    """The tokens of each group's segments, one group after the other in a row."""
    runs = [(own[0].start, sum(s.length for s in own)) for own in groups]
    ends = [own[-1].start + own[-1].length for own in groups]
    if all(first + total == end for (first, total), end in zip(runs, ends, strict=True)):
        return TokenRows.of(runs, num_tokens, device)
    return TokenRows.at(
        [np.concatenate([_tokens(s) for s in own]) for own in groups], num_tokens, device
    )


# --- all tiles -------------------------------------------------------------------------------


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *, scaling: float) -> Tensor:
    """q [T, H, D], k and v [T, J, D] -> [T, H, D], differentiable."""
    out: Tensor = _Attention.apply(q, k, v, tiles, scaling)
    return out


class _Attention(torch.autograd.Function):
    """All tiles, one by one. Only inputs, output and log-sums are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scaling: float) -> Tensor:
        per_kv, heads_kv = q.shape[1] // k.shape[1], k.shape[1]
        num, heads = q.shape[:2]
        out = q.new_empty(num + 1, heads, v.shape[2])
        lse = q.new_empty(num + 1, heads, dtype=torch.float32)
        for rows in tiles.own:
            keys, values = (_repeated(rows.take(x), per_kv) for x in (k, v))
            tile_out, tile_lse = _forward(rows.take(q), keys, values, True, scaling)
            rows.put(out, tile_out)
            rows.put(lse, tile_lse)
        for family in tiles.families:
            queries, prefix = family.queries, family.prefix
            tile_out, tile_lse = _forward(
                _folded(queries.take(q), heads_kv), prefix.take(k), prefix.take(v), False, scaling
            )
            new, old = _unfolded(tile_lse, per_kv), queries.take(lse)
            both = torch.logaddexp(new, old)
            merged = _unfolded(tile_out, per_kv) * (new - both).exp_()[..., None]
            merged += queries.take(out) * (old - both).exp_()[..., None]
            queries.put(out, merged)
            queries.put(lse, both)
        ctx.tiles, ctx.scaling = tiles, scaling
        ctx.save_for_backward(q, k, v, out, lse)
        return out[:num]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        per_kv, heads_kv = q.shape[1] // k.shape[1], k.shape[1]
        dq = q.new_empty(len(q) + 1, *q.shape[1:])
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for rows in ctx.tiles.own:
            keys, values = (_repeated(rows.take(x), per_kv) for x in (k, v))
            # Padding must add nothing to the gradients of its row's keys: exp(s − ∞) = 0.
            tile_dq, tile_dk, tile_dv = _backward(
                rows.take(grad),
                (rows.take(q), keys, values),
                rows.take(out),
                rows.take(lse, padding=float("inf")),
                True,
                ctx.scaling,
            )
            rows.put(dq, tile_dq)
            rows.add(dk, _summed(tile_dk, per_kv))
            rows.add(dv, _summed(tile_dv, per_kv))
        for family in ctx.tiles.families:
            queries, prefix = family.queries, family.prefix
            tile_dq, tile_dk, tile_dv = _backward(
                _folded(queries.take(grad), heads_kv),
                (_folded(queries.take(q), heads_kv), prefix.take(k), prefix.take(v)),
                _folded(queries.take(out), heads_kv),
                _folded(queries.take(lse, padding=float("inf")), heads_kv),
                False,
                ctx.scaling,
            )
            queries.add(dq[:-1], _unfolded(tile_dq, per_kv))
            prefix.add(dk, tile_dk)
            prefix.add(dv, tile_dv)
        return dq[:-1], dk, dv, None, None


def _repeated(x: Tensor, times: int) -> Tensor:
    """[B, K, J, D] -> [B, K, H, D]: every key head repeated for each of its query heads."""
    return x if times == 1 else x.repeat_interleave(times, 2)


def _summed(x: Tensor, times: int) -> Tensor:
    """The gradient of :func:`_repeated`."""
    return x if times == 1 else x.view(*x.shape[:2], -1, times, x.shape[3]).sum(3)


def _folded(x: Tensor, heads_kv: int) -> Tensor:
    """[B, Q, H, ...] -> [B, Q·H/J, J, ...]: the query heads of one key head as more queries."""
    if x.shape[2] == heads_kv:
        return x
    split = x.view(*x.shape[:2], heads_kv, -1, *x.shape[3:])
    return split.transpose(2, 3).flatten(1, 2)


def _unfolded(x: Tensor, per_kv: int) -> Tensor:
    """The inverse of :func:`_folded`."""
    if per_kv == 1:
        return x
    split = x.reshape(len(x), -1, per_kv, *x.shape[2:])
    return split.transpose(2, 3).flatten(2, 3)


# --- one tile --------------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """[B, Q, H, D] and keys [B, K, H, D] -> output [B, Q, H, D] and log-sums [B, Q, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if _has_kernel(q, v):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scaling
        )
    else:
        scores = _scores(q, k, causal, scaling)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp_().to(v.dtype) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and log-sums over *all* tiles."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    grad, out, lse = grad.transpose(1, 2), out.transpose(1, 2), lse.transpose(1, 2)
    if _has_kernel(q, v):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scaling
        )
    else:
        p = (_scores(q, k, causal, scaling) - lse[..., None]).exp_()
        along = (grad.float() * out.float()).sum(-1, keepdim=True)
        ds = (p * ((grad @ v.transpose(-1, -2)).float() - along)).mul_(scaling).to(q.dtype)
        found = (ds @ k, ds.transpose(-1, -2) @ q, p.to(v.dtype).transpose(-1, -2) @ grad)
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether torch has a kernel for these that also returns the log-sums."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _scores(q: Tensor, k: Tensor, causal: bool, scaling: float) -> Tensor:
    """[B, H, Q, K] in float32."""
    scores: Tensor = (q @ k.transpose(-1, -2)).float() * scaling
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
    return scores.masked_fill_(later, float("-inf"))
