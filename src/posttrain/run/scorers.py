"""Does a reward model have anything to judge with? Found out before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from posttrain.core.errors import LegalityError
from posttrain.core.learner import ScalarHead
from posttrain.parts.composition import Composition
from posttrain.parts.registry import tag_of

HEAD_FILE = "scalar_head.safetensors"
"""What a stage with a scalar head exports beside the trunk that it shares."""


def check_scorers(
    composition: Composition,
    heads: Mapping[str, ScalarHead | None],
    base: str,
    *,
    init: str,
    root: Path,
    stage: str,
) -> None:
    """Refuse reward models that have no scalar head.

    A model that is on no disk of ours is judged when it is loaded.

    Args:
        composition: the stage's.
        heads: scalar heads of the stages before it, by name.
        base: the base model's folder or hub id.
        init: where the stage starts, which ``input`` stands for.
        root: folder that paths are relative to.
        stage: its name.

    Raises:
        LegalityError: names the model, and what would have a head.
    """
    for part, model in ((p, ref) for p in composition.parts for ref in p.scorers()):
        ref = init if model == "input" else model
        if ref in heads:
            head = heads[ref]
            judges = head is not None and head.trunk == "shared"
        else:
            folder = root / (base if ref == "base" else ref.removeprefix("path:"))
            judges = not folder.is_dir() or has_head(folder)
        if not judges:
            raise LegalityError(
                f"stage {stage}: {tag_of(part)} asks {model}, which has no scalar head of its own",
                expected="a stage that trains a reward model (bradley_terry, orm, prm, "
                f"math_shepherd), a folder with {HEAD_FILE}, or a classifier with one or two "
                "labels",
            )


def has_head(folder: Path) -> bool:
    """True for the folder of a reward model: ours, or a stock classifier."""
    if (folder / HEAD_FILE).is_file():
        return True
    config = folder / "config.json"
    if not config.is_file():
        return True  # no model at all, which is said when it is loaded
    try:
        kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ()
    except ValueError:
        return True
    return any(str(kind).endswith("Classification") for kind in kinds)
