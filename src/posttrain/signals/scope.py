"""A signal that judges some authors only, for stages whose source is a mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from posttrain.core.protocols import Signal
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Group


@final
@dataclass(frozen=True, slots=True, eq=False)
class ScopedSignal:
    """Hands a signal the groups in which one of ``kinds`` wrote; the others pass unjudged."""

    signal: Signal
    kinds: frozenset[Kind]

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """All groups in their order, some of them with columns added."""
        chosen = [i for i, group in enumerate(groups) if _writers(group) & self.kinds]
        scored = self.signal.score([groups[i] for i in chosen]) if chosen else []
        out = list(groups)
        for index, group in zip(chosen, scored, strict=True):
            out[index] = group
        return out


def _writers(group: Group) -> frozenset[Kind]:
    return frozenset().union(*(member.trajectory.authors for member in group.members))
