"""The files of a model folder that count: what the libraries and posttrain read.

    model folder ──counted──▶ configuration, weights, tokenizer, templates, processor ──▶ digest
                     └──────▶ everything else (README, logs, .DS_Store, .git, pickles): ignored

A file that counts must be a plain file inside the folder. Links of the hub's cache are followed.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.core.files import hash_files
from posttrain.models.code import code_files
from posttrain.models.entries import AGAIN, plain_file, read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
ADAPTER = "adapter_config.json"
SCALAR_HEAD = "scalar_head.safetensors"
CRITIC = "critic"

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.[0-9]*.json", "tokenizer.model*", "vocab*.json", "vocab*.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json", "dict.txt", "*.tokenizer"),
    *("entity_vocab.json", "target_vocab.json", "byte_maps.json"),
)
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "bpe.codes", "emoji.json", "normalizer.json"),
    *("word_pronunciation.json", "word_shape.json"),
)
_PROCESSOR_FILES = ("*processor_config.json", "audio_tokenizer_config.json")
_OWN_FILES = (SCALAR_HEAD, "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_READ = (CONFIG, GENERATION, *_TOKENIZER_FILES, *_PROCESSOR_FILES)

# transformers prefers such files to model.safetensors, and reads them with another loader.
_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def is_vocabulary(name: str) -> bool:
    """True for a file that some tokenizer of transformers reads its vocabulary from.

    Example:
        >>> is_vocabulary("tokenizer.json"), is_vocabulary("tokenizer_config.json")
        (True, False)
    """
    return _matches(name, _VOCABULARIES)


def counted(folder: Path) -> list[str]:
    """Names of the files that count, sorted; those in folders with ``/``.

    Args:
        folder: a model folder. Its code counts where its configuration names some.

    Raises:
        ModelError: no weights where the loader looks for them.
    """
    names = {name for name in os.listdir(folder) if _matches(name, _READ)}
    names.update(weight_files(folder))
    if (folder / INDEX).exists() and WEIGHTS not in names:
        names.add(INDEX)
    names.update(code_files(folder))
    names.update(f"additional_chat_templates/{p.name}" for p in _extra_templates(folder))
    names.update(name for name in _OWN_FILES if (folder / name).exists())
    if (folder / CRITIC).is_dir():
        inside = counted(folder / CRITIC)
        names.update(f"{CRITIC}/{name}" for name in inside)
    return sorted(names)


def model_digest(folder: Path) -> str:
    """sha256 over the names and the content of the files that count, 64 hex digits.

    Files that no loader reads do not count: a README, logs, ``.DS_Store``, editor backups, the
    hub's download records, weights in other formats.

    Raises:
        ModelError: no weights, or a file that counts is not a plain file of the folder.
    """
    names = counted(folder)
    for name in names:
        plain_file(folder / name)
    return hash_files(folder, names)


def weight_files(folder: Path) -> list[str]:
    """The files that the loader takes weights from: ``model.safetensors``, or an index's shards.

    Raises:
        ModelError: there are none, only pickles or other names, or shards outside the folder.
    """
    held = sorted(os.listdir(folder))
    ranks = [name for name in held if _RANKS.fullmatch(name)]
    if ranks:
        raise ModelError(
            f"{folder} holds {ranks[0]}: a distributed checkpoint",
            expected=f"{WEIGHTS}, or {INDEX} and its shards",
            fix="load it where it was written, and save it with save_pretrained",
        )
    if WEIGHTS in held:
        return [WEIGHTS]
    if INDEX in held:
        return sorted(set(shards_by_tensor(folder).values()))
    raise _no_weights(folder, held)


def shards_by_tensor(folder: Path) -> Mapping[str, str]:
    """The shard of every tensor, from the index of a folder.

    Raises:
        ModelError: not an index, or a shard that is not a file of the folder itself.
    """
    path = folder / INDEX
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{path} has no weight_map", fix=AGAIN)
    for tensor, name in shards.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ModelError(
                f"{path}: {tensor} is said to be in {name!r}",
                expected="the name of a file in the same folder",
                fix="move the shard into the folder, and name it alone in the index",
            )
        if not name.endswith(".safetensors"):
            raise ModelError(f"{path} names {name!r}", expected="safetensors files only")
    return shards


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _extra_templates(folder: Path) -> Iterator[Path]:
    return (folder / "additional_chat_templates").glob("*.jinja")


def _no_weights(folder: Path, held: list[str]) -> ModelError:
    others = [n for n in held if n.endswith(".safetensors") and n != SCALAR_HEAD]
    pickles = [n for n in held if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if ADAPTER in held:
        return adapter_found(folder)
    if pickles and not others:
        return ModelError(
            f"{folder} is not a model folder: no *.safetensors, and {pickles[0]} is a pickle, "
            "which can run code when it is read",
            expected=f"{WEIGHTS}, or {INDEX} and its shards",
            fix="load it with transformers where you trust it, and call "
            "save_pretrained(..., safe_serialization=True)",
        )
    if others:
        return ModelError(
            f"{folder} holds {others[0]}, and neither {WEIGHTS} nor {INDEX}: the loader would "
            "not read it",
            expected=f"{WEIGHTS}, or {INDEX} and its shards",
            fix=f"rename a single file to {WEIGHTS}, or export the model again",
        )
    return ModelError(
        f"{folder} is not a model folder: no *.safetensors",
        expected="config.json, *.safetensors and tokenizer files",
        fix=f"it holds {', '.join(held[:8]) or 'nothing'}: give the folder of an export",
    )


def adapter_found(folder: Path) -> ModelError:
    """The error for a folder that holds an adapter."""
    return ModelError(
        f"{folder} holds an adapter ({ADAPTER}): the loader would hang it on the model",
        expected="a plain model",
        fix="merge it (peft: merge_and_unload, then save_pretrained), or move the adapter_* files "
        "out of the folder to use the model without them",
    )
