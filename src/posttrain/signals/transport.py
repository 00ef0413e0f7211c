"""Signals for pairs that are no pairs in the data: by author, and by rank within the draw.

Shape legend: ``P`` pairs of the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition.preference_signals import MatchQuantiles, PreferDemonstration
from posttrain.core.errors import LegalityError
from posttrain.core.protocols import Policy
from posttrain.core.trajectory import Array, Column, Discard, Group, Scored


@final
@dataclass(frozen=True, slots=True)
class PreferDemonstrationSignal:
    """Whoever wrote the demonstrations is chosen."""

    spec: PreferDemonstration

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``PREFERENCE`` and ``DISCARD`` on every member."""
        return [self._score(g) for g in groups]

    def _score(self, group: Group) -> Group:
        shown = [self.spec.author in m.trajectory.authors for m in group.members]
        texts = [m.trajectory.tokens.tobytes() for m in group.members]
        demonstrations = {t for t, s in zip(texts, shown, strict=True) if s}
        verdicts = [_earlier(m) for m in group.members]
        for i, (text, given) in enumerate(zip(texts, shown, strict=True)):
            if not given and text in demonstrations:
                verdicts[i] = verdicts[i] or float(Discard.DUPLICATE.code)
        left = {s for s, v in zip(shown, verdicts, strict=True) if not v}
        if left != {True, False}:
            verdicts = [v or float(Discard.UNRANKED.code) for v in verdicts]
        members = tuple(
            m.with_columns(
                {
                    Column.PREFERENCE: np.asarray(0.0 if v else 1.0 if s else -1.0),
                    Column.DISCARD: np.asarray(v),
                }
            )
            for m, s, v in zip(group.members, shown, verdicts, strict=True)
        )
        return Group(task=group.task, members=members)


@final
@dataclass(frozen=True, slots=True, eq=False)
class MatchQuantilesSignal:
    """Ranks the pairs of a draw with the weights before the update."""

    spec: MatchQuantiles
    live: Policy

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``QUANTILE`` on every member; 0 on those that are in no pair.

        Raises:
            LegalityError: a group with more than one pair, whose values could not be told apart.
        """
        places = [_pair(g) for g in groups]
        members = [g.members[i] for g, p in zip(groups, places, strict=True) if p for i in p]
        scored = self.live.logprobs([m.trajectory for m in members])
        pi_P2 = np.array([np.nansum(v, dtype=np.float64) for v in scored]).reshape(-1, 2)
        reference = [m.columns[Column.REFERENCE_LOGPROB] for m in members]
        ref_P2 = np.array([np.nansum(v, dtype=np.float64) for v in reference]).reshape(-1, 2)
        values = iter(quantiles(pi_P2, ref_P2, of=self.spec.of))
        return [
            _with_quantiles(g, p, next(values) if p else None)
            for g, p in zip(groups, places, strict=True)
        ]


def quantiles(pi_P2: Array, ref_P2: Array, *, of: str) -> Array:
    """[P, 2] what the (chosen, rejected) answers of each pair are compared with.

    Args:
        pi_P2: [P, 2] log-probs of the policy, (chosen, rejected).
        ref_P2: [P, 2] those of the reference.
        of: ``margins`` or ``rewards``.

    Example:
        >>> pi, ref = np.array([[3.0, 0.0], [1.0, 0.0]]), np.array([[5.0, 0.0], [2.0, 0.0]])
        >>> quantiles(pi, ref, of="margins").tolist()
        [[5.0, 5.0], [2.0, 2.0]]
        >>> quantiles(pi, ref, of="rewards").tolist()  # log-ratios −2, −1 and 0, 0
        [[0.0, -2.0], [0.0, -1.0]]
    """
    if of == "margins":
        matched = _of_same_rank(pi_P2[:, 0] - pi_P2[:, 1], ref_P2[:, 0] - ref_P2[:, 1])
        return np.stack([matched, matched], 1)
    chosen, rejected = (pi_P2 - ref_P2).T
    return np.stack([_of_same_rank(chosen, rejected), _of_same_rank(rejected, chosen)], 1)


def _of_same_rank(values: Array, others: Array) -> Array:
    """For every value the one of its rank among others; equal values rank in their order."""
    out = np.empty_like(values)
    out[values.argsort(kind="stable")] = np.sort(others)
    return out


def _pair(group: Group) -> tuple[int, int] | None:
    """Places of the chosen and the rejected member that are trained on; None for no pair."""
    signs = [0.0 if _earlier(m) else (m.scalar(Column.PREFERENCE) or 0.0) for m in group.members]
    chosen, rejected = ([i for i, s in enumerate(signs) if s * side > 0] for side in (1, -1))
    if not chosen or not rejected:
        return None
    if len(chosen) + len(rejected) > 2:
        raise LegalityError(
            f"task {group.task}: {len(chosen)} chosen and {len(rejected)} rejected answers",
            expected="one of each: match_quantiles ranks pairs",
            fix="rank_pairs leaves one pair of a group",
        )
    return chosen[0], rejected[0]


def _with_quantiles(group: Group, pair: tuple[int, int] | None, values: Array | None) -> Group:
    found = dict(zip(pair, values, strict=True)) if pair and values is not None else {}
    members = tuple(
        m.with_columns({Column.QUANTILE: np.asarray(float(found.get(i, 0.0)))})
        for i, m in enumerate(group.members)
    )
    return Group(task=group.task, members=members)


def _earlier(member: Scored) -> float:
    return member.scalar(Column.DISCARD) or 0.0
