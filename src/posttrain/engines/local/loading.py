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
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as library_logging

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Proof
from posttrain.engines.local.attention import IMPLEMENTATION
from posttrain.engines.local.model import Dtype, Model, prove_packing
from posttrain.models.folder import ModelFolder, read_folder
from posttrain.models.hub import resolve_folder
from posttrain.models.library import read_tokenizer, reading

# A progress bar per loaded shard would break the run's own progress display.
library_logging.disable_progress_bar()

MARGIN = 3
"""A model may declare this many times the weights of its folder: tied heads count twice."""

_ALLOWANCE = 10_000_000  # weights, and thousandths of it modules: for tiny folders
_COMPUTED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|masked_bias|position_ids)$")
_SHOWN = 4
_SAMPLE = 1 << 22  # elements summed at a time


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
) -> Model:
    """Load a causal LM and its tokenizer, and prove that both are what the folder holds.

    Args:
        name: a folder, or a hub id.
        dtype: of the weights. On a CPU float32 is faster than bfloat16.
        device: default CPU.
        remote_code: run code from the model's repository. Off unless the recipe allows it.

    Raises:
        ModelError: not a model, unreadable, no tokenizer; weights missing, unexpected, of other
            shapes, not finite or not those of the files; or not exact when packed.
    """
    folder = read_folder(resolve_folder(name))
    tokenizer = read_tokenizer(folder, remote_code=remote_code)
    with reading(name), _bounded(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=getattr(torch, dtype),
            attn_implementation=IMPLEMENTATION,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=remote_code,
        )
    causal: PreTrainedModel = loaded[0]
    start = time.perf_counter()
    report = LoadReport.of(causal, folder, loaded[1])
    report.check()
    compared = compare(causal, folder)
    _settle_tie(causal)
    seconds = time.perf_counter() - start
    # With dropout the trained policy would differ from the sampled policy: always eval mode.
    nn.Module.to(causal, device or torch.device("cpu")).eval()
    ...
