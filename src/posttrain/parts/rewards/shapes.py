"""What methods that train a judge share: its scalar head, and a file of pairs."""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from posttrain.core.learner import ScalarHead
from posttrain.parts.base import Term
from posttrain.parts.composition import Composition, TermMethod
from posttrain.parts.sources.dataset import Dataset

JUDGE = ScalarHead(trunk="shared")
"""The model that is trained is the judge: its own hidden states are read."""

NO_ROLE = "none: it judges, and does not act"


class JudgeOnPairs(TermMethod):
    """A reward model from a file of pairs.

    The stage's model is the reward model; name the stage as ``model`` of a reward_model signal.
    Pairs may have margins of their own: name their column in the data set.
    """

    data: Dataset

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preferences"
    tendency: ClassVar[str] = NO_ROLE

    def around(self, term: Term) -> Composition:
        """Pairs; the term on the score after the last token."""
        if self.data.margin:
            term = replace(term, margin="column")
        return Composition(
            source=replace(self.data, preference=True), terms=(term,), scalar_head=JUDGE
        )
