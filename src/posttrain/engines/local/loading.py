"""Loading stock models, and comparing what was loaded with what the folder holds.

    folder ──read_folder──▶ declared ──from_pretrained──▶ model + the library's report
                               │                            │
                               └──── names, values ─────────┴──▶ compared ──▶ proofs

The library fills what is missing with random numbers, drops what it does not know, and reports
both in a log that nobody reads. Here the report is read, and the weights are compared with the
files, tensor by tensor.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as library_logging

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Proof, Subject
from posttrain.engines.local.attention import IMPLEMENTATION, choosing
from posttrain.engines.local.model import Dtype, Model
from posttrain.engines.local.proving import prove
from posttrain.models.files import model_digest
from posttrain.models.folder import ModelFolder, read_folder
from posttrain.models.hub import resolve_folder
from posttrain.models.readers import library, read_tokenizer

# A progress bar per loaded shard would break the run's own progress display.
library_logging.disable_progress_bar()

MARGIN = 3
"""A model may declare this many times the weights of its folder: tied heads count twice."""

ALLOWANCE = 10_000_000
"""Weights that any folder may declare beyond that, and thousandths of it modules."""

_COMPUTED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|masked_bias|position_ids)$")
_SHOWN = 4
_WORDS = 2**64


KnownProofs: TypeAlias = dict[tuple[str, str, str], tuple[Proof, ...]]
"""By digest or configuration, number type and device: what was proved of the sampler."""


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The requested device; ``auto`` is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_model(
    name: str,
    *,
    dtype: Dtype = "float32",
    device: torch.device | None = None,
    remote_code: bool = False,
    known: KnownProofs | None = None,
) -> Model:
    """Load a causal LM and its tokenizer, and prove that both are what the folder holds.

    Args:
        name: a folder, or a hub id.
        dtype: of the weights. On a CPU float32 is faster than bfloat16.
        device: default CPU.
        remote_code: run code from the model's repository. Off unless the recipe allows it.
        known: what was proved of these weights before, such as of a policy whose learner is loaded
            now; grows.

    Raises:
        ModelError: not a model, unreadable, no tokenizer; weights missing, unexpected, of other
            shapes, not finite or not those of the files; or not exact when packed.
    """
    folder = read_folder(resolve_folder(name))
    tokenizer = read_tokenizer(folder, remote_code=remote_code)
    what = f"{name} ({folder.config.get('model_type')})"
    with library(what), _bounded(folder), choosing(what):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=getattr(torch, dtype),
            attn_implementation=IMPLEMENTATION,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            use_safetensors=True,
            trust_remote_code=remote_code,
        )
    causal: PreTrainedModel = loaded[0]
    digest = model_digest(folder.path)
    with library(what):  # a family may lack what the others have
        speaks, proof = _compared(causal, folder, loaded[1])
        # With dropout the trained policy would differ from the sampled policy: always eval mode.
        nn.Module.to(causal, device or torch.device("cpu")).eval()
        model = Model.of(
            causal, tokenizer, name=name, folder=folder.path, digest=digest, speaks=speaks
        )
    return replace(
        model, proofs=(replace(proof, of=name), *_proved(model, {} if known is None else known))
    )


def _proved(model: Model, known: KnownProofs) -> tuple[Proof, ...]:
    """What :func:`prove` finds; weights that were proved are not tried again."""
    kind = str(model.causal.dtype), str(model.device)
    weights = (model.digest, *kind)
    if weights in known:
        return tuple(replace(proof, of=model.name, seconds=0.0) for proof in known[weights])
    family = (model.causal.config.to_json_string(), *kind)
    found = prove(model, brief=family in known)
    known[weights] = known[family] = found
    return found


def _compared(
    causal: PreTrainedModel, folder: ModelFolder, report: Mapping[str, Any]
) -> tuple[bool, Proof]:
    """Compare what was loaded with the folder. Returns whether it has a trained head, and a proof.

    Raises:
        ModelError: they differ.
    """
    start = time.perf_counter()
    speaks = _speaks(causal, folder, missing=report["missing_keys"])
    _check_report(causal, folder, report, speaks=speaks)
    left_out = _left_out(causal, folder)
    compared = _check_weights(causal, folder, left_out=left_out)
    words = [
        f"{len(folder.tensors)} tensors, none missing, none unexpected, all finite",
        ", ".join(f"{num} {what}" for what, num in compared.items() if num),
        _settle_head(causal),
        f"{len(left_out)} left out by the family: {_some(left_out)}" if left_out else "",
    ]
    return speaks, Proof(
        subject=Subject.LOAD,
        of=str(folder.path),
        words="; ".join(filter(None, words)),
        seconds=time.perf_counter() - start,
        figures={"tensors": len(folder.tensors)},
    )


@contextmanager
def _bounded(folder: ModelFolder) -> Iterator[None]:
    """Stop a configuration that asks for far more than the folder holds, while it is built.

    The library would fill the difference with random numbers, and the memory with them.
    """
    most_weights = MARGIN * folder.num_weights + ALLOWANCE
    most_modules = 16 * MARGIN * len(folder.tensors) + ALLOWANCE // 1000
    weights = modules = 0

    def count(module: nn.Module, name: str, new: nn.Module | nn.Parameter | None) -> None:
        nonlocal weights, modules
        weights += new.numel() if isinstance(new, nn.Parameter) else 0
        modules += 1
        if weights > most_weights or modules > most_modules:
            raise ModelError(
                f"{folder.path}: the config asks for far more than the {folder.num_weights:,} "
                f"weights in {len(folder.tensors)} tensors that the folder holds",
                expected="a config that belongs to the weights",
                fix="check the sizes in config.json, or copy the folder again",
            )

    hooks = (
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_module_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _head_names(causal: PreTrainedModel) -> set[str]:
    """Names of the output head's weights, also where they are tied."""
    head = causal.get_output_embeddings()
    own = {id(p) for p in head.parameters()}
    return {n for n, p in causal.named_parameters(remove_duplicate=False) if id(p) in own}


