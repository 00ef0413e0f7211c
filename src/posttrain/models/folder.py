"""A model folder as its files declare it: configuration, tensors and tokens, nothing loaded.

    folder ─┬─ config.json ──────────▶ values, quantisation ─┐
            ├─ *.safetensors headers ▶ names, shapes         ├─ checked against each other
            ├─ tokenizer.json ───────▶ ids                   │        └──▶ ModelFolder
            └─ generation_config.json▶ stop tokens ──────────┘

``posttrain plan`` reads it in seconds; loading starts with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.core.guard import reading
from posttrain.models.entries import AGAIN, check_entries, read_json
from posttrain.models.files import (
    ADAPTER,
    CONFIG,
    GENERATION,
    INDEX,
    adapter_found,
    is_vocabulary,
    shards_by_tensor,
    weight_files,
)
from posttrain.models.headers import TensorHeader, read_headers
from posttrain.models.tokens import Tokens, read_tokens

MAX_CONFIG = 1 << 25  # bytes
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight"
)
_LAYER = re.compile(r"(.*?(?:layers|blocks|h))\.(\d+)\.")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_WRAPPED = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "peft",
}
_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = (
    *(*_NUM_LAYERS, "vocab_size", "hidden_size", "n_embd", "d_model", "head_dim"),
    *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFolder:
    """What a model folder declares, checked without loading it."""

    path: Path
    config: Mapping[str, object]  # config.json
    tensors: Mapping[str, TensorHeader]  # by name
    tokens: Tokens

    @property
    def num_weights(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def architectures(self) -> tuple[str, ...]:
        """Classes that the configuration names."""
        kinds = self.config.get("architectures")
        return tuple(map(str, kinds)) if isinstance(kinds, list) else ()

    @property
    def classifies(self) -> bool:
        """True for a classifier, whose output head was never trained."""
        return any(kind.endswith("Classification") for kind in self.architectures)

    @property
    def headless(self) -> bool:
        """True for a bare decoder: the named class has no output head."""
        return (
            bool(self.architectures)
            and self.architectures[0].endswith("Model")
            and (not self.architectures[0].endswith("LMHeadModel"))
        )

    def predicts_ahead(self, name: str) -> bool:
        """True for a tensor of the extra layers that predict several tokens ahead.

        They follow the decoder's own layers, and no causal model uses them.
        """
        more, match = self.config.get("num_nextn_predict_layers"), _LAYER.match(name)
        first = next((self.config[k] for k in _NUM_LAYERS if k in self.config), None)
        if match is None or not isinstance(more, int) or not isinstance(first, int):
            return False
        return first <= int(match[2]) < first + more

    @property
    def embedding(self) -> TensorHeader | None:
        """The tensor of the input embeddings, if one can be told by its name."""
        found = [t for n, t in self.tensors.items() if _EMBEDDING.search(n) and len(t.shape) == 2]
        return found[0] if len(found) == 1 else None

    @property
    def rows(self) -> int | None:
        """Rows of the input embeddings, padding rows included."""
        return self.embedding.shape[0] if self.embedding else None

    @property
    def text_config(self) -> Mapping[str, object]:
        """The part of the configuration that describes the decoder."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config


def read_folder(path: Path) -> ModelFolder:
    """Read and check a model folder.

    Raises:
        ModelError: not a model; an adapter; quantised; damaged or missing weights; files outside
            the folder; a configuration, tensors and tokens that do not fit each other.

    Example:
        >>> import tempfile
        >>> from posttrain.testing import tiny_model
        >>> with tempfile.TemporaryDirectory() as top:
        ...     read_folder(tiny_model(Path(top))).rows
        56
    """
    with reading(path, kind="a model folder", error=ModelError, fix=AGAIN):
        return _read(path)


