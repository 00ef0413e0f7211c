"""Supervised methods: likelihoods of given answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.core.bounds import NonNegative
from posttrain.parts.base import Aggregate, Limit, PolicyRef
from posttrain.parts.composition import Composition, Method
from posttrain.parts.distillation.divergences import TeacherForwardKL
from posttrain.parts.distillation.teachers import TeacherDistribution
from posttrain.parts.registry import part
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.likelihood import CrossEntropy, Dft, WeightedCrossEntropy


@part
class Sft(Method):
    """Supervised fine-tuning: the likelihood of somebody else's answers."""

    data: Dataset
    aggregate: Aggregate = "token_mean"
    limit: Limit = Limit()

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "expansion or reshaping, decided by the data"
    formula: ClassVar[str] = "-log pi(y_t)"
    paper: ClassVar[str] = "-"

    def compose(self) -> Composition:
        """Data set; no signals; cross-entropy."""
        term = CrossEntropy(aggregate=self.aggregate, limit=self.limit)
        return Composition(source=self.data, terms=(term,))


@part
class WeightedSft(Method):
    """Supervised fine-tuning in which rows count by a weight, or by their logged reward.

    Name the column in the data set: ``data: {path: ..., weight: <column>}``, or ``reward:`` with
    ``by: reward`` (weighted behaviour cloning).
    """

    data: Dataset
    by: Literal["weight", "reward"] = "weight"
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets, weighted"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-w log pi(y_t)"
    paper: ClassVar[str] = "2305.14718"

    def compose(self) -> Composition:
        """Data set with a column of numbers; weighted cross-entropy."""
        term = WeightedCrossEntropy(by=self.by, aggregate=self.aggregate)
        return Composition(source=self.data, terms=(term,))


@part
class Asft(Method):
    """Anchored supervised fine-tuning: DFT, held near the policy that it started from.

    The penalty is the KL over the full vocabulary, the anchor first; ``kl_weight: 0`` is DFT.

    Unconfirmed: the KL's direction was read at second hand; its weight is ours.
    """

    data: Dataset
    kl_weight: NonNegative = 0.1
    anchor: PolicyRef = "input"
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "reshaping, with little drift"
    formula: ClassVar[str] = "-sg(pi(y_t)) log pi(y_t) + kl_weight KL(pi_anchor || pi)"
    paper: ClassVar[str] = "2509.23753"

    def compose(self) -> Composition:
        """Data set; the anchor's distributions; DFT and a forward KL."""
        dft = Dft(aggregate=self.aggregate)
        if not self.kl_weight:
            return Composition(source=self.data, terms=(dft,))
        anchored = TeacherForwardKL(weight=self.kl_weight, aggregate=self.aggregate)
        signal = TeacherDistribution(routes={"*": self.anchor})
        return Composition(source=self.data, signals=(signal,), terms=(dft, anchored))
