"""An export: written as a plain model folder, reloaded as a user would, and compared.

    learner ──adapters merged, float32──▶ folder ──from_pretrained──▶ reloaded
       └───────── the same tensors, log-probs, tokens, template, stop tokens? ────┘

Only weights change in training. All other files of the start folder that its users need (those of
the tokenizer, templates, processors, the generation config) are carried over byte for byte.
"""

from __future__ import annotations

import copy
import filecmp
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Proof, Subject
from posttrain.engines.local.adapters import quiet, reach, save_adapters, shortened
from posttrain.engines.local.comparing import (
    buffers,
    differing_tensor,
    differing_tokens,
    first_difference,
    gap,
    log_probs,
    probe_rows,
    tensors,
)
from posttrain.engines.local.model import Model
from posttrain.models.files import CONFIG, CRITIC, GENERATION, INDEX, counted
from posttrain.models.readers import library

ADAPTER = "adapter"
"""Folder of the adapters as they were trained, inside of the model folder."""
_OF_THE_LOADER = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""Entries of a configuration that say how it was loaded."""


def export(model: Model, adapters, folder: Path) -> list[Proof]:  # type: ignore[no-untyped-def]
    """Write a model folder, and prove it; adapters are merged, and saved in ``adapter/``.

    Raises:
        ModelError: reloaded, it is not the trained policy; the message has the first difference.
    """
    causal = model.causal
    if adapters is not None:
        save_adapters(adapters, folder / ADAPTER)
        causal = _merged(adapters)
    _write(causal, model, folder)
    return prove(model, adapters, causal, folder)


def _merged(adapters) -> PreTrainedModel:  # type: ignore[no-untyped-def]  # optional
    """A float32 copy of the model, with its adapters merged."""
    merged: PreTrainedModel = copy.deepcopy(adapters).float().merge_and_unload()
    return merged


def _write(causal: PreTrainedModel, model: Model, folder: Path) -> None:
    """Save weights and configuration, and carry over what training does not change."""
    own = causal.generation_config
    carried = _carried(model)
    if any(path.name == GENERATION for path in carried):
        # Saving is stricter than loading, and refuses settings that real models come with.
        causal.generation_config = type(own)()
    try:
        causal.save_pretrained(folder)
    finally:
        causal.generation_config = own
    for path in carried:
        target = folder / path.relative_to(model.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _carried(model: Model) -> list[Path]:
    """The files of the start folder that count, but for weights and configuration."""
    names = counted(model.folder)
    return [
        model.folder / name
        for name in names
        if not name.endswith(".safetensors")
        and name not in (CONFIG, INDEX)
        and not name.startswith((f"{CRITIC}/", f"{ADAPTER}/"))
    ]


def _is_remote(causal: PreTrainedModel) -> bool:
    """True for a class from the model's own repository."""
    return type(causal).__module__.startswith("transformers_modules")


def prove(  # type: ignore[no-untyped-def]  # optional
    model: Model, adapters, written: PreTrainedModel, folder: Path
) -> list[Proof]:
    """Reload a folder as a user would, and compare it with the policy that was ``written``."""
    began = time.perf_counter()
    rows = probe_rows(model.vocab_size, model.tokenizer)
    live = log_probs(model.causal, rows)
    loaded = _load(folder, model)
    _same(_differing_settings(loaded, written))
    _same(differing_tensor(tensors(loaded), tensors(written)))
    # Constants of a bfloat16 model, such as Gemma's scale, are rounded; a float32 export's are not.
    rounding = None if adapters is None else model.causal.dtype
    _same(differing_tensor(buffers(loaded), buffers(written), dtype=rounding))
    nn.Module.to(loaded, model.device)
    reloaded = log_probs(loaded, rows)
    found = gap(reloaded, live, of=model.causal, rows=rows)
    _same(found.difference)
    _same(_differing_files(folder, model))
    num = len(tensors(loaded))
    proof = Proof(
        subject=Subject.EXPORT,
        of=folder.name,
        words=f"{num} tensors, tokens, template and stop tokens are the trained policy's; "
        f"log-probs {found.words}",
        seconds=time.perf_counter() - began,
        figures={"tensors": float(num), "gap": found.largest, "rounding": found.noise},
    )
    if adapters is None:
        return [proof]
    return [proof, _prove_adapter(model, adapters, reloaded, folder / ADAPTER, rows)]


def _same(difference: str | None) -> None:
    """Raise a ModelError for a difference."""
    if difference is not None:
        raise ModelError(
            f"the export is not the trained policy: {difference}",
            expected="a folder that transformers loads as the very policy that was trained",
            fix="no weight is lost: the last checkpoint is complete, and the same run exports "
            "again from it; if it ends here again, this family or its folder cannot be exported",
        )


