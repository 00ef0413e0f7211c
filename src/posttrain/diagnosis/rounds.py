"""The state of a treatment in its run folder: OUT/treat.json."""

from __future__ import annotations

from posttrain.core.bounds import Count
from posttrain.core.config import Config
from posttrain.diagnosis.card import Bottleneck
from posttrain.recipe import Stage


class Round(Config):
    """One round of the loop. ``kept`` is null while its stage is not finished."""

    number: Count
    treatment: str
    tasks: tuple[str, ...]
    bottleneck: Bottleneck
    stage: Stage
    kept: bool | None = None
    helped: bool | None = None
    words: str = ""


class TreatmentLog(Config):
    """The rounds so far: OUT/treat.json."""

    ground: str  # digest of model, task sets and supplies
    budget: Count
    rounds: tuple[Round, ...] = ()
    ended: str | None = None
