"""Preference methods on answers that are good or bad by themselves."""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from posttrain.composition import (
    Composition,
    Dataset,
    LogRatioCentre,
    MismatchedKL,
    PolicyRef,
    ReferenceLogprobs,
)
from posttrain.composition.preference import BinaryClassifier, ProspectValue
from posttrain.core.config import Config


class OnLabels(Config):
    """What methods on labelled answers share. A file of pairs is read as labelled answers too."""

    data: Dataset
    reference: PolicyRef = "input"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "binary labels"
    tendency: ClassVar[str] = "reshaping"


class Kto(OnLabels, tag="kto", tag_field="name"):
    """Kahneman-Tversky optimisation: gains and losses against a moving zero point.

    Draws need at least two prompts: the zero point is over answers to other prompts.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    formula: ClassVar[str] = "w (1 - s(beta label (rho - z0))), z0 = max(0, mismatched rho)"
    paper: ClassVar[str] = "2402.01306"

    def compose(self) -> Composition:
        """Labelled answers; reference log-probs and zero point; prospect value."""
        term = ProspectValue(
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        signals = (ReferenceLogprobs(policy=self.reference), MismatchedKL(policy=self.reference))
        source = replace(self.data, unpaired=True)
        return Composition(source=source, signals=signals, terms=(term,))


class Bco(OnLabels, tag="bco", tag_field="name"):
    """Binary classifier optimisation: the log-ratio is the classifier's logit.

    Unconfirmed: a library's document and its code disagree on the formula; this is the code's.
    """

    beta: float = 0.01

    formula: ClassVar[str] = "-log s(label (beta rho - delta)), delta between good and bad"
    paper: ClassVar[str] = "2404.04656"

    def compose(self) -> Composition:
        """Labelled answers; reference log-probs and shift; binary cross-entropy."""
        return Composition(
            source=replace(self.data, unpaired=True),
            signals=(ReferenceLogprobs(policy=self.reference), LogRatioCentre()),
            terms=(BinaryClassifier(beta=self.beta),),
        )


UnpairedMethod = Kto | Bco
