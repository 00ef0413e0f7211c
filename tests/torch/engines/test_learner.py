"""Learners: exact resume, plain export, adapters."""

import numpy as np
import pytest
import torch
from material import random_groups
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.core.errors import ModelError, RunError
from posttrain.core.learner import Lora, Optimizer
from posttrain.engines.local.engine import LocalEngine
from posttrain.engines.local.loading import load_model
from posttrain.numerics.batch import pack
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import check_learner, tiny_model
from posttrain.training.objective import StageObjective

OBJECTIVE = StageObjective((CrossEntropy(),))


def batches(seed):
    return pack(random_groups(seed=seed), needs=frozenset(), max_tokens=40)


def weights(learner):
    return {n: p.detach().clone() for n, p in learner.policy.model.causal.named_parameters()}


def make(engine, folder, lora=None):
    optimizer = Optimizer(lr=1e-2, weight_decay=0.1)
    return engine.learner(str(folder), name="t", optimizer=optimizer, lora=lora)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_save_and_load_go_on_bit_for_bit(engine, tiny_folder, tmp_path, lora):
    straight = make(engine, tiny_folder, lora)
    for seed in range(3):
        straight.step(batches(seed), OBJECTIVE, lr_scale=1.0)
    straight.save(tmp_path)
    for seed in range(3, 6):
        straight.step(batches(seed), OBJECTIVE, lr_scale=1.0)

    resumed = make(engine, tiny_folder, lora)
    resumed.load(tmp_path)
    assert resumed.policy.version == 3
    for seed in range(3, 6):
        resumed.step(batches(seed), OBJECTIVE, lr_scale=1.0)
    expected = weights(straight)
    assert all(torch.equal(w, expected[n]) for n, w in weights(resumed).items())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_a_plain_model_with_the_same_log_probs(engine, tmp_path, lora, tied):
    folder = tiny_model(tmp_path / "base", tied=tied)
    learner = make(engine, folder, lora)
    for seed in range(3):
        learner.step(batches(seed), OBJECTIVE, lr_scale=1.0)
    (tmp_path / "out").mkdir()
    learner.export(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert "posttrain" not in (tmp_path / "out" / "config.json").read_text()
    moved = 0.0
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for group in random_groups(seed=9):
        for member in group.members:
            t = member.trajectory
            ids = torch.tensor([t.tokens.tolist()])
            with torch.no_grad():
                logp = plain(input_ids=ids).logits[0].log_softmax(-1)
                old = base(input_ids=ids).logits[0].log_softmax(-1)
            (values,) = learner.policy.logprobs([t])
            for i in np.flatnonzero(np.isfinite(values)):
                assert values[i] == pytest.approx(float(logp[i - 1, t.tokens[i]]), abs=5e-5)
                moved = max(moved, abs(float(logp[i - 1, t.tokens[i]] - old[i - 1, t.tokens[i]])))
    assert moved > 0.1, "training must have changed the policy, or the comparison says nothing"


def test_contract(engine, tiny_folder):
    check_learner(make(engine, tiny_folder), batches(0), OBJECTIVE)


def test_a_non_finite_gradient_stops_before_the_step(engine, tiny_folder):
    learner = make(engine, tiny_folder)
    with torch.no_grad():
        learner.policy.model.causal.get_input_embeddings().weight[7] = float("inf")
    before = weights(learner)
    with pytest.raises(ModelError, match="not finite"):
        learner.step(batches(0), OBJECTIVE, lr_scale=1.0)
    after = weights(learner)
    assert all(torch.equal(w, after[n]) for n, w in before.items())
    assert learner.policy.version == 0


def test_a_checkpoint_of_another_learner_is_refused(engine, tiny_folder, tmp_path):
    make(engine, tiny_folder, Lora(rank=4)).save(tmp_path)
    with pytest.raises(RunError, match="weights"):
        make(engine, tiny_folder).load(tmp_path)


@pytest.mark.parametrize("spoil", ["empty", "no config", "no weights", "bad json", "no tokenizer"])
def test_a_folder_that_is_not_a_model(tmp_path, spoil):
    folder = tmp_path / "m"
    folder.mkdir()
    if spoil != "empty":
        tiny_model(folder)
    gone = {
        "no config": ["config.json"],
        "no weights": ["model.safetensors"],
        "no tokenizer": ["tokenizer.json", "tokenizer_config.json"],
    }
    for name in gone.get(spoil, []):
        (folder / name).unlink()
    if spoil == "bad json":
        (folder / "config.json").write_text("{")
    with pytest.raises(ModelError):
        load_model(str(folder))


def test_a_missing_folder_says_so():
    with pytest.raises(ModelError, match="no model folder at"):
        load_model("./nowhere")


def test_remote_code_is_off_unless_named(tmp_path, engine):
    folder = tiny_model(tmp_path / "m")
    config = (folder / "config.json").read_text()
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    (folder / "config.json").write_text(
        config.replace('"qwen3"', '"custom"').replace(
            "{", '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},', 1
        )
    )
    with pytest.raises(ModelError):
        LocalEngine(device=torch.device("cpu"), remote_code="other").policy(str(folder))


def test_bfloat16_training_keeps_small_steps(tiny_folder):
    """At a small learning rate float32 and bfloat16 training move the weights alike."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        engine = LocalEngine(device=torch.device("cpu"), dtype=dtype)
        optimizer = Optimizer(lr=1e-5)
        learner = engine.learner(str(tiny_folder), name="t", optimizer=optimizer, lora=None, seed=0)
        assert learner.policy.model.causal.dtype == getattr(torch, dtype)
        before = {n: w.clone() for n, w in learner._masters.state().items()}
        for seed in range(8):
            learner.step(batches(seed), OBJECTIVE, lr_scale=1.0)
        after = learner._masters.state()
        assert all(w.dtype == torch.float32 for w in after.values())
        moved[dtype] = float(np.mean([(after[n] - w).abs().mean() for n, w in before.items()]))
        live = dict(learner.policy.model.causal.named_parameters())
        assert all(torch.equal(live[n], w.to(live[n].dtype)) for n, w in after.items())
    assert moved["bfloat16"] == pytest.approx(moved["float32"], rel=0.2)
