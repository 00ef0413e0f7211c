"""Activation checkpointing: each layer's activations are computed again in the backward pass.

Memory falls from all activations of every layer to one hidden state per layer, and a step computes
the layers' forward pass twice: about a third more work. The model library's own hook does it, one
decoder layer at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import final

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.core.errors import ConfigError, ModelError
from posttrain.engines.local.model import Model
from posttrain.numerics.matmul import linear_layers

# The hook's new name is not known to the older releases that we support.
warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`", category=FutureWarning)


@final
class Recomputation:
    """Activation checkpointing for the decoder layers of models that are trained together.

    Raises:
        ConfigError: the family's layers do not support it.
        ModelError: a layer has dropout, which would differ in the recomputation.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._layers: list[nn.Module] = [layer for model in models for layer in _enabled(model)]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Recompute in this context, for a forward pass with a gradient."""
        # The hook reads the layer's own training flag, not those of its submodules.
        for layer in self._layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.training = False


def _enabled(model: Model) -> list[GradientCheckpointingLayer]:
    """A model's decoder layers, with the library's hook installed."""
    layers = [m for m in model.causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"activation_checkpointing for {model.causal.config.model_type}",
            expected="a family whose layers the model library can recompute",
            fix="leave it off, and lower micro_batch_tokens",
        )
    for layer in layers:
        # A number, not a module: a dropout module has its own flag, which stays off.
        rate = vars(layer).get("dropout", 0.0)
        if rate:
            raise ModelError(
                f"{type(layer).__name__} drops {rate:.0%} of its activations in training",
                expected="layers without dropout, for activation_checkpointing",
                fix="set dropout to 0 in the model's config.json",
            )
    model.causal.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": lambda: (nullcontext(), linear_layers()),  # the forward pass has its own
        }
    )
    return layers
