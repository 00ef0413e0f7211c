"""Whether the stages of a plan can have the adapters that they ask for, as far as files say."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from posttrain.core.errors import ConfigError
from posttrain.models.folder import ModelFolder, read_folder
from posttrain.run.plan import PlannedStage

_ENDS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "lm_head", "embed_out"}
)
"""Names of input embeddings and output heads."""
_HEADS = ("lm_head.weight", "embed_out.weight")


def check_adapters(stages: Iterable[PlannedStage], *, base: Path) -> None:
    """Check stages with ``lora``.

    Args:
        stages: those that a run would start.
        base: the recipe's model; read where it is a folder on this disk. Models from outside the
            recipe are checked when their stage is tried.

    Raises:
        ConfigError: peft is not installed, or an adapter would sit on a weight that the input
            embeddings and the output head share.
    """
    for planned in stages:
        lora = planned.spec.lora
        if lora is None:
            continue
        if importlib.util.find_spec("peft") is None:
            raise ConfigError(
                f"stage {planned.spec.name} asks for lora, and peft is not installed",
                fix="pip install 'posttrain[lora]', or train all weights (no lora)",
            )
        targets = () if isinstance(lora.target_modules, str) else lora.target_modules
        shared = [t for t in targets if t.rpartition(".")[2] in _ENDS]
        outside = planned.init.startswith("path:")
        if shared and not outside and base.is_dir() and _is_tied(read_folder(base)):
            raise ConfigError(
                f"stage {planned.spec.name}: lora on {', '.join(shared)} of {base}, whose "
                "input embeddings and output head are one weight: an adapter on one of them would "
                "be merged into both",
                expected="linear layers of the decoder, or all-linear",
                fix="leave them out of target_modules, or train all weights (no lora)",
            )


def _is_tied(folder: ModelFolder) -> bool:
    return folder.text_config.get("tie_word_embeddings") is True and not any(
        name.endswith(_HEADS) for name in folder.tensors
    )