def _speaks(causal: PreTrainedModel, folder: ModelFolder, *, missing: Collection[str]) -> bool:
    """False for a classifier or a bare decoder: its output head is random or untrained."""
    if folder.classifies:
        return False
    return not (folder.headless and _head_names(causal) & set(missing))


def _check_report(
    causal: PreTrainedModel, folder: ModelFolder, report: Mapping[str, Any], *, speaks: bool
) -> None:
    """Read what the library says it did, and refuse what it made up or dropped.

    Buffers that a model computes by itself may be in the file or not; a classifier may lack the
    output head, and have one of its own.
    """
    for name, held, asked in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"{folder.path}: {name} has the shape {list(held)}, and the config asks for "
            f"{list(asked)}",
            expected="a config that belongs to the weights",
            fix="correct the sizes in config.json, or copy the folder again",
        )
    absent = set() if speaks else _head_names(causal)
    missing = sorted(set(report["missing_keys"]) - absent)
    if missing:
        raise ModelError(
            f"{folder.path}: {len(missing)} tensors that the config asks for are missing: "
            f"{_some(missing)}. The loader would fill them with random numbers",
            expected="every weight of the model",
            fix="copy the folder again, or correct config.json",
        )
    computed = {name for name, _ in causal.named_buffers()}
    children = {name for name, _ in causal.named_children()}
    unexpected = sorted(
        name
        for name in report["unexpected_keys"]
        if name not in computed
        and not _COMPUTED.search(name)
        and not (folder.classifies and name.split(".")[0] not in children)
        and not folder.predicts_ahead(name)
    )
    if unexpected:
        raise ModelError(
            f"{folder.path}: {len(unexpected)} tensors belong to no part of the model: "
            f"{_some(unexpected)}. The loader would drop them",
            expected="the weights that config.json describes, and no others",
            fix="correct config.json (its model_type and sizes), or remove the tensors",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _check_weights(
    causal: PreTrainedModel, folder: ModelFolder, *, left_out: Collection[str]
) -> Mapping[str, int]:
    """Check that all weights are finite, and equal to the files' under the same name.

    Some are joined, split, transposed or renamed by the library: of these the numbers are
    compared without their order.

    Returns:
        How many tensors of the files came out how.
    """
    loaded: dict[str, Tensor] = dict(causal.named_parameters(remove_duplicate=False))
    for name, own in loaded.items():
        _check_finite(name, own.detach(), folder)
    loaded |= {n: b for n, b in causal.named_buffers() if n in folder.tensors}
    num_equal, others, total = 0, 0, 0
    for name, held in _held(folder):
        weight = loaded.get(name)
        if weight is not None and weight.shape == held.shape:
            _check_equal(name, weight.detach(), held, folder)
            num_equal += 1
        elif name not in left_out:
            others, total = others + 1, total + _unordered(held.to(causal.dtype))
    rest = [w for n, w in causal.named_parameters() if n not in folder.tensors]
    all_there = sum(_unordered(w.detach()) for w in rest) % _WORDS == total % _WORDS
    words = "as joined by the library" if all_there else "changed by the library, not compared"
    return {"equal to the files": num_equal, words: others}


def _held(folder: ModelFolder) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the files, one at a time."""
    for file in sorted({t.file for t in folder.tensors.values()}):
        with safe_open(folder.path / file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # no mapping
                yield name, content.get_tensor(name)


def _check_equal(name: str, weight: Tensor, held: Tensor, folder: ModelFolder) -> None:
    if not torch.equal(weight, held.to(weight.dtype)):
        raise ModelError(
            f"{folder.path}: {name} was loaded with other values than "
            f"{folder.tensors[name].file} holds",
            expected="equal values",
            fix="the installed transformers changes this tensor when it loads it: use another "
            "version, or another model",
        )


def _unordered(weight: Tensor) -> int:
    """A sum of all numbers, as integers: exact, and equal in every order."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(weight.element_size())
    return 0 if bits is None else int(weight.contiguous().view(bits).sum(dtype=torch.int64))


def _check_finite(name: str, weight: Tensor, folder: ModelFolder) -> None:
    if not weight.is_floating_point() or bool(torch.isfinite(weight.sum())):
        return
    # The sum of finite weights may overflow: now look at every one.
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ModelError(
            f"{folder.path}: {name} has {bad:,} values that are not finite (NaN or infinity)",
            expected="finite weights",
            fix="export the model again from a checkpoint before its training diverged",
        )


def _settle_head(causal: PreTrainedModel) -> str:
    """Make the configuration say whether the head is the embedding, as the weights do.

    The library keeps a head that the file holds although the configuration calls it tied. An
    export with that configuration would lose the head in programs that believe it.
    """
    tied = causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
    said = bool(vars(causal.config).get("tie_word_embeddings"))  # a few configurations have none
    if said and not tied:
        for part in {id(c): c for c in (causal.config, causal.config.get_text_config())}.values():
            part.tie_word_embeddings = False
        return "the file's own head, though the config says tied: the export will say untied"
    return "head tied" if tied else "head of its own"


def _left_out(causal: PreTrainedModel, folder: ModelFolder) -> list[str]:
    """Tensors that the family leaves out on purpose, such as those of images in a text model."""
    patterns = causal._keys_to_ignore_on_load_unexpected or ()
    named = dict(causal.named_parameters(remove_duplicate=False))
    return [
        name
        for name in folder.tensors
        if name not in named and any(re.search(pattern, name) for pattern in patterns)
    ]
