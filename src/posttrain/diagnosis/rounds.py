"""What a treatment has decided so far, as its run folder holds it: OUT/treat.json."""

from __future__ import annotations

from posttrain.core.config import Config
from posttrain.diagnosis.card import Bottleneck
from posttrain.recipe import Stage


class Round(Config):
    """One turn of the loop. ``kept`` is null while its stage is not finished."""

    number: int
    treatment: str
    tasks: tuple[str, ...]
    bottleneck: Bottleneck
    stage: Stage
    kept: bool | None = None
    helped: bool | None = None
    words: str = ""


class Chart(Config):
    """What was decided so far: OUT/treat.json."""

    ground: str  # digest of what is treated, and with what
    budget: int
    rounds: tuple[Round, ...] = ()
    ended: str | None = None
