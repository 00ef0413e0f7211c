"""Inputs of losses on preferences: one number for each side of a pair.

Shape legend: ``N`` trained tokens, ``S`` sequences, ``P`` pairs, ``E`` tokens of all sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from posttrain.core.errors import ConfigError
from posttrain.core.lazy import torch
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, Stats, Term, Unit, Values
from posttrain.parts.tensors import sequence_sums

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch


@dataclass(frozen=True, slots=True, eq=False)
class PairValues:
    """One number per pair, [P], for the chosen and for the rejected answer."""

    chosen: Tensor
    rejected: Tensor

    @property
    def gap(self) -> Tensor:
        """[P] chosen minus rejected."""
        return self.chosen - self.rejected

    def map(self, function: Callable[[Tensor], Tensor]) -> PairValues:
        """The same function of both sides."""
        return PairValues(function(self.chosen), function(self.rejected))


def log_ratio_N(stats: Stats, batch: PackedBatch) -> Tensor:
    """[N] log π − log π_ref."""
    return stats[Stat.LOGPROB] - batch.columns[Column.REFERENCE_LOGPROB]


def sums(values_N: Tensor, batch: PackedBatch) -> PairValues:
    """Sums over each answer's trained tokens."""
    per_S = sequence_sums(values_N, batch)
    return PairValues(per_S[batch.pairs_P2[:, 0]], per_S[batch.pairs_P2[:, 1]])


def means(values_N: Tensor, batch: PackedBatch) -> PairValues:
    """Means over each answer's trained tokens."""
    total, length = sums(values_N, batch), sums(torch.ones_like(values_N), batch)
    return PairValues(total.chosen / length.chosen, total.rejected / length.rejected)


def shared_sums(values_N: Tensor, batch: PackedBatch, *, tail: float) -> PairValues:
    """Sums with weight ``tail`` on tokens beyond the shorter answer's length."""
    lengths_S = batch.sequence_N.bincount(minlength=batch.num_sequences)
    starts_S = lengths_S.cumsum(0) - lengths_S
    shared_P = lengths_S[batch.pairs_P2].min(-1).values

    def side(sequence_P: Tensor) -> Tensor:
        # One entry per (pair, token of this side): a sequence may be in several pairs.
        length_P = lengths_S[sequence_P]
        pair_E = torch.arange(len(length_P), device=length_P.device).repeat_interleave(length_P)
        first_P = length_P.cumsum(0) - length_P
        place_E = torch.arange(len(pair_E), device=pair_E.device) - first_P[pair_E]
        value_E = values_N[starts_S[sequence_P][pair_E] + place_E]
        counted_E = torch.where(place_E < shared_P[pair_E], value_E, tail * value_E)
        return value_E.new_zeros(len(length_P)).index_add(0, pair_E, counted_E)

    return PairValues(side(batch.pairs_P2[:, 0]), side(batch.pairs_P2[:, 1]))


def paired(loss_P: Tensor, margin_P: Tensor, sides: PairValues) -> Values:
    """Loss and metrics of pairs; per-side values show whether the chosen side falls too."""
    margin_P = margin_P.detach()
    shown = {
        "margin": margin_P,
        "accuracy": (margin_P > 0).float(),
        "chosen": sides.chosen.detach(),
        "rejected": sides.rejected.detach(),
    }
    return Values(loss_P, shown)


def judged(loss_S: Tensor, reward_S: Tensor, label_S: Tensor) -> Values:
    """[S] loss, with the reward of every answer and its accuracy against the label as metrics."""
    right_S = (reward_S.detach() * label_S > 0).float()
    return Values(loss_S, {"reward": reward_S.detach(), "accuracy": right_S})


def require(ok: bool, found: str, expected: str) -> None:
    """Raise ConfigError unless ``ok``."""
    if not ok:
        raise ConfigError(found, expected=expected)


class PairTerm(Term):
    """Base class of losses on pairs. ``where`` keeps pairs with these authors on both sides."""

    unit: ClassVar[Unit] = "pair"
    aggregate: ClassVar[str] = "pair_mean"
    needs: ClassVar[Columns] = frozenset({Column.REFERENCE_LOGPROB, Column.PREFERENCE})
