"""The data that losses on single answers are made for: demonstrations."""

from __future__ import annotations

from typing import ClassVar

from posttrain.parts.base import Term
from posttrain.parts.composition import Composition, TermMethod
from posttrain.parts.sources.dataset import Dataset


class OnDemonstrations(TermMethod):
    """A loss on a file of demonstrations."""

    data: Dataset

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "reshaping"

    def around(self, term: Term) -> Composition:
        """Demonstrations; what the term compares with; the term."""
        return Composition(source=self.data, signals=term.signals("input"), terms=(term,))
