"""The default number of tokens of a micro-batch, so that activations fit into memory.

activations of a token ≈ OVERHEAD · Σ over linear layers (inputs + outputs)
tokens of a micro-batch = budget / activations of a token, within bounds
"""

from __future__ import annotations

import torch
from torch import nn

CPU_BUDGET = 192 * 2**20
"""Bytes of activations on a CPU. Larger micro-batches were not faster there (lab log)."""

CUDA_SHARE = 0.25
"""Share of a GPU's memory for activations: the rest holds weights, optimiser state and rollouts."""

BOUNDS = {"cpu": (1024, 4096), "cuda": (2048, 32768)}
"""Fewest and most tokens of a micro-batch. With too few, groups are split and their prompts are
computed again."""

OVERHEAD = 1.4
"""Activations kept for the backward pass, over inputs and outputs of the linear layers: norms,
rotary embedding and attention come on top. Taken from Qwen3's layers."""


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
    """Default number of tokens of a micro-batch."""
    budget: float = CPU_BUDGET
    if device.type == "cuda":
        budget = CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory
    least, most = BOUNDS["cuda" if device.type == "cuda" else "cpu"]
    return int(min(max(budget / max(activation_bytes(decoder), 1.0), least), most))
