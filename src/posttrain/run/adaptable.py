"""Whether the stages of a plan can have the adapters that they ask for, as far as files say."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from posttrain.core.errors import ConfigError
from posttrain.core.guard import reading
from posttrain.models.folder import ModelFolder, read_folder
from posttrain.run.plan import PlannedStage

_ENDS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "lm_head", "embed_out"}
)
"""Names of input embeddings and output heads."""
_PREFIXES = ("", "model.", "transformer.")
"""Of the model's names before those in a file, which may hold the decoder alone."""
_HEADS = ("lm_head.weight", "embed_out.weight")


def check_adapters(stages: Iterable[PlannedStage], *, base: Path) -> None:
    """Check stages with ``lora``.

    Args:
        stages: those that a run would start.
        base: the recipe's model; read where it is a folder on this disk. Models from outside the
            recipe are checked when their stage is tried.

    Raises:
        ConfigError: peft is not installed, no weight has a name that is asked for, or an adapter
            would sit on a weight that the input embeddings and the output head share.
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
        if planned.init.startswith("path:") or not base.is_dir():
            continue
        folder = read_folder(base)
        if shared and _is_tied(folder):
            raise ConfigError(
                f"stage {planned.spec.name}: lora on {', '.join(shared)} of {base}, whose "
                "input embeddings and output head are one weight: an adapter on one of them would "
                "be merged into both",
                expected="linear layers of the decoder, or all-linear",
                fix="leave them out of target_modules, or train all weights (no lora)",
            )

        if missed := _unknown(lora.target_modules, folder):
            raise ConfigError(
                f"stage {planned.spec.name}: lora on {', '.join(missed)}, and {base} has no such "
                "weight",
                expected="all-linear, names of its linear layers such as "
                f"{', '.join(_some(folder))}, or a pattern of their whole names",
                fix="correct target_modules",
            )


def _is_tied(folder: ModelFolder) -> bool:
    return folder.text_config.get("tie_word_embeddings") is True and not any(
        name.endswith(_HEADS) for name in folder.tensors
    )


def _unknown(targets: str | Sequence[str], folder: ModelFolder) -> list[str]:
    """Targets that no weight has the name of, as far as the names of files tell.

    Experts are named otherwise in files than in the model, and so are the parts of a model that
    reads images: there only a try can tell.
    """
    names = _modules(folder)
    if targets == "all-linear" or any("expert" in n or "language_model" in n for n in names):
        return []
    if isinstance(targets, str):
        with reading(f"target_modules {targets!r}", kind="a regular expression", error=ConfigError):
            pattern = re.compile(targets)
        found = any(pattern.fullmatch(prefix + n) for n in names for prefix in _PREFIXES)
        return [] if found else [targets]
    known = [f".{n}" for n in (*names, *_ENDS)]
    return [t for t in targets if not any(n.endswith(f".{t}") for n in known)]


def _modules(folder: ModelFolder) -> list[str]:
    return [n.removesuffix(".weight") for n in folder.tensors if n.endswith(".weight")]


def _some(folder: ModelFolder) -> list[str]:
    """Names of linear layers, for a message."""
    ends = {n.rpartition(".")[2] for n in _modules(folder) if ".layers." in f".{n}"}
    return sorted(n for n in ends if n.endswith("_proj"))[:4] or sorted(ends)[:4]
