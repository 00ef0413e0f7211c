"""The routers' balancing loss: added as the configuration asks, and equal to the library's."""

import pytest
import torch
from material import random_groups
from transformers import AutoModelForCausalLM

from posttrain.core.errors import ModelError
from posttrain.core.learner import Lora, Optimizer
from posttrain.engines.local import routing
from posttrain.engines.local.engine import LocalEngine
from posttrain.numerics.batch import pack
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import tiny_model
from posttrain.training.objective import StageObjective

OBJECTIVE = StageObjective((CrossEntropy(),))
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
}


def moe(folder, family, *, weight, asked=True):
    return tiny_model(
        folder,
        family=family,
        tied=False,
        num_experts_per_tok=2,
        output_router_logits=asked,
        router_aux_loss_coef=weight,
        **FAMILIES[family],
    )


def learner(folder, **options):
    engine = LocalEngine(device=torch.device("cpu"))
    lora = options.pop("lora", None)
    return engine.learner(str(folder), name="t", optimizer=Optimizer(lr=0.0), lora=lora, **options)


def gradients(made, batches):
    report = made.step(batches, OBJECTIVE, lr_scale=1.0)
    named = made.policy.model.causal.named_parameters()
    return report, {n: p.grad.clone() for n, p in named if p.grad is not None}


def rows():
    """One sequence: nothing is shared, so that the library sees the same tokens."""
    groups = random_groups(num_groups=1, size=1, seed=3)
    return groups[0].members[0].trajectory.tokens, pack(groups, needs=frozenset(), max_tokens=100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_adds_the_gradient_of_the_librarys_own(tmp_path, monkeypatch, family, checkpointing):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(1.0))
    tokens, batches = rows()
    weight = 3.0
    with_it = learner(
        moe(tmp_path / "a", family, weight=weight), activation_checkpointing=checkpointing
    )
    report, got = gradients(with_it, batches)
    _, plain = gradients(learner(moe(tmp_path / "b", family, weight=0.0)), batches)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    ids = torch.tensor([tokens[: batches[0].num_tokens].tolist()])
    aux = stock(input_ids=ids, output_router_logits=True).aux_loss
    (weight * aux).backward()
    assert report.metrics[routing.BALANCE] == pytest.approx(float(aux.detach()), abs=1e-5)
    own = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    assert any("gate" in n for n in own)
    for name, grad in own.items():
        torch.testing.assert_close(got[name] - plain[name], grad, atol=2e-5, rtol=2e-4)


def test_micro_batches_are_weighted_by_their_tokens(tmp_path):
    made = learner(moe(tmp_path / "m", "qwen3_moe", weight=1.0))
    batches = pack(random_groups(seed=1), needs=frozenset(), max_tokens=20)
    assert len(batches) > 1
    alone = [made.step([b], OBJECTIVE, lr_scale=1.0).metrics[routing.BALANCE] for b in batches]
    both = made.step(batches, OBJECTIVE, lr_scale=1.0).metrics[routing.BALANCE]
    sizes = [b.num_tokens for b in batches]
    assert both == pytest.approx(
        sum(a * n for a, n in zip(alone, sizes, strict=True)) / sum(sizes), rel=1e-5
    )


def test_it_works_with_adapters(tmp_path):
    made = learner(moe(tmp_path / "m", "qwen3_moe", weight=1.0), lora=Lora(rank=2))
    _, batches = rows()
    assert made.step(batches, OBJECTIVE, lr_scale=1.0).metrics[routing.BALANCE] > 0


@pytest.mark.parametrize(("weight", "asked"), [(0.001, False), (0.0, True), (0.0, False)])
def test_it_is_absent_where_the_config_does_not_ask_and_that_is_said(tmp_path, weight, asked):
    made = learner(moe(tmp_path / "m", "qwen3_moe", weight=weight, asked=asked))
    _, batches = rows()
    assert routing.BALANCE not in made.step(batches, OBJECTIVE, lr_scale=1.0).metrics
    said = [p.words for p in made.policy.proofs]
    assert bool(said) == bool(weight)
    assert all("output_router_logits is off" in words and "0.001" in words for words in said)


@pytest.mark.parametrize("spoil", ["absent", "other"])
def test_what_cannot_be_computed_as_the_library_does_is_refused(tmp_path, monkeypatch, spoil):
    folder = moe(tmp_path / "m", "qwen3_moe", weight=1.0)
    module = __import__("transformers.models.qwen3_moe.modeling_qwen3_moe", fromlist=["m"])
    own = module.load_balancing_loss_func
    if spoil == "absent":
        monkeypatch.setattr(routing, "_FUNCTION", "no_such_function")
    else:
        calls = []

        def drifting(*args, **more):
            calls.append(1)
            return own(*args, **more) * len(calls)

        monkeypatch.setattr(module, "load_balancing_loss_func", drifting)
    with pytest.raises(ModelError, match="balancing loss"):
        learner(folder)
