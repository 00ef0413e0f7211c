"""Supervised methods: likelihoods of given answers."""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition import Aggregate, Composition, CrossEntropy, Dataset
from posttrain.config import Config


class Sft(Config, frozen=True, kw_only=True, tag="sft", tag_field="name"):
    """Supervised fine-tuning: the likelihood of somebody else's answers."""

    data: Dataset
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "expansion or reshaping, decided by the data"
    formula: ClassVar[str] = "-log pi(y_t)"
    paper: ClassVar[str] = "-"

    def compose(self) -> Composition:
        """Data set; no signals; cross-entropy."""
        return Composition(source=self.data, terms=(CrossEntropy(aggregate=self.aggregate),))


SupervisedMethod = Sft
