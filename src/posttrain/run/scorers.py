"""Checks that reward models have a scalar head, before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from posttrain.core.errors import LegalityError
from posttrain.core.learner import ScalarHead
from posttrain.parts.composition import Composition
from posttrain.parts.registry import tag_of

HEAD_FILE = "scalar_head.safetensors"
"""File of the scalar head that a stage with a shared trunk exports."""


def check_scorers(
    composition: Composition,
    heads: Mapping[str, ScalarHead | None],
    base: str,
    *,
    init: str,
    root: Path,
    stage: str,
) -> None:
    """Raise a LegalityError for reward models without a scalar head.

    A model that is not on disk is checked when it is loaded.

    Args:
        composition: the stage's.
        heads: scalar heads of the earlier stages, by name.
        base: the base model's folder or hub id.
        init: the policy that the stage starts from, to which ``input`` refers.
        root: folder that paths are relative to.
        stage: its name.

    Raises:
        LegalityError: the message has the model, and what has a scalar head.
    """
    for part, model in ((p, ref) for p in composition.parts for ref in p.scorers()):
        ref = init if model == "input" else model
        if ref in heads:
            head = heads[ref]
            has_scalar = head is not None and head.trunk == "shared"
        else:
            folder = root / (base if ref == "base" else ref.removeprefix("path:"))
            has_scalar = not folder.is_dir() or has_head(folder)
        if not has_scalar:
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
        return True  # not a model at all; loading it raises the error
    try:
        kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ()
    except ValueError:
        return True
    return any(str(kind).endswith("Classification") for kind in kinds)
