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
        if planned.init.startswith("path:") or not base.is_dir():
            continue
        folder = read_folder(base)
        reached = _reached(lora.target_modules, folder)
        shared = [t for t, names in reached.items() if any(map(_is_end, names))]
        if shared and _is_tied(folder):
            raise ConfigError(
                f"stage {planned.spec.name}: lora on {', '.join(shared)} of {base}, whose "
                "input embeddings and output head are one weight: an adapter on one of them would "
                "be merged into both",
                expected="linear layers of the decoder, or all-linear",
                fix="leave them out of target_modules, or train all weights (no lora)",
            )

        missed = [t for t, names in reached.items() if not names]
        if missed and not _is_renamed(folder):
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


def _is_renamed(folder: ModelFolder) -> bool:
    """Whether files name modules otherwise than the model: experts, and parts that read images.

    There only a try can tell whether a target exists.
    """
    return any("expert" in name or "language_model" in name for name in folder.tensors)


def _reached(targets: str | Sequence[str], folder: ModelFolder) -> dict[str, list[str]]:
    """The modules that each target reaches, as far as the names in files tell."""
    names = _modules(folder)
    if targets == "all-linear":
        return {}
    if isinstance(targets, str):
        with reading(f"target_modules {targets!r}", kind="a regular expression", error=ConfigError):
            pattern = re.compile(targets)
        return {targets: [n for n in names if any(pattern.fullmatch(p + n) for p in _PREFIXES)]}
    return {
        t: [n for n in names if any(f".{p}{n}".endswith(f".{t}") for p in _PREFIXES)]
        for t in targets
    }


def _is_end(name: str) -> bool:
    return name.rpartition(".")[2] in _ENDS


def _modules(folder: ModelFolder) -> list[str]:
    """Modules with a matrix: those that an adapter can be on."""
    matrices = [n for n, tensor in folder.tensors.items() if len(tensor.shape) > 1]
    found = [n.removesuffix(".weight") for n in matrices if n.endswith(".weight")]
    return [*found, "lm_head"] if _is_tied(folder) else found  # a module, though not in the file


def _some(folder: ModelFolder) -> list[str]:
    """Names of linear layers, for a message."""
    ends = {n.rpartition(".")[2] for n in _modules(folder) if ".layers." in f".{n}"}
    return sorted(n for n in ends if n.endswith("_proj"))[:4] or sorted(ends)[:4]
