"""Redrawing until a step has enough informative groups.

source ──draw──▶ groups ──keep──▶ count? ──yes──▶ the step, until it is full; then: surplus
   ▲                                └────no──▶ discarded with a reason
   └───────── up to max_draws times ┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from posttrain.core.bounds import Count
from posttrain.core.config import plain
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column, Discard, Group
from posttrain.parts import unions
from posttrain.parts.base import Columns, Signal, Source, bound
from posttrain.parts.columns import discarded, with_verdicts
from posttrain.parts.credit.selection import KeepInformative
from posttrain.parts.registry import part, tag_of
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.tools import Score, Tools
from posttrain.protocols import DataFile, Stateful, Stream


@part
class Redraw(Source):
    """Draws until a step is full of groups worth training on (DAPO, arXiv 2503.14476).

    Every draw is filtered by ``keep``. A group counts unless all its members are discarded; groups
    are drawn, a step's number each time, until enough count or after ``max_draws`` draws. All
    groups stay in the record: discarded ones, and the surplus, with their reason. The step is
    smaller when the last draw does not suffice.

    Draw n of a stage takes its prompts from the n-th block of ``max_draws`` draws, even if not all
    are needed, so that a draw is a function of the step.
    """

    source: Rollouts
    keep: tuple[unions.AnySieve, ...] = (Verify(), KeepInformative())
    max_draws: Count = 10

    def __post_init__(self) -> None:
        if self.max_draws < 2 or not any(Column.DISCARD in s.provides for s in self.keep):
            raise ConfigError(
                f"redraw with max_draws={self.max_draws}, keep={[tag_of(s) for s in self.keep]}",
                expected="at least 2 draws, and a signal that discards, such as keep_informative",
                fix="for a single draw use its source alone",
            )
        if self.source.members is not None and self.source.members.moves:
            raise ConfigError(
                "redraw of guided rollouts whose share moves",
                expected="start and end equal: the share moves by the draw, and draws repeat here",
            )

    @property
    def leaves(self) -> tuple[Source, ...]:
        """The source inside."""
        return (self.source,)

    @property
    def judged_by(self) -> tuple[Signal, ...]:
        """The signals of ``keep``."""
        return self.keep

    @property
    def writes(self) -> frozenset[Kind]:
        """The authors of the source."""
        return self.source.writes

    def provides_for(self, kind: Kind) -> Columns:
        """The columns of the source, and those of ``keep``."""
        return self.source.provides_for(kind).union(*(s.provides for s in self.keep))

    @property
    def draws_from(self) -> tuple[str, ...]:
        """The task sets of the source inside."""
        return self.source.draws_from

    @property
    def origin(self) -> str:
        """The origin of the source inside."""
        return f"{self.source.origin}, drawn up to {self.max_draws} times"

    def identity(self, root: Path) -> dict[str, object]:
        """Its options, with the identity of the source inside."""
        return {**plain(self), "source": self.source.identity(root)}

    def open(self, tools: Tools, *, seed: int) -> RedrawStream:
        """The stream of the source inside, with its filters."""
        judges = [bound(signal, tools) for signal in self.keep]
        return RedrawStream(self, self.source.open(tools, seed=seed), judges)


@final
@dataclass(frozen=True, slots=True, eq=False)
class RedrawStream:
    """Groups worth training on, then all others, with their verdicts."""

    spec: Redraw
    source: Stream
    signals: Sequence[Score]  # those of ``spec.keep``

    @property
    def files(self) -> Sequence[DataFile]:
        """The files of the source inside."""
        return self.source.files

    @property
    def num_groups(self) -> int | None:
        """No end."""
        return None

    @property
    def state(self) -> Stateful | None:
        """The state of the source inside."""
        return self.source.state

    def publish(self, version: int) -> None:
        """Publish to the source inside."""
        self.source.publish(version)

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """The groups that count, at most ``num_groups`` of them, then all others drawn.

        The groups that count come first: a stage with several updates per draw distributes them
        round-robin, so every update gets its share.
        """
        kept, useless = list[Group](), list[Group]()
        for number in range(self.spec.max_draws):
            groups = self.source.draw(num_groups, step=step * self.spec.max_draws + number)
            for signal in self.signals:
                groups = signal(groups)
            for group in groups:
                counts = any(discarded(m) == 0 for m in group.members)
                (kept if counts else useless).append(group)
            if len(kept) >= num_groups:
                break
        surplus = [with_verdicts(g, lambda _: Discard.SURPLUS) for g in kept[num_groups:]]
        return [*kept[:num_groups], *surplus, *useless]
