"""Any legal composition, by hand."""

from __future__ import annotations

from typing import ClassVar

from posttrain import extensions
from posttrain.composition import Composition, MovingReference, ScalarHead, SourceSpec
from posttrain.core.config import Config


class Compose(Config, tag="compose", tag_field="name"):
    """Any legal composition, spelt out."""

    source: SourceSpec
    terms: tuple[extensions.AnyTerm, ...]
    signals: tuple[extensions.AnySignal, ...] = ()
    moving: MovingReference | None = None
    scalar_head: ScalarHead | None = None

    provenance: ClassVar[str] = "as composed"
    interface: ClassVar[str] = "as composed"
    tendency: ClassVar[str] = "measure it"
    formula: ClassVar[str] = "the weighted sum of the terms"
    paper: ClassVar[str] = "-"

    def compose(self) -> Composition:
        """Itself."""
        return Composition(
            source=self.source,
            signals=self.signals,
            terms=self.terms,
            moving=self.moving,
            scalar_head=self.scalar_head,
        )
