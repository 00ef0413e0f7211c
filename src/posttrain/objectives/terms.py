"""Every term's code, by specification."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.config import Config
from posttrain.objectives import distillation, policy, preference, supervised
from posttrain.objectives.values import TermCode

TERMS: Mapping[type[Config], TermCode] = {
    **supervised.TERMS,
    **preference.TERMS,
    **policy.TERMS,
    **distillation.TERMS,
}
