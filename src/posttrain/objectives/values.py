"""What a term's code returns, and what the registry keeps about it.

Everything that is not the policy's own statistic is a constant in a term's code: columns carry no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.core.config import Config
from posttrain.core.statistics import Divergence, Stat, Wanted
from posttrain.numerics.batch import PackedBatch

Stats = Mapping[Wanted, Tensor]

LARGEST_EXPONENT = 20.0
"""Exponentials go on as straight lines above it: e^20 is 5e8, and gradients stay alive."""


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """A term's loss per unit, and what to show: numbers per unit, averaged like the loss."""

    loss: Tensor
    shown: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TermCode:
    """The code of a term, and the statistics of the policy it reads."""

    reads: frozenset[Stat]
    values: Callable[..., Values]
    compares: Callable[..., frozenset[Divergence]] | None = None  # of a term, from its options

    def wants(self, term: Config) -> frozenset[Wanted]:
        """What the head must compute for a term."""
        return self.reads | (self.compares(term) if self.compares else frozenset())


def sequence_sums(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[S] sums over each sequence's trained tokens."""
    sums_S = torch.zeros(batch.num_sequences, dtype=values_N.dtype, device=values_N.device)
    return sums_S.index_add(0, batch.sequence_N, values_N)


def capped_exp(x: Tensor) -> Tensor:
    """e^x, continued above ``LARGEST_EXPONENT`` by its tangent.

    An overflow would also spoil what a clip holds back: its gradient is 0 times infinity, NaN.

    Example:
        >>> x = torch.tensor([19.0, 20.0, 21.0])
        >>> [round(y, 3) for y in (capped_exp(x) / capped_exp(x[1])).tolist()]
        [0.368, 1.0, 2.0]
    """
    return x.clamp(max=LARGEST_EXPONENT).exp() * (1 + (x - LARGEST_EXPONENT).clamp(min=0))
