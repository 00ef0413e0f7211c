"""An objective: a weighted sum of terms, each over its own units.

hidden states ──head, chunked──▶ statistics [N] ──term──▶ values [N] or [P]
                                                 ──reduce──▶ scalar ──weight──▶ loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.batch import PackedBatch
from posttrain.composition import TermSpec
from posttrain.head import Head, Stat, token_stats
from posttrain.objectives.reduce import count_units, reduce_units
from posttrain.objectives.terms import TERMS
from posttrain.trajectory import Column


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """The terms of a stage, ready to be evaluated on packed batches."""

    terms: tuple[TermSpec, ...]

    @property
    def needs(self) -> frozenset[Column]:
        """Columns that ``pack`` must bring along."""
        return frozenset().union(*(t.needs for t in self.terms))

    @property
    def names(self) -> tuple[str, ...]:
        """A metric name per term: its tag, numbered where two terms have the same one."""
        tags = [str(t.__struct_config__.tag) for t in self.terms]
        return tuple(
            tag if tags.count(tag) == 1 else f"{tag}-{tags[: i + 1].count(tag)}"
            for i, tag in enumerate(tags)
        )

    @property
    def reads(self) -> frozenset[Stat]:
        """Statistics of the policy that some term reads."""
        return frozenset().union(*(TERMS[type(t)].reads for t in self.terms))

    def counts(self, batches: Sequence[PackedBatch]) -> tuple[int, ...]:
        """Global number of units per term, over all micro-batches of a step."""
        return tuple(count_units(t, batches) for t in self.terms)

    def loss(
        self,
        hidden_NX: Tensor,
        head: Head,
        batch: PackedBatch,
        *,
        counts: Sequence[int],
        vocab_size: int,
    ) -> tuple[Tensor, Mapping[str, float]]:
        """This micro-batch's share of the loss, and of every shown metric.

        Shares add up: the step's loss and metrics are the sums over its micro-batches.
        """
        stats = token_stats(hidden_NX, head, batch, wanted=self.reads, vocab_size=vocab_size)
        total = hidden_NX.new_zeros((), dtype=torch.float32)
        metrics: dict[str, float] = {}
        for name, term, count in zip(self.names, self.terms, counts, strict=True):
            values = TERMS[type(term)].values(term, stats, batch)
            share = reduce_units(term, values.loss, batch, count=count)
            total = total + term.weight * share
            metrics[name] = float(share.detach())
            for shown, per_unit in values.shown.items():
                reduced = reduce_units(term, per_unit.detach(), batch, count=count)
                metrics[f"{name}/{shown}"] = float(reduced)
            if Stat.ENTROPY in TERMS[type(term)].reads:
                entropy = reduce_units(term, stats[Stat.ENTROPY].detach(), batch, count=count)
                metrics["entropy"] = float(entropy)
        return total, metrics
