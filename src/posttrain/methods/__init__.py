"""Named methods. Each is a few lines that compose source, signals and terms.

A method is the short name of a :class:`~posttrain.composition.Composition` with its paper's
defaults; nothing else in the code knows the name. ``compose`` spells any composition out by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from posttrain.methods.compose import Compose
from posttrain.methods.distillation import DistillationMethod, Opd
from posttrain.methods.guided import GuidedMethod
from posttrain.methods.hybrid import HybridMethod
from posttrain.methods.offline import OfflineMethod
from posttrain.methods.policy import Grpo, PolicyMethod
from posttrain.methods.ppo import ValueMethod
from posttrain.methods.preference import Dpo, PreferenceMethod
from posttrain.methods.rejection import RejectionMethod
from posttrain.methods.reward_models import RewardModelMethod
from posttrain.methods.supervised import Sft, SupervisedMethod

__all__ = ["METHODS", "Compose", "Dpo", "Grpo", "Method", "Opd", "Sft"]

Method = (
    SupervisedMethod
    | RejectionMethod
    | OfflineMethod
    | PreferenceMethod
    | PolicyMethod
    | ValueMethod
    | RewardModelMethod
    | DistillationMethod
    | GuidedMethod
    | HybridMethod
    | Compose
)

METHODS: Mapping[str, type[Method]] = {
    str(method.__struct_config__.tag): method for method in get_args(Method)
}
"""Every named method by its name."""
