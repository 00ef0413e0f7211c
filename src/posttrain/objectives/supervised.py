"""The code of the terms in ``composition/supervised.py``."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.batch import PackedBatch
from posttrain.composition.supervised import CrossEntropy
from posttrain.config import Config
from posttrain.head import Stat
from posttrain.objectives.values import Stats, TermCode, Values


def cross_entropy(term: CrossEntropy, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −log π(y)."""
    return Values(-stats[Stat.LOGPROB])


TERMS: Mapping[type[Config], TermCode] = {
    CrossEntropy: TermCode(frozenset({Stat.LOGPROB}), cross_entropy),
}
