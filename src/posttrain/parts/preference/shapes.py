"""The data that losses on preferences are made for: files of pairs, and labelled answers.

OnPairs                   Dataset(preference) ─ ReferenceLogprobs ─ term.signals() ─▶ term
OnPairsWithoutReference   Dataset(preference) ──────────────────────────────────────▶ term
OnLabels                  Dataset(unpaired) ─── ReferenceLogprobs ─ term.signals() ─▶ term
"""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from posttrain.parts.base import PolicyRef, Signal, Term
from posttrain.parts.composition import Composition, Method, TermMethod
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.sources.dataset import Dataset


def on_pairs(data: Dataset, *terms: Term, reference: PolicyRef | None = None) -> Composition:
    """A file of pairs; log-probs of a reference, if there is one; the terms."""
    signals: tuple[Signal, ...] = ()
    if reference is not None:
        compared = (s for term in terms for s in term.signals(reference))
        signals = (ReferenceLogprobs(policy=reference), *compared)
    return Composition(source=replace(data, preference=True), signals=signals, terms=terms)


class PairMethod(Method):
    """What methods on a file of pairs share."""

    data: Dataset

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"


class OnPairs(PairMethod, TermMethod):
    """A loss on a file of pairs that stays close to a frozen policy."""

    reference: PolicyRef = "input"

    def around(self, term: Term) -> Composition:
        """Pairs; reference log-probs and what the term compares with; the term."""
        return on_pairs(self.data, term, reference=self.reference)


class OnPairsWithoutReference(PairMethod, TermMethod):
    """A loss on a file of pairs that reads nothing but the policy."""

    def around(self, term: Term) -> Composition:
        """Pairs and the term."""
        return on_pairs(self.data, term)


class OnLabels(TermMethod):
    """A loss on labelled answers. A file of pairs is read as labelled answers too."""

    data: Dataset
    reference: PolicyRef = "input"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "binary labels"
    tendency: ClassVar[str] = "reshaping"

    def around(self, term: Term) -> Composition:
        """Labelled answers; reference log-probs and what the term compares with; the term."""
        return Composition(
            source=replace(self.data, unpaired=True),
            signals=(ReferenceLogprobs(policy=self.reference), *term.signals(self.reference)),
            terms=(term,),
        )
