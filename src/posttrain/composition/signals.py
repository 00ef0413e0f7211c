"""Who judges trajectories, and what they write beside them."""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition.base import PolicyRef
from posttrain.composition.credit import CreditSpec
from posttrain.composition.offline import OfflineSignal
from posttrain.composition.preference_signals import PreferenceSignal
from posttrain.composition.reward_models import RewardModelSignal
from posttrain.composition.teaching import TeachingSpec
from posttrain.composition.values import ValueSignal
from posttrain.composition.verify import Verify
from posttrain.core.config import Config
from posttrain.core.trajectory import Column


class ReferenceLogprobs(Config, tag="reference_logprobs", tag_field="type"):
    """Log-probs of the written tokens under a frozen policy."""

    policy: PolicyRef = "input"
    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.REFERENCE_LOGPROB})


SignalSpec = (
    Verify
    | CreditSpec
    | ReferenceLogprobs
    | TeachingSpec
    | PreferenceSignal
    | OfflineSignal
    | ValueSignal
    | RewardModelSignal
)