@contextmanager
def _reloading(what: str) -> Iterator[None]:
    """Turn an error of a library that reads the export into our own."""
    try:
        with library("the export"):
            yield
    except ModelError as error:
        _same(f"{what} does not load: {error.found}")


def _load(folder: Path, model: Model) -> PreTrainedModel:
    """The plain model of a folder, every weight read from its files."""
    with _reloading("it"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            trust_remote_code=_is_remote(model.causal),
            output_loading_info=True,
        )
    for kind, names in loaded[1].items():
        if names and kind.endswith("_keys"):
            _same(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, names))[:3])}")
    causal: PreTrainedModel = loaded[0]
    causal.eval()
    return causal


def _differing_settings(loaded: PreTrainedModel, written: PreTrainedModel) -> str | None:
    """The first difference of class, configuration or generation configuration."""
    if type(loaded).__name__ != type(written).__name__:
        return f"it loads as {type(loaded).__name__}, and was {type(written).__name__}"
    config = first_difference(_settings(loaded.config), _settings(written.config))
    if config is not None:
        return f"in config.json, {config}"
    own = first_difference(
        _settings(loaded.generation_config), _settings(written.generation_config)
    )
    return None if own is None else f"in {GENERATION}, {own}"


def _settings(config: Any) -> dict[str, object]:
    """A configuration, without what says how it was loaded."""
    return _plain(config.to_dict())


def _plain(entries: dict[str, Any]) -> dict[str, object]:
    return {
        name: _plain(value) if isinstance(value, dict) else value
        for name, value in entries.items()
        if name not in _OF_THE_LOADER
    }


def _differing_files(folder: Path, model: Model) -> str | None:
    """The first difference of the tokenizer, or of a file that was carried over."""
    with _reloading("its tokenizer"):
        reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=_is_remote(model.causal))
    if (difference := differing_tokens(reloaded, model.tokenizer)) is not None:
        return difference
    for path in _carried(model):
        copied = folder / path.relative_to(model.folder)
        if not copied.is_file() or not filecmp.cmp(path, copied, shallow=False):
            return f"{path.name} is not the one that the start folder has"
    return None


def _prove_adapter(  # type: ignore[no-untyped-def]  # optional
    model: Model, adapters, reloaded: Tensor, folder: Path, rows: Tensor
) -> Proof:
    """The saved adapters on the start model, through peft: the same as the merged weights."""
    from peft import PeftModel

    began = time.perf_counter()
    with _reloading("the start folder"):
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model.folder, dtype=torch.float32, trust_remote_code=_is_remote(model.causal)
        )
    if not model.speaks:  # a classifier's folder has no output head, and the loader made one up
        base.get_output_embeddings().weight.data.copy_(model.causal.get_output_embeddings().weight)
    with quiet(), _reloading("its adapter"):
        whole = PeftModel.from_pretrained(base, folder).to(model.device).eval()
    live = dict(adapters.named_parameters())
    again = {n: _rounded(p, live[n]) if n in live else p for n, p in whole.named_parameters()}
    difference = differing_tensor(again, {n: p.float() for n, p in live.items()})
    _same(_prefixed("its adapter: ", difference))
    through = log_probs(base, rows)
    found = gap(reloaded, through, of=base, rows=rows)
    _same(_prefixed("adapter and merged weights: ", found.difference))
    reached = reach(model.causal)
    words = f"base and adapter through peft are the merged weights, {found.words}; {reached.words}"
    still = _unmoved(live)
    if still:
        words += f"; {len(still)} adapters never changed: {shortened(still)}"
    return Proof(
        subject=Subject.EXPORT,
        of=folder.name,
        words=words,
        seconds=time.perf_counter() - began,
        figures={
            "gap": found.largest,
            "rounding": found.noise,
            "reached": float(len(reached.reached)),
            "missed": float(len(reached.missed)),
        },
    )


@torch.no_grad()
def _rounded(weight: Tensor, like: Tensor) -> Tensor:
    """A float32 weight, rounded in place to the number type in which it was trained."""
    return weight.copy_(weight.to(like.dtype))


def _prefixed(prefix: str, difference: str | None) -> str | None:
    return None if difference is None else prefix + difference


def _unmoved(weights: dict[str, Tensor]) -> list[str]:
    """Adapters whose second factor is still 0, as it was initialised: nothing trained them."""
    return [
        name.removeprefix("base_model.model.").partition(".lora_B")[0].replace(".base_layer", "")
        for name, weight in weights.items()
        if ".lora_B." in name and not bool(weight.any())
    ]
