"""A mix of sources: every draw takes its groups from the parts in their shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from posttrain.composition import Mix
from posttrain.core.protocols import Source
from posttrain.core.trajectory import Group


@final
@dataclass(frozen=True, slots=True, eq=False)
class MixSource:
    """Draws from each part as many groups as its share asks for, one part after the other.

    Every part runs through its own groups without a gap, whatever the others do. When all shares
    come out in whole groups, each part is drawn at once. Otherwise parts are drawn group by group,
    since a part is a function of (number of groups, step) and the number changes: for rollouts
    choose ``groups_per_step`` so that it does not, or their sampler works on one group at a time.
    """

    spec: Mix
    parts: Sequence[Source]

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """``num_groups`` groups, those of the first part first."""
        counts = self.spec.counts(num_groups, step=step)
        if all(
            abs(share * num_groups - round(share * num_groups)) < 1e-6 for share in self.spec.shares
        ):
            drawn = [
                part.draw(count, step=step) for part, count in zip(self.parts, counts, strict=True)
            ]
            return [group for groups in drawn for group in groups]
        before = self.spec.counts(step * num_groups, step=0)  # what each part gave so far
        return [
            group
            for part, start, count in zip(self.parts, before, counts, strict=True)
            for index in range(start, start + count)
            for group in part.draw(1, step=index)
        ]
