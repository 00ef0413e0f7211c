"""A mix of sources: every draw takes groups from the parts by their shares.

num_groups, step ──counts──▶ (2, 6) ──▶ parts[0].draw, parts[1].draw ──▶ 8 groups
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import ClassVar, final

from posttrain.core.bounds import Inner
from posttrain.core.config import plain
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Group
from posttrain.parts import unions
from posttrain.parts.base import NONE, Columns, Source
from posttrain.parts.registry import part, tag_of
from posttrain.parts.tools import Tools
from posttrain.protocols import DataFile, Stateful, Stream


@part
class Mix(Source):
    """Several sources in fixed proportion: ``shares[i]`` of all groups come from ``parts[i]``.

    A column counts as provided for an author when every part with this author provides it, so a
    term on the learner's tokens may need columns that a data set cannot have. A signal scores only
    the groups of authors whose terms need its columns.

    Example:
        >>> from posttrain import Dataset, Rollouts
        >>> demos, own = Dataset(path="demos.jsonl"), Rollouts(tasks=("sums",))
        >>> mixed = Mix(parts=(demos, own), shares=(0.3, 0.7))
        >>> [mixed.counts(8, step=s) for s in range(3)]
        [(2, 6), (3, 5), (2, 6)]
        >>> mixed.provides, sorted(mixed.provides_for(Kind.LEARNER))
        (frozenset(), [<Column.BEHAVIOUR_LOGPROB: 'behaviour_logprob'>])
    """

    parts: tuple[unions.AnySource, ...]
    shares: tuple[Inner, ...]

    mixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if nested := [tag_of(p) for p in self.parts if p.leaves != (p,)]:
            raise ConfigError(
                f"a mix of {', '.join(nested)}", expected="parts that draw by themselves"
            )
        fits = len(self.parts) == len(self.shares) >= 2 and min(self.shares) > 0
        if not fits or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(
                f"a mix of {len(self.parts)} parts with shares {list(self.shares)}",
                expected="two parts or more, and for each a share above zero; shares sum to 1",
            )

    @property
    def leaves(self) -> tuple[Source, ...]:
        """The parts."""
        return self.parts

    @property
    def leaf_shares(self) -> tuple[float, ...]:
        """The shares."""
        return self.shares

    @property
    def writes(self) -> frozenset[Kind]:
        """The authors of all parts."""
        return frozenset().union(*(p.writes for p in self.parts))

    @property
    def provides(self) -> Columns:
        """Columns that every part provides."""
        return frozenset.intersection(*(p.provides for p in self.parts))

    def provides_for(self, kind: Kind) -> Columns:
        """Columns of every group of this author."""
        parts = [p.provides_for(kind) for p in self.parts if kind in p.writes]
        return frozenset.intersection(*parts) if parts else NONE

    @property
    def draws_from(self) -> tuple[str, ...]:
        """The task sets of all parts."""
        return tuple(dict.fromkeys(name for p in self.parts for name in p.draws_from))

    @property
    def origin(self) -> str:
        """The parts and their shares."""
        shares = zip(self.shares, self.parts, strict=True)
        return "; ".join(f"{share:.0%} {p.regime}: {p.origin}" for share, p in shares)

    def identity(self, root: Path) -> dict[str, object]:
        """Its options, with the identities of its parts."""
        return {**plain(self), "parts": [p.identity(root) for p in self.parts]}

    def open(self, tools: Tools, *, seed: int) -> MixStream:
        """The streams of all parts, each with its own seed."""
        seeds = (zlib.crc32(f"{seed}/{index}".encode()) for index in range(len(self.parts)))
        opened = zip(self.parts, seeds, strict=True)
        return MixStream(self, [leaf.open(tools, seed=own) for leaf, own in opened])

    def counts(self, num_groups: int, *, step: int) -> tuple[int, ...]:
        """Number of groups of a draw from each part. They sum to ``num_groups``.

        Shares that give whole numbers of groups are exact in every draw. Others are met over draws:
        the cumulative number of a part is within one group of its share (for two or three parts;
        each further part may add half a group).
        """
        before, after = (self._given((step + more) * num_groups) for more in (0, 1))
        return tuple(b - a for a, b in zip(before, after, strict=True))

    def _given(self, num_groups: int) -> tuple[int, ...]:
        """Groups of each part among the first ``num_groups``.

        Parts are split off one at a time, each by rounding its share of the rest. Every count is
        then monotone in ``num_groups``, which largest remainders over all parts are not.
        """
        counts, left, share_left = list[int](), num_groups, 1.0
        for share in self.shares[:-1]:
            # Plus a small epsilon, so that a half with float error rounds like a half.
            counts.append(min(floor(left * min(share / share_left, 1.0) + 0.5 + 1e-9), left))
            left, share_left = left - counts[-1], share_left - share
        return (*counts, left)


@final
@dataclass(frozen=True, slots=True, eq=False)
class MixStream:
    """Draws the groups of each part by its share, one part after the other.

    Every part draws its own groups without gaps, independent of the others. When all shares give
    whole numbers of groups, each part is drawn at once. Otherwise parts are drawn group by group,
    since a draw is a function of (number of groups, step) and the number changes: for rollouts
    choose ``groups_per_step`` so that it does not, or the sampler works on one group at a time.
    """

    spec: Mix
    parts: Sequence[Stream]

    @property
    def files(self) -> Sequence[DataFile]:
        """The files of all parts."""
        return [file for stream in self.parts for file in stream.files]

    @property
    def num_groups(self) -> int | None:
        """No end."""
        return None

    @property
    def state(self) -> Stateful | None:
        """The states of its parts."""
        states = [stream.state for stream in self.parts]
        return MixState(states) if any(s is not None for s in states) else None

    def publish(self, version: int) -> None:
        """Publish to every part."""
        for stream in self.parts:
            stream.publish(version)

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """``num_groups`` groups, those of the first part first."""
        counts = self.spec.counts(num_groups, step=step)
        if all(
            abs(share * num_groups - round(share * num_groups)) < 1e-6 for share in self.spec.shares
        ):
            drawn = [
                stream.draw(count, step=step)
                for stream, count in zip(self.parts, counts, strict=True)
            ]
            return [group for groups in drawn for group in groups]
        before = self.spec.counts(step * num_groups, step=0)  # groups of each part so far
        return [
            group
            for stream, start, count in zip(self.parts, before, counts, strict=True)
            for index in range(start, start + count)
            for group in stream.draw(1, step=index)
        ]


@final
@dataclass(frozen=True, slots=True, eq=False)
class MixState:
    """The states of several parts, each in its own folder."""

    states: Sequence[Stateful | None]

    def save(self, folder: Path) -> None:
        """Write every state, by the number of its part."""
        for number, state in enumerate(self.states):
            if state is not None:
                (folder / f"part-{number}").mkdir()
                state.save(folder / f"part-{number}")

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        for number, state in enumerate(self.states):
            if state is not None:
                state.load(folder / f"part-{number}")
