"""Checks and functions that terms of several families use.

Shape legend: ``N`` trained tokens, ``S`` sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch

LARGEST_EXPONENT = 20.0
"""Above it exponentials are continued linearly: e^20 is 5e8, and gradients stay nonzero."""


def check_bounds(low: float, high: float) -> None:
    """Refuse a clip range that is empty or reaches below a ratio of 0."""
    if not 0 < low <= 1 or high <= 0:
        raise ConfigError(
            f"clip_low={low}, clip_high={high}", expected="0 < clip_low <= 1 and clip_high > 0"
        )


def capped_exp(x: Tensor) -> Tensor:
    """e^x, continued above ``LARGEST_EXPONENT`` by its tangent.

    An overflow would also break clipped values: their gradient is 0 times infinity, NaN.

    Example:
        >>> import torch
        >>> x = torch.tensor([19.0, 20.0, 21.0])
        >>> [round(y, 3) for y in (capped_exp(x) / capped_exp(x[1])).tolist()]
        [0.368, 1.0, 2.0]
    """
    return x.clamp(max=LARGEST_EXPONENT).exp() * (1 + (x - LARGEST_EXPONENT).clamp(min=0))


def sequence_sums(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[S] sums over each sequence's trained tokens."""
    sums_S = values_N.new_zeros(batch.num_sequences)
    return sums_S.index_add(0, batch.sequence_N, values_N)


def sequence_means(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[S] means over each sequence's trained tokens; 0 for one without any."""
    lengths_S = sequence_sums(values_N.new_ones(values_N.shape), batch)
    return sequence_sums(values_N, batch) / lengths_S.clamp_min(1)
