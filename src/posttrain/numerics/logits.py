"""Logits of a chunk of tokens: the policy's and its teachers'.

    policy's hidden states ──its head──────────▶ logits [n, V]   ┐
    teachers' hidden states ──each one's head──▶ logits [n, V]   ├─ only a chunk at a time
    or their recorded log-probs ───────────────▶ rows of [N, V]  ┘

Shape legend: ``N`` trained tokens, ``n`` those of a chunk, ``X`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.numerics.matmul import by_onednn, linear_layers, product

CHUNK_ELEMENTS = 2**24
"""Elements of one chunk's logits (64 MiB in float32). Log-softmax and statistics need a few times
that in addition."""

CHUNK_ROWS = 256
"""Tokens of a chunk on a CPU, where a chunk that fits into the cache is faster than a long one;
more for a small vocabulary, fewer where ``CHUNK_ELEMENTS`` limits them."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, X] -> float32 logits [N, V], scaling and soft-capping included."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """A head that is one product: scale · (h Wᵀ + b), in float32."""

    weight_VX: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0

    def __call__(self, hidden_NX: Tensor) -> Tensor:
        """Logits [N, V]."""
        with linear_layers():
            logits_NV = F.linear(hidden_NX, self.weight_VX, self.bias_V).float()
        return logits_NV if self.scale == 1 else logits_NV * self.scale

    def into(self, room_nV: Tensor | None, hidden_nX: Tensor) -> Tensor:
        """Logits [n, V] without a gradient; written to ``room_nV`` where the product allows it."""
        if room_nV is not None and hidden_nX.dtype == torch.float32 and not by_onednn():
            logits_nV = torch.mm(hidden_nX, self.weight_VX.t(), out=room_nV[: len(hidden_nX)])
            if self.bias_V is not None:
                logits_nV.add_(self.bias_V)
        else:
            logits_nV = product(hidden_nX, self.weight_VX, self.bias_V).float()
        return logits_nV if self.scale == 1 else logits_nV.mul_(self.scale)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Teachers:
    """The teachers of a batch with log-probs over the whole vocabulary. No gradient.

    A token's teacher is given by its log-probs, by its hidden state and head, or not at all.
    All have the same ids, ``width`` of them. They may be the first of the policy's: then the two
    are compared given that the token is one of these.
    """

    known_N: Tensor  # bool: the token has a teacher
    everywhere: bool  # whether all tokens have one
    width: int
    logp_NV: Tensor | None
    states_NX: Tensor | None  # as wide as the widest teacher
    number_N: Tensor | None  # index of the head that reads them, -1 where there is none
    readers: Mapping[int, tuple[Head, int]]  # heads in use by index, and their hidden size

    @classmethod
    def of(cls, batch: PackedBatch, heads: Sequence[Head]) -> Teachers | None:
        """From a batch's columns; None where they hold no teacher, or only its top-k."""
        logp_NV = batch.columns.get(Column.TEACHER_LOGPROBS)
        if logp_NV is not None and batch.columns[Column.TEACHER_IDS].shape[1]:
            return None
        states_NX = batch.columns.get(Column.TEACHER_STATES)
        if logp_NV is None and states_NX is None:
            return None
        known_N = torch.zeros_like(batch.target_N, dtype=torch.bool)
        if logp_NV is not None:
            known_N |= ~logp_NV[:, 0].isnan()
        number_N, readers = None, dict[int, tuple[Head, int]]()
        if states_NX is not None:
            number_S = batch.columns[Column.TEACHER_HEAD].nan_to_num(nan=-1.0).long()
            number_N = number_S[batch.sequence_N].masked_fill(states_NX[:, 0].isnan(), -1)
            known_N |= number_N >= 0
            for number in set(number_N.tolist()) - {-1}:
                one_X = states_NX[(number_N == number).nonzero()[0, 0]]
                readers[number] = heads[number], int((~one_X.isnan()).sum())
        width = _width(logp_NV, states_NX, number_N, readers)
        everywhere = bool(known_N.all())
        return cls(known_N, everywhere, width, logp_NV, states_NX, number_N, readers)

    @torch.no_grad()
    def logits(self, part: slice, room_nV: Tensor) -> Tensor:
        """[n, ``width``] of a chunk, each row up to a constant; 0 where a token has no teacher.

        Do not write to the result. It may be a view of ``room_nV``.
        """
        known_n, room_nV = self.known_N[part], room_nV[:, : self.width]
        if self.everywhere and self.logp_NV is not None and not self.readers:
            return self.logp_NV[part]
        if self.everywhere and self.logp_NV is None and len(self.readers) == 1:
            (number,) = self.readers
            return self._read(number, slice(None), part, room_nV)
        out_nV = room_nV[: len(known_n)].zero_()
        if self.logp_NV is not None:
            has_n = ~self.logp_NV[part, 0].isnan()
            out_nV[has_n] = self.logp_NV[part][has_n]
        for number in self.readers:
            assert self.number_N is not None  # where there are readers
            mine_m = (self.number_N[part] == number).nonzero()[:, 0]
            if len(mine_m):
                out_nV[mine_m] = self._read(number, mine_m, part, None)
        return out_nV

    def _read(
        self, number: int, rows_m: Tensor | slice, part: slice, room_nV: Tensor | None
    ) -> Tensor:
        """Logits [m, V] of one teacher at some tokens of a chunk."""
        assert self.states_NX is not None  # where there are readers
        head, width = self.readers[number]
        states_mX = self.states_NX[part][rows_m, :width]
        if not isinstance(head, LinearHead):
            return head(states_mX).float()
        states_mX = states_mX.to(head.weight_VX.dtype)
        return head(states_mX) if room_nV is None else head.into(room_nV, states_mX)


def _width(
    logp_NV: Tensor | None,
    states_NX: Tensor | None,
    number_N: Tensor | None,
    readers: Mapping[int, tuple[Head, int]],
) -> int:
    """Ids of a batch's teachers."""
    if logp_NV is not None:
        return logp_NV.shape[1]
    if states_NX is None or number_N is None or not readers:
        return 0
    number, (head, size) = next(iter(readers.items()))
    if isinstance(head, LinearHead):
        return len(head.weight_VX)
    with torch.no_grad():
        one_1X = states_NX[(number_N == number).nonzero()[0, 0], :size][None]
        return head(one_1X).shape[-1]


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Tokens of a chunk."""
    most = max(CHUNK_ELEMENTS // vocab, 1)
    return min(most, max(CHUNK_ROWS, 2**20 // vocab)) if device.type == "cpu" else most


def chunks(num: int, rows: int) -> Iterator[slice]:
    """All tokens, chunk by chunk."""
    return (slice(start, start + rows) for start in range(0, num, rows))
