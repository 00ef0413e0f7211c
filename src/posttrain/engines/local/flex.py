"""Packed attention on a GPU: the whole batch in one call of FlexAttention (arXiv 2412.05496).

The mask is a function of two token indices, from which the kernel is compiled; blocks of 128 × 128
pairs that are fully masked are not computed.

    reads(q, k) = own(q) == own(k) and k ≤ q    or    parent(own(q)) == own(k)

Its forward pass is tested on a CPU, where there is no backward pass. **It has not been run on a
GPU yet**; on a CPU ``tiles.py`` is used.

Shape legend: ``T`` packed tokens, ``H`` query heads, ``J`` key/value heads, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from posttrain.numerics.batch import Segment


@final
class FlexBlocks:
    """The unmasked blocks of a batch, computed once for all layers with the same window."""

    def __init__(self, segments: Sequence[Segment], *, device: torch.device) -> None:
        lengths = np.array([s.length for s in segments])
        parents = np.array([-1 if s.parent is None else s.parent for s in segments])
        before = np.where(parents < 0, 0, lengths[parents])
        # A packed batch is its segments one after the other, so tokens follow from the lengths.
        own_T = np.repeat(np.arange(len(lengths)), lengths)
        starts_T = np.repeat(np.cumsum(lengths) - lengths, lengths)
        position_T = np.arange(len(own_T)) - starts_T + before[own_T]
        self._device = device
        self._own_T, self._parent_T, self._position_T = (
            torch.from_numpy(x.astype(np.int32)).to(device)
            for x in (own_T, parents[own_T], position_T)
        )
        self._masks: dict[int | None, BlockMask] = {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """q [T, H, D], k and v [T, J, D] -> [T, H, D]."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        out: Tensor = _kernel(compiled=self._device.type == "cuda")(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            block_mask=self._masks[window],
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        own_T, parent_T, position_T = self._own_T, self._parent_T, self._position_T

        def reads(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = ((own_T[q] == own_T[k]) & (k <= q)) | (parent_T[q] == own_T[k])
            return seen if window is None else seen & (position_T[q] - position_T[k] < window)

        num = len(own_T)
        return create_block_mask(reads, None, None, num, num, device=self._device)


@cache
def _kernel(*, compiled: bool) -> Callable[..., Tensor]:
    """The kernel; compiled at first use, for any number of tokens."""
    plain: Any = flex_attention
    return torch.compile(plain, dynamic=True) if compiled else plain
