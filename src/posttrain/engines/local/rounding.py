"""Rounding as noise: what a model differs from itself by in its number type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def rounded_anew(causal: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """One more rounding error in the output of every innermost module: times 1 + ε u / 2.

    ε is the distance from 1 to the next number of the output's type, and u is drawn from [-1, 1].
    """
    draws: dict[torch.device, torch.Generator] = {}

    def rounded(_module: nn.Module, _inputs: object, out: object) -> object:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if out.device not in draws:
            draws[out.device] = torch.Generator(out.device).manual_seed(seed)
        uniform = torch.rand(out.shape, generator=draws[out.device], device=out.device)
        scale = 1 + torch.finfo(out.dtype).eps * (uniform - 0.5)
        return (out.float() * scale).to(out.dtype)

    leaves = [m for m in causal.modules() if next(m.children(), None) is None]
    hooks = [module.register_forward_hook(rounded) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
