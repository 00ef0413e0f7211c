"""Attention over packed, prefix-shared tokens, through the model library's attention interface.

Models stay stock: they are loaded with ``attn_implementation="posttrain"`` and called with a
*plan* as a keyword argument, which the library passes to every attention layer. The plan defines
which tokens attend to which.

    model(tokens, position_ids, posttrain_plan=plan)
      └─ layer: q, k, v ──▶ attend() ──▶ plan.attend(q, k, v) ──▶ output

Three plans exist: :class:`PackedPlan` here (training, scoring), and the two phases of the local
sampler (prefill, decode) in ``decoding.py``.

Shape legend: ``T`` packed tokens, ``H`` query heads, ``J`` key/value heads, ``D`` head size
(``E`` that of values, where it differs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]  # exported at run time
from transformers import AttentionInterface

from posttrain.core.errors import ModelError
from posttrain.engines.local.flex import FlexBlocks
from posttrain.engines.local.masked import MaskedBlocks
from posttrain.engines.local.tiles import Tiles, attend_tiles
from posttrain.numerics.batch import Segment

IMPLEMENTATION = "posttrain"
PLAN = "posttrain_plan"
OTHER_FAMILY = "use a model of another family; docs/families.md lists those that are exact"


class AttentionPlan(Protocol):
    """Which tokens attend to which, for one forward pass."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """q [T, H, D], k [T, J, D], v [T, J, E] -> [T, H, E]. Called in the order of the layers."""
        ...


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The function registered with the model library. [1, H, T, D] in, [1, T, H, D] out."""
    plan = kwargs.get(PLAN)
    unsupported = [n for n in ("softcap", "s_aux", "alibi") if kwargs.get(n) is not None]
    # A traced size cannot be compared with a number; the model ran untraced before.
    batched = not is_tracing() and query.shape[0] != 1
    if plan is None or unsupported or batched or dropout:
        why = (
            "the model does not hand keyword arguments down to its attention layers"
            if plan is None
            else f"its attention uses {', '.join(unsupported) or 'a batch axis or dropout'}"
        )
        raise ModelError(
            f"{type(module).__name__}: {why}",
            expected="a decoder with plain softmax attention",
            fix=OTHER_FAMILY,
        )
    window = kwargs.get("sliding_window")
    out = plan.attend(  # type: ignore[attr-defined]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window,
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, attend)


@contextmanager
def choosing(what: str) -> Iterator[None]:
    """Turn a family's failure to find this attention into words, while a model is built.

    Raises:
        ModelError: the family chooses its attention from a list of its own.
    """
    try:
        yield
    except KeyError as error:
        if error.args != (IMPLEMENTATION,):
            raise
        raise ModelError(
            f"{what} cannot run packed: it chooses its attention from a list of its own",
            expected="a family that asks the library's attention interface",
            fix=OTHER_FAMILY,
        ) from error


@final
class PackedPlan:
    """Causal attention within each segment, and full attention to its shared prompt.

    Masks and indices are computed once for all layers. On a CPU these are tiles (``tiles.py``),
    and dense masks only if a layer has a sliding window shorter than some token's context. On a
    GPU they are the blocks of ``flex.py``.
    """

    def __init__(self, segments: Sequence[Segment], *, device: torch.device) -> None:
        self._segments, self._device = tuple(segments), device
        self._tiles: Tiles | None = None
        self._masked: MaskedBlocks | None = None
        self._blocks: FlexBlocks | None = None
        self._longest = max((self._past(s) for s in segments), default=0)

    @classmethod
    def of(cls, segments: Sequence[Segment], *, device: torch.device) -> PackedPlan:
        """The plan of a batch's segments."""
        return cls(segments, device=device)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """q [T, H, D], k [T, J, D], v [T, J, E] -> [T, H, E]."""
        limit = None if window is None or window >= self._longest else window
        if self._device.type == "cuda":
            if self._blocks is None:
                self._blocks = FlexBlocks(self._segments, device=self._device)
            return self._blocks.attend(q, k, v, scaling=scaling, window=limit)
        if limit is None:
            if self._tiles is None:
                self._tiles = Tiles.of(self._segments, device=self._device)
            return attend_tiles(q, k, v, self._tiles, scaling=scaling)
        if self._masked is None:
            self._masked = MaskedBlocks.of(self._segments, device=self._device)
        return self._masked.attend(q, k, v, scaling=scaling, window=limit)

    def _past(self, segment: Segment) -> int:
        """Tokens that the segment's last token attends to, itself included."""
        before = 0 if segment.parent is None else self._segments[segment.parent].length
        return before + segment.length
