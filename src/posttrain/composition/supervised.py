"""Terms on single answers: likelihoods of what somebody wrote.

The code behind a term is in ``objectives/supervised.py``.
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition.base import ANYONE, Aggregate
from posttrain.config import Config
from posttrain.provenance import Kind
from posttrain.trajectory import Column


class CrossEntropy(Config, frozen=True, kw_only=True, tag="cross_entropy", tag_field="type"):
    """Negative log-likelihood of the written tokens: −log π(y_t)."""

    weight: float = 1.0
    where: tuple[Kind, ...] = ()  # empty: every author
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = ANYONE


SupervisedTerm = CrossEntropy
