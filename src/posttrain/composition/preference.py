"""Terms on preferences: pairs of a chosen and a rejected answer.

The code behind a term is in ``objectives/preference.py``.
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition.base import ANYONE
from posttrain.config import Config
from posttrain.errors import ConfigError
from posttrain.provenance import Kind
from posttrain.trajectory import Column


class PairwiseLogistic(
    Config, frozen=True, kw_only=True, tag="pairwise_logistic", tag_field="type"
):
    """DPO on a pair (arXiv 2305.18290), with optional label smoothing ε (cDPO).

    −(1−ε) log σ(βΔ) − ε log σ(−βΔ), Δ the chosen minus the rejected sum over tokens of
    log π − log π_ref.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "pair"
    aggregate: ClassVar[str] = "pair_mean"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.REFERENCE_LOGPROB, Column.PREFERENCE})
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"beta={self.beta}, label_smoothing={self.label_smoothing}",
                expected="beta > 0 and 0 <= label_smoothing < 0.5",
            )


PreferenceTerm = PairwiseLogistic
