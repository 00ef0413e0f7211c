"""What a treatment has decided so far, as its run folder holds it: OUT/treat.json."""

from __future__ import annotations

from pathlib import Path

import msgspec

from posttrain.core.config import Config
from posttrain.core.errors import DataError
from posttrain.diagnosis.card import Bottleneck
from posttrain.recipe import Stage

FILE = "treat.json"
"""Its name in a run folder."""


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


def read_chart(out: Path) -> Chart | None:
    """The decisions of a treatment; None for a run folder of any other kind.

    Raises:
        DataError: the file is damaged.
    """
    path = out / FILE
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Chart)
    except msgspec.MsgspecError as error:
        raise DataError(
            f"{path} is damaged: {error}", fix=f"start again in another folder: {out}-2"
        ) from None
