"""How many tokens go through a model at once."""

import pytest
import torch
from torch import nn

from posttrain.core.learner import Optimizer
from posttrain.engines.local.attention import PackedPlan
from posttrain.engines.local.footprint import (
    BOUNDS,
    CPU_BUDGET,
    activation_bytes,
    comfortable_tokens,
)
from posttrain.numerics.batch import Segment
from posttrain.testing import tiny_model

CPU = torch.device("cpu")


def test_activations_are_counted_as_autograd_keeps_them(engine, tmp_path):
    """The estimate stands within a factor of two of what is saved for the backward pass."""
    learner = engine.learner(
        str(tiny_model(tmp_path / "m", seed=1)), name="l", optimizer=Optimizer(), lora=None
    )
    model, decoder = learner.policy.model, learner.policy.model.causal.base_model
    own = {w.untyped_storage().data_ptr() for w in decoder.parameters()}
    kept: dict[int, torch.Tensor] = {}  # one per storage; held, so that none is used again

    def note(saved: torch.Tensor) -> torch.Tensor:
        if saved.untyped_storage().data_ptr() not in own:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    num = 400
    plan = PackedPlan.of((Segment(0, num, None),), device=CPU)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        hidden = model.hidden(torch.arange(num) % 20, torch.arange(num), plan)
    assert hidden.requires_grad
    measured = sum(t.untyped_storage().nbytes() for t in kept.values()) / num
    assert 0.5 < measured / activation_bytes(decoder) < 2


@pytest.mark.parametrize(("width", "tokens"), [(10, BOUNDS["cpu"][1]), (20_000, BOUNDS["cpu"][0])])
def test_tokens_at_once_stay_within_bounds(width, tokens):
    assert comfortable_tokens(nn.Linear(width, width), CPU) == tokens


def test_between_the_bounds_the_activations_fill_the_budget():
    decoder = nn.Linear(15_000, 1_000)
    tokens = comfortable_tokens(decoder, CPU)
    assert tokens * activation_bytes(decoder) == pytest.approx(CPU_BUDGET, rel=1e-3)
