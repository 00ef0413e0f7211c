"""Float32 master weights, so that small updates are not lost to rounding.

A bfloat16 weight has 8 bits of precision: an update of less than about 1/256 of it changes nothing.
At the learning rates of post-training nearly every update is that small. The optimiser therefore
works on float32 copies, and the model's own weights are their rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

SAMPLED = 64
"""Entries of a weight that are compared before and after an update."""


@final
class MasterWeights:
    """The optimiser's parameters: the model's weights where they are float32, else copies."""

    def __init__(self, trained: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._pairs = [(n, p, p if p.dtype == torch.float32 else _copy(p)) for n, p in trained]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The float32 weights, in the model's order."""
        return [master for _, _, master in self._pairs]

    def take_gradients(self) -> None:
        """Move the gradients of the model's weights to the masters."""
        for _, live, master in self._pairs:
            if live is not master:
                master.grad = None if live.grad is None else live.grad.float()
                live.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters, rounded, into the model's weights."""
        for _, live, master in self._pairs:
            if live is not master:
                live.copy_(master)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """[n] some entries of every weight, always the same ones."""
        flat = (master.reshape(-1) for _, _, master in self._pairs)
        return torch.cat([w[:: max(len(w) // SAMPLED, 1)][:SAMPLED] for w in flat])

    def state(self) -> dict[str, Tensor]:
        """The masters by name."""
        return {name: master.detach() for name, _, master in self._pairs}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load :meth:`state`, and write it into the model."""
        for name, _, master in self._pairs:
            master.copy_(state[name])
        self.write_back()


def _copy(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().float())
