"""Preference methods."""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition import (
    Composition,
    Dataset,
    PairwiseLogistic,
    PolicyRef,
    ReferenceLogprobs,
)
from posttrain.config import Config


class Dpo(Config, frozen=True, kw_only=True, tag="dpo", tag_field="name"):
    """Direct preference optimisation on fixed pairs."""

    data: Dataset
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: PolicyRef = "input"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-log sigmoid(beta (rho_chosen - rho_rejected)), rho = log pi/pi_ref"
    paper: ClassVar[str] = "2305.18290"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; pairwise logistic loss."""
        fields = {f: getattr(self.data, f) for f in self.data.__struct_fields__}
        return Composition(
            source=Dataset(**{**fields, "preference": True}),
            signals=(ReferenceLogprobs(policy=self.reference),),
            terms=(PairwiseLogistic(beta=self.beta, label_smoothing=self.label_smoothing),),
        )


PreferenceMethod = Dpo
