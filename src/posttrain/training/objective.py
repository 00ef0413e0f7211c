"""An objective: a weighted sum of terms, each over its own units.

hidden states ──head, chunked──▶ statistics [N] ──term──▶ values [N] or [P]
                                                 ──reduce──▶ scalar ──weight──▶ loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from posttrain.core.statistics import SCALARS, Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.numerics.head import token_stats
from posttrain.numerics.logits import Head
from posttrain.parts.base import Term
from posttrain.parts.registry import tag_of
from posttrain.training.authors import author_sums
from posttrain.training.reduce import count_units, reduce_units
from posttrain.training.units import as_read, read_tokens, selected_units

NO_SCALARS: Mapping[Wanted, Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class StageObjective:
    """The terms of a stage, evaluated on packed batches."""

    terms: tuple[Term, ...]
    progress: float = 0.0  # share of the stage's updates done, for scheduled weights
    state: Mapping[str, float] = field(default_factory=dict)  # the terms' state, by name
    teachers: tuple[Head, ...] = ()  # heads of teachers; signals refer to them by index

    @property
    def needs(self) -> frozenset[Column]:
        """Columns that ``pack`` must include."""
        return frozenset().union(*(t.needs | t.limit.needs for t in self.terms))

    def at(
        self, *, step: int, steps: int, state: Mapping[str, float] | None = None
    ) -> StageObjective:
        """The objective of one update: the first has the initial weights, the last the final.

        ``state`` is the state after earlier updates, kept by the learner; see :meth:`after`.

        Example:
            >>> from posttrain.parts.base import WeightSchedule
            >>> from posttrain.parts.supervised.likelihood import CrossEntropy
            >>> moving = CrossEntropy(weight=2.0, weight_schedule=WeightSchedule(end=0.0))
            >>> [StageObjective((moving,)).at(step=s, steps=5).weights for s in (0, 2, 4)]
            [(2.0,), (1.0,), (0.0,)]
        """
        return replace(self, progress=step / max(steps - 1, 1), state=state or {})

    def after(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """The terms' state after an update with these metrics, by name."""
        state: dict[str, float] = {}
        for name, term in zip(self.names, self.terms, strict=True):
            own = term.remember(_own(self.state, name), _own(metrics, name))
            state |= {f"{name}/{key}": value for key, value in own.items()}
        return state

    @property
    def weights(self) -> tuple[float, ...]:
        """The current weight of every term."""
        return tuple(
            self._scheduled(term) * term.factor(_own(self.state, name))
            for name, term in zip(self.names, self.terms, strict=True)
        )

    def _scheduled(self, term: Term) -> float:
        if term.weight_schedule is None:
            return term.weight
        return term.weight_schedule.at(term.weight, progress=self.progress)

    @property
    def moving(self) -> Mapping[str, float]:
        """The current weights that follow a schedule or a measurement, by metric name."""
        now = zip(self.names, self.terms, self.weights, strict=True)
        return {f"{n}/weight": w for n, t, w in now if t.moves}

    @property
    def names(self) -> tuple[str, ...]:
        """A metric name per term: its tag, numbered where two terms have the same tag."""
        tags = [tag_of(t) for t in self.terms]
        return tuple(
            tag if tags.count(tag) == 1 else f"{tag}-{tags[: i + 1].count(tag)}"
            for i, tag in enumerate(tags)
        )

    @property
    def reads(self) -> frozenset[Wanted]:
        """Statistics of the policy, and divergences from a teacher, that some term reads."""
        own = frozenset[Wanted]().union(*(t.reads for t in self.terms))
        by_entropy = any(t.limit.entropy_share is not None for t in self.terms)
        return own | {Stat.ENTROPY} if by_entropy else own

    @property
    def scalars(self) -> frozenset[Stat]:
        """Statistics of a scalar head that some term reads."""
        return frozenset(s for s in SCALARS if s in self.reads)

    @property
    def reads_logits(self) -> bool:
        """False when the terms read statistics of a scalar head only."""
        return not self.reads <= SCALARS

    def counts(self, batches: Sequence[PackedBatch]) -> tuple[int, ...]:
        """Global number of units per term, over all micro-batches of a step."""
        return tuple(_count(t, batches) for t in self.terms)

    def loss(
        self,
        hidden_NX: Tensor,
        head: Head,
        batch: PackedBatch,
        *,
        counts: Sequence[int],
        vocab_size: int,
        scalars: Mapping[Wanted, Tensor] = NO_SCALARS,
    ) -> tuple[Tensor, Mapping[str, float]]:
        """This micro-batch's share of the loss and of every metric.

        Shares add up: the step's loss and metrics are the sums over its micro-batches.
        ``scalars`` holds the statistics that :attr:`scalars` names.
        """
        wanted = self.reads - SCALARS
        by_logits = token_stats(
            hidden_NX,
            head,
            batch,
            wanted=wanted,
            vocab_size=vocab_size,
            teachers=self.teachers,
        )
        stats = {**by_logits, **scalars}
        total = hidden_NX.new_zeros((), dtype=torch.float32)
        metrics: dict[str, float] = author_sums(batch, stats, vocab_size=vocab_size)
        parts = zip(self.names, self.terms, self.weights, counts, strict=True)
        for name, term, weight, count in parts:
            seen, seen_stats = as_read(term, batch, stats)
            if len(seen.target_N) == 0:
                total, metrics[name] = total + 0.0 * hidden_NX.sum(), 0.0
                continue
            keep = selected_units(term, seen, entropy_N=seen_stats.get(Stat.ENTROPY))

            def share(
                per_unit: Tensor,
                term: Term = term,
                seen: PackedBatch = seen,
                count: int = count,
                keep: Tensor | None = keep,
                shown: bool = True,
            ) -> Tensor:
                return reduce_units(term, per_unit, seen, count=count, keep=keep, shown=shown)

            values = term.values(seen_stats, seen)
            own = share(values.loss, shown=False)
            total = total + weight * own
            metrics[name] = float(own.detach())
            for shown, per_unit in values.shown.items():
                metrics[f"{name}/{shown}"] = float(share(per_unit.detach()))
            if Stat.ENTROPY in term.reads:
                metrics["entropy"] = float(share(seen_stats[Stat.ENTROPY].detach()))
        return total, metrics


def _count(term: Term, batches: Sequence[PackedBatch]) -> int:
    seen = [b.only(read_tokens(term, b)) for b in batches]
    seen = [b for b in seen if len(b.target_N)]
    return count_units(term, seen, keep=[selected_units(term, b) for b in seen])


def _own(values: Mapping[str, float], name: str) -> Mapping[str, float]:
    """The entries of one term, without its name as prefix."""
    return {
        key.removeprefix(f"{name}/"): value
        for key, value in values.items()
        if key.startswith(f"{name}/")
    }
