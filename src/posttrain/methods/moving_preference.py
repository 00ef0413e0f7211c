"""Preference methods whose reference or opponent is not the same policy all the time."""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from posttrain.composition import (
    MOVING,
    Composition,
    Dataset,
    MovingReference,
    PairwiseLogistic,
    ReferenceLogprobs,
)
from posttrain.config import Config


class TrDpo(Config, frozen=True, kw_only=True, tag="tr_dpo", tag_field="name"):
    """DPO whose reference follows the learner: trust-region DPO.

    ``rate: 1`` is the paper's hard update, a copy. A stage of fewer than ``every`` steps is DPO.
    """

    data: Dataset
    beta: float = 0.05
    every: int = 512
    rate: float = 0.6

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "DPO; ref <- (1-rate) ref + rate pi, after every `every` steps"
    paper: ClassVar[str] = "2404.09656"

    def compose(self) -> Composition:
        """Pairs; log-probs of a reference that moves; pairwise logistic loss."""
        return Composition(
            source=replace(self.data, preference=True),
            signals=(ReferenceLogprobs(policy=MOVING),),
            terms=(PairwiseLogistic(beta=self.beta),),
            moving=MovingReference(every=self.every, rate=self.rate),
        )


MovingPreferenceMethod = TrDpo