def _read(path: Path) -> ModelFolder:
    if not (path / CONFIG).exists():
        held = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
        if ADAPTER in held:
            raise adapter_found(path)
        raise _no_model(path, CONFIG, held)
    check_entries(path)
    if (path / ADAPTER).exists():
        raise adapter_found(path)
    config = read_json(path / CONFIG, most=MAX_CONFIG)
    _check_values(config, path / CONFIG)
    _check_quantised(config, path)
    tensors = _read_tensors(path)
    held = sorted(p.name for p in path.iterdir())
    if not any(map(is_vocabulary, held)):
        raise _no_model(path, "tokenizer (tokenizer.json or a vocabulary)", held)
    folder = ModelFolder(path=path, config=config, tensors=tensors, tokens=read_tokens(path))
    _check_names(folder)
    _check_layers(folder)
    _check_vocabulary(folder)
    _check_head(folder)
    _check_ends(folder)
    return folder


def _no_model(path: Path, what: str, held: list[str]) -> ModelError:
    return ModelError(
        f"{path} is not a model folder: no {what}",
        expected="config.json, *.safetensors and tokenizer files",
        fix=f"it holds {', '.join(held[:8]) or 'nothing'}: give the folder of an export",
    )


def _check_values(config: Mapping[str, object], path: Path) -> None:
    """Numbers that fit a machine, sizes that are counts, and no other file behind this one."""
    for key, value in _leaves(config):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ModelError(f"{path}: {key} has {len(str(abs(value)))} digits", fix=_EXPORT)
        if isinstance(value, float) and math.isnan(value):
            raise ModelError(f"{path}: {key} is not a number (NaN)", fix=_EXPORT)
    nested = [v for v in config.values() if isinstance(v, dict)]
    for part in (config, *nested):
        for key in _SIZES:
            value = part.get(key)
            counts = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(n) is int and 0 < n < 2**31 for n in counts):
                raise ModelError(f"{path}: {key} is {value!r:.60}", expected="a positive integer")
    for key in ("configuration_files", "transformers_weights"):
        if config.get(key):
            raise ModelError(
                f"{path}: {key} names other files: {config[key]!r:.60}",
                expected="one config.json, and weights under their usual name",
                fix=_EXPORT,
            )


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """(Dotted key, value) of all plain values. Depth is bounded by the JSON reader."""
    waiting = [(key, value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((f"{key}.{k}" if key else k, v) for k, v in value.items())
        elif isinstance(value, list):
            waiting.extend((key, v) for v in value)
        else:
            yield key, value


def _check_quantised(config: Mapping[str, object], path: Path) -> None:
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found:
                method = found.get("quant_method") if isinstance(found, dict) else found
                bits = found.get("bits") if isinstance(found, dict) else None
                raise _quantised(path, f"{method or key}" + (f", {bits} bits" if bits else ""))


def _quantised(path: Path, words: str) -> ModelError:
    return ModelError(
        f"{path} is quantised ({words})",
        expected="weights in float32, bfloat16 or float16, which can be trained and exported",
        fix="use the model it was made from, or dequantise it and save it with save_pretrained",
    )


def _read_tensors(path: Path) -> dict[str, TensorHeader]:
    """The tensors of all weight files, each in one file only."""
    tensors: dict[str, TensorHeader] = {}
    files = weight_files(path)
    for name in files:
        for tensor, header in read_headers(path / name).items():
            if tensor in tensors:
                raise ModelError(
                    f"{path}: {tensor} is in {tensors[tensor].file} and in {name}",
                    expected="every tensor once",
                    fix=_EXPORT,
                )
            tensors[tensor] = header
    if not tensors:
        raise ModelError(f"{path}: its weight files hold no tensor", fix=_EXPORT)
    if files != ["model.safetensors"]:
        named = shards_by_tensor(path)
        lost = sorted(t for t, file in named.items() if t not in tensors)
        if lost:
            raise ModelError(
                f"{path / INDEX} names {len(lost)} tensors that no shard holds, "
                f"{lost[0]} among them",
                expected=f"{lost[0]} in {named[lost[0]]}",
                fix="copy or download the shards again",
            )
    return tensors


def _check_names(folder: ModelFolder) -> None:
    """No wrapper in the names, no adapter, no quantised number type."""
    names = list(folder.tensors)
    if names and all(n.startswith("module.") for n in names):
        raise _wrapped(folder, names[0], "module.", "DistributedDataParallel or DeepSpeed")
    for name, tensor in folder.tensors.items():
        for mark, wrapper in _WRAPPED.items():
            if mark in name:
                raise _wrapped(folder, name, mark, wrapper)
        if ".lora_A." in name or ".lora_B." in name:
            raise ModelError(
                f"{folder.path} holds adapters beside weights: {name}",
                expected="a plain model",
                fix="merge them (peft: merge_and_unload), then save_pretrained",
            )
        whole = tensor.dtype in _FLOATS or not name.endswith(".weight")
        if not whole or tensor.dtype.startswith(("F8", "F4", "F6")):
            raise _quantised(folder.path, f"{name} is {tensor.dtype}")


def _wrapped(folder: ModelFolder, name: str, mark: str, wrapper: str) -> ModelError:
    return ModelError(
        f"{folder.path}: the tensors have the names of a wrapped model ({wrapper}): {name}",
        expected=name.replace(mark, ""),
        fix=f"save the inner model, or rename: {{k.replace({mark!r}, ''): v for k, v in "
        "load_file(f).items()}",
    )


def _check_layers(folder: ModelFolder) -> None:
    """As many layers as the configuration says, where there is one stack of them."""
    asked = next((folder.config[k] for k in _NUM_LAYERS if k in folder.config), None)
    matches = [m for m in map(_LAYER.match, folder.tensors) if m]
    stacks = {m[1] for m in matches}
    if not isinstance(asked, int) or len(stacks) != 1 or folder.text_config is not folder.config:
        return
    more = folder.config.get("num_nextn_predict_layers")
    held = {int(m[2]) for m in matches}
    lacking = sorted(set(range(asked)) - held)
    beyond = sorted(n for n in held if n >= asked + (more if isinstance(more, int) else 0))
    if lacking or beyond:
        words = f"no layer {lacking[0]}" if lacking else f"a layer {beyond[0]}"
        raise ModelError(
            f"{folder.path}: the config asks for {asked} layers, and the weights have {words}",
            expected=f"{next(iter(stacks))}.0 to {next(iter(stacks))}.{asked - 1}",
            fix=f"set the number of layers in {CONFIG} to that of the weights, or copy the "
            "folder again",
        )


def _check_vocabulary(folder: ModelFolder) -> None:
    """The embedding has the rows that the config says, and one for every token."""
    rows, asked = folder.rows, folder.text_config.get("vocab_size")
    if rows is None:
        return
    if isinstance(asked, int) and rows != asked:
        raise ModelError(
            f"{folder.path}: the config asks for {asked:,} rows of embeddings, and the weights "
            f"have {rows:,}",
            expected="one number",
            fix=f"set vocab_size in {CONFIG} to {rows}, or copy the folder again",
        )
    folder.tokens.check(rows, folder=folder.path)


def _check_head(folder: ModelFolder) -> None:
    """A head in the file when the config says that it is not the embedding."""
    flags = [
        part["tie_word_embeddings"]
        for part in (folder.config, folder.text_config)
        if "tie_word_embeddings" in part
    ]
    rows, inputs = folder.rows, folder.embedding
    if rows is None or any(flags) or not flags or folder.classifies or folder.headless:
        return
    heads = [t for t in folder.tensors.values() if t is not inputs and rows in t.shape[:1]]
    if not heads:
        raise ModelError(
            f"{folder.path}: the config says tie_word_embeddings: false, and the weights hold no "
            "output head: the loader would make up a random one",
            expected="an output head in the weights, or tie_word_embeddings: true",
            fix=f"set tie_word_embeddings in {CONFIG} to true if the model was trained so; "
            "otherwise copy the folder again",
        )


def _check_ends(folder: ModelFolder) -> None:
    """End tokens that exist."""
    path = folder.path / GENERATION
    file = path if path.exists() else folder.path / CONFIG
    ends = (read_json(path) if path.exists() else folder.config).get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    limit = folder.rows or 2**31
    for end in known:
        if type(end) is not int or not 0 <= end < limit:
            raise ModelError(
                f"{file}: eos_token_id is {ends!r:.60}",
                expected=f"ids from 0 to {limit - 1:,}, those of the tokens that end a turn",
                fix=f"set it to the tokenizer's: {folder.tokens.id_of_end or 'see its eos_token'}",
            )


_EXPORT = "copy the folder again, or save the model again with save_pretrained"
