"""A moving reference: an exponential moving average of the learner's weights.

Only trained weights are duplicated. A model with adapters shares its frozen weights with its
average.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from posttrain.core.learner import MovingReference
from posttrain.engines.local.master_weights import MasterWeights
from posttrain.engines.local.model import Model


@final
class MovingAverage:
    """A copy of a model whose trained weights are a moving average of the original's.

    Args:
        model: the learner's.
        trained: names of the trained weights.
        spec: rate and interval of the average.
    """

    def __init__(self, model: Model, trained: Sequence[str], spec: MovingReference) -> None:
        self._spec = spec
        shared = [*model.causal.buffers()]
        shared += [p for n, p in model.causal.named_parameters() if n not in set(trained)]
        causal = copy.deepcopy(model.causal, {id(t): t for t in shared})
        self.model = replace(model, causal=causal)
        own = dict(causal.named_parameters())
        for name in trained:
            own[name].requires_grad_(False)
        self._weights = MasterWeights([(name, own[name]) for name in trained])

    @torch.no_grad()
    def follow(self, learner: Mapping[str, Tensor], *, step: int) -> None:
        """Update the average towards the learner's float32 weights, if an update is due.

        Args:
            learner: weights by name.
            step: optimiser steps taken.
        """
        if not self._spec.due(step):
            return
        for name, own in self._weights.state().items():
            own.lerp_(learner[name], self._spec.rate)
        self._weights.write_back()

    def state(self) -> dict[str, Tensor]:
        """The float32 weights by name."""
        return self._weights.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load :meth:`state`."""
        self._weights.load(state)
