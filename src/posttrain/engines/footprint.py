"""What training takes of a machine's memory: how many tokens at once, and who keeps freed pages.

activations of a token ≈ OVERHEAD · Σ over linear layers (inputs + outputs)
tokens of a micro-batch = budget / activations of a token, within bounds
"""

from __future__ import annotations

import ctypes
import platform

import torch
from torch import nn

CPU_BUDGET = 192 * 2**20
"""Bytes of activations on a CPU. More tokens at once are no faster there, and miss its caches."""

CUDA_SHARE = 0.25
"""Share of a GPU's memory for activations: the rest holds weights, optimiser state and rollouts."""

BOUNDS = {"cpu": (1024, 4096), "cuda": (2048, 32768)}
"""Fewest and most tokens of a micro-batch. With too few, groups are split and their prompts are
computed again."""

OVERHEAD = 1.4
"""Activations kept for the backward pass, over inputs and outputs of the linear layers: norms,
rotary embedding and attention come on top. Read off Qwen3's layers."""


def activation_bytes(decoder: nn.Module) -> float:
    """Bytes that one token's activations take until the backward pass.

    Example:
        >>> activation_bytes(nn.Linear(100, 50)) == OVERHEAD * 150 * 4
        True
    """
    linear = [m for m in decoder.modules() if isinstance(m, nn.Linear)]
    width = sum(m.in_features + m.out_features for m in linear)
    size = max((m.weight.element_size() for m in linear), default=4)
    return OVERHEAD * width * size


def comfortable_tokens(decoder: nn.Module, device: torch.device) -> int:
    """Tokens of a micro-batch where the stage names no number."""
    budget: float = CPU_BUDGET
    if device.type == "cuda":
        budget = CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory
    least, most = BOUNDS["cuda" if device.type == "cuda" else "cpu"]
    return int(min(max(budget / max(activation_bytes(decoder), 1.0), least), most))


def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed, instead of handing it back to the kernel.

    Every step frees and takes the same activations. By default, blocks beyond 128 KiB to 32 MiB
    are mapped anew each time, and the kernel clears every page before it is used. Returns False
    where the C library is not glibc; nothing else depends on it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # the names of malloc.h, without their M_
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
