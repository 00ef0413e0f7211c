"""Packed attention with dense masks: slower, and general, sliding windows included.

Shape legend: ``T`` packed tokens, ``H`` query heads, ``J`` key/value heads, ``D`` head size,
``B`` blocks, ``Q`` and ``K`` queries and keys of a padded block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.numerics.batch import Segment


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Segments of similar size, padded for one attention call. No other code pads."""

    query_BQ: Tensor  # indices in T
    key_BK: Tensor  # indices in T
    mask_BQK: Tensor  # True where a query attends to a key
    distance_BQK: Tensor  # tokens from key to query, for sliding windows


@dataclass(frozen=True, slots=True, eq=False)
class MaskedBlocks:
    """Causal attention within each segment, and attention to its shared prompt, in a window."""

    blocks: tuple[_Block, ...]
    place_T: Tensor  # index of each token's output among the blocks' padded queries

    @classmethod
    def of(cls, segments: Sequence[Segment], *, device: torch.device) -> MaskedBlocks:
        """Group segments of similar length, to keep padding small."""
        buckets: dict[tuple[int, int], list[Segment]] = {}
        for segment in segments:
            parent = 0 if segment.parent is None else segments[segment.parent].length
            size = (segment.length.bit_length(), parent.bit_length())
            buckets.setdefault(size, []).append(segment)
        num_tokens = sum(s.length for s in segments)
        place = torch.empty(num_tokens, dtype=torch.int64)
        blocks, offset = [], 0
        for members in buckets.values():
            block = _block(members, segments)
            width = block.query_BQ.shape[1]
            for row, segment in enumerate(members):
                first = offset + row * width
                span = slice(segment.start, segment.start + segment.length)
                place[span] = torch.arange(first, first + segment.length)
            offset += block.query_BQ.numel()
            blocks.append(block)
        on_device = tuple(
            _Block(
                b.query_BQ.to(device),
                b.key_BK.to(device),
                b.mask_BQK.to(device),
                b.distance_BQK.to(device),
            )
            for b in blocks
        )
        return cls(on_device, place.to(device))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """q [T, H, D], k and v [T, J, D] -> [T, H, D]."""
        outputs = []
        for block in self.blocks:
            mask = block.mask_BQK
            if window is not None:
                mask = mask & (block.distance_BQK < window)
            out = F.scaled_dot_product_attention(
                q[block.query_BQ].transpose(1, 2),
                k[block.key_BK].transpose(1, 2),
                v[block.key_BK].transpose(1, 2),
                attn_mask=mask[:, None],
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[self.place_T]


def _block(members: Sequence[Segment], segments: Sequence[Segment]) -> _Block:
    """Index and mask tensors of one bucket."""
    parents = [None if s.parent is None else segments[s.parent] for s in members]
    width_q = max(s.length for s in members)
    width_p = max(p.length if p else 0 for p in parents)
    num = len(members)
    own = torch.arange(width_q)
    query = torch.zeros(num, width_q, dtype=torch.int64)
    key = torch.zeros(num, width_p + width_q, dtype=torch.int64)
    mask = torch.zeros(num, width_q, width_p + width_q, dtype=torch.bool)
    distance = torch.zeros(num, width_q, width_p + width_q, dtype=torch.int64)
    causal = own[:, None] >= own[None, :]
    for row, (segment, parent) in enumerate(zip(members, parents, strict=True)):
        n, p = segment.length, parent.length if parent else 0
        query[row, :n] = segment.start + own[:n]
        key[row, width_p : width_p + n] = segment.start + own[:n]
        mask[row, :n, width_p : width_p + n] = causal[:n, :n]
        distance[row, :, width_p:] = own[:, None] - own[None, :]
        if parent:
            key[row, :p] = parent.start + torch.arange(p)
            mask[row, :n, :p] = True
            distance[row, :, :p] = p + own[:, None] - torch.arange(p)[None, :]
        # A padded query must attend to some key, or softmax gives NaN; its output is not used.
        mask[row, n:, 0 if parent else width_p] = True
        distance[row, n:, 0 if parent else width_p] = 0
    return _Block(query, key, mask, distance)
