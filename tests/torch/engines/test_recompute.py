"""Activation checkpointing: the same step, bit for bit, with less in memory."""

import pytest
import torch
from material import random_groups

from posttrain.core.errors import ConfigError, ModelError
from posttrain.core.learner import Lora, Optimizer
from posttrain.engines.local.engine import LocalEngine
from posttrain.engines.local.loading import load_model
from posttrain.engines.local.recompute import Recomputation
from posttrain.numerics.batch import pack
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import tiny_model
from posttrain.training.objective import StageObjective

OBJECTIVE = StageObjective((CrossEntropy(),))


def learners(folder, lora=None):
    engine = LocalEngine(device=torch.device("cpu"))
    return [
        engine.learner(
            str(folder),
            name="t",
            optimizer=Optimizer(lr=1e-2),
            lora=lora,
            activation_checkpointing=on,
        )
        for on in (False, True)
    ]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "mistral"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_the_same_steps_bit_for_bit(family, lora, tmp_path):
    plain, recomputed = learners(tiny_model(tmp_path / "m", family=family), lora)
    for seed in range(3):
        batches = pack(random_groups(seed=seed), needs=frozenset(), max_tokens=40)
        reports = [x.step(batches, OBJECTIVE, lr_scale=1.0) for x in (plain, recomputed)]
        assert reports[0].loss == reports[1].loss
        assert reports[0].grad_norm == reports[1].grad_norm
    weights = dict(plain.policy.model.causal.named_parameters())
    for name, weight in recomputed.policy.model.causal.named_parameters():
        assert torch.equal(weight, weights[name]), name


def kept_bytes(learner, batch):
    """What autograd keeps between the passes of the decoder, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in learner.policy.model.causal.parameters()}
    kept = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden, _ = learner._forward(batch, OBJECTIVE)
    assert hidden.requires_grad
    return sum(kept.values())


def test_less_is_kept(tmp_path):
    plain, recomputed = learners(tiny_model(tmp_path / "m"))
    (batch,) = pack(random_groups(num_groups=8), needs=frozenset(), max_tokens=9999)
    everything = kept_bytes(plain, batch)
    with recomputed._recomputed.on():
        little = kept_bytes(recomputed, batch)
    assert little < 0.3 * everything


def test_sampling_and_scoring_run_as_they_always_do(tmp_path):
    plain, recomputed = learners(tiny_model(tmp_path / "m"))
    trajectories = [m.trajectory for g in random_groups() for m in g.members]
    for ours, theirs in zip(
        recomputed.policy.logprobs(trajectories), plain.policy.logprobs(trajectories), strict=True
    ):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), equal_nan=True)
    assert not any(m.training for m in recomputed.policy.model.causal.modules())


def test_layers_with_dropout_are_refused(tiny_folder):
    model = load_model(str(tiny_folder))
    model.causal.base_model.layers[0].dropout = 0.1
    with pytest.raises(ModelError, match="drops 10%"):
        Recomputation([model])


def test_a_family_without_the_hook_is_refused(tiny_folder, monkeypatch):
    model = load_model(str(tiny_folder))
    monkeypatch.setattr(model.causal, "modules", lambda: iter([torch.nn.Linear(1, 1)]))
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        Recomputation([model])
