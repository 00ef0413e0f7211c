"""Which parts of a composition read a scalar head: what decides that a stage has one."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain import extensions
from posttrain.composition.reward_models import RewardModelTerm
from posttrain.composition.values import Readout, ValueTerm
from posttrain.core.config import Config

ScalarTerm = ValueTerm | RewardModelTerm
"""Terms of ours that read a scalar head."""


def readouts(terms: Iterable[Config]) -> frozenset[Readout]:
    """Where the terms read a scalar head: before tokens, after them, or nowhere.

    Example:
        >>> from posttrain.composition import CrossEntropy, ValueLoss
        >>> readouts([CrossEntropy()]), readouts([CrossEntropy(), ValueLoss()])
        (frozenset(), frozenset({'value'}))
    """
    found: set[Readout] = set()
    for term in terms:
        if isinstance(term, ScalarTerm):
            found.add(term.readout)
        elif (theirs := extensions.term_extension(type(term))) is not None:
            kinds: tuple[Readout, ...] = ("value", "score")
            found |= {r for r in kinds if r in theirs.reads}
    return frozenset(found)
