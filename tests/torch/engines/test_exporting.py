"""Exports: reloaded, they are the trained policy, and every planted difference is named."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from material import random_groups, trajectory
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from posttrain.core.errors import ConfigError, ModelError
from posttrain.core.learner import Lora, Optimizer
from posttrain.core.proofs import Subject
from posttrain.core.provenance import Sampling
from posttrain.engines.local import exporting
from posttrain.engines.local.engine import LocalEngine
from posttrain.numerics.batch import pack
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.protocols import Request, ScalarStart
from posttrain.testing.tiny import tiny_model, tiny_tokenizer
from posttrain.training.objective import StageObjective

OBJECTIVE = StageObjective((CrossEntropy(),))


def trained(folder, *, lora=None, dtype="float32", steps=3):
    engine = LocalEngine(device=torch.device("cpu"), dtype=dtype)
    optimizer = Optimizer(lr=1e-2, weight_decay=0.1)
    learner = engine.learner(str(folder), name="t", optimizer=optimizer, lora=lora)
    for seed in range(steps):
        batches = pack(random_groups(seed=seed), needs=frozenset(), max_tokens=40)
        learner.step(batches, OBJECTIVE, lr_scale=1.0)
    return learner


def exported(learner, out):
    out.mkdir()
    return learner.export(out)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("base") / "m", tied=False)
    (folder / "processor_config.json").write_text('{"processor_class": "P", "image_seq_length": 4}')
    return folder


def edit_json(name, change):
    def spoil(folder):
        entries = json.loads((folder / name).read_text())
        change(entries)
        (folder / name).write_text(json.dumps(entries))

    return spoil


def edit_tensors(change, name="model.safetensors"):
    def spoil(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return spoil


def permuted(tensors):
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].roll(4, 0).contiguous()


def rounded(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].bfloat16().float()


def other_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|assistant|>", "<|user|>", 1))


WHOLE = {
    "rope": (
        edit_json("config.json", lambda c: c["rope_parameters"].update(rope_theta=5e5)),
        r"config.json, rope_parameters is .*500000",
    ),
    "a head missing": (
        edit_tensors(lambda t: t.pop("lm_head.weight")),
        r"missing keys: lm_head.weight",
    ),
    "a layer less": (
        edit_json("config.json", lambda c: c.update(num_hidden_layers=1, layer_types=None)),
        r"unexpected keys: model.layers.1",
    ),
    "a number": (
        edit_tensors(lambda t: t["model.norm.weight"].view(-1)[3].add_(1e-6)),
        r"model.norm.weight differs in 1 of 32 numbers",
    ),
    "NaN": (
        edit_tensors(lambda t: t["model.norm.weight"].view(-1)[3].fill_(float("nan"))),
        r"model.norm.weight differs in 1 of 32",
    ),
    "rounded": (edit_tensors(rounded), r"layers.0.mlp.up_proj.weight differs"),
    "permuted": (edit_tensors(permuted), r"layers.1.self_attn.q_proj.weight differs"),
    "number type": (
        edit_json("config.json", lambda c: c.update(dtype="bfloat16")),
        r"tensor lm_head.weight is torch.bfloat16",
    ),
    "template": (other_template, r"chat template: character"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), r"chat template"),
    "stop token": (
        edit_json("generation_config.json", lambda c: c.update(eos_token_id=None)),
        r"generation_config.json, eos_token_id is None, and was 1",
    ),
    "start token": (
        edit_json("tokenizer_config.json", lambda c: c.update(bos_token="<|user|>")),
        r"special token bos_token",
    ),
    "vocabulary": (
        edit_json("tokenizer.json", lambda c: c["model"]["vocab"].update({"é": 60})),
        r"vocabulary",
    ),
    "tokens": (
        edit_json("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
        r"token 0 of .The answer",
    ),
    "processor": (lambda f: (f / "processor_config.json").unlink(), r"processor_config.json"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-50]
        ),
        r"does not load",
    ),
}
ADAPTER = {
    "a layer less": (
        edit_tensors(
            lambda t: [t.pop(n) for n in sorted(t) if "layers.1.mlp.down_proj" in n],
            "adapter/adapter_model.safetensors",
        ),
        r"adapter: tensor .*layers.1.mlp.down_proj.lora_A",
    ),
    "scale": (
        edit_json("adapter/adapter_config.json", lambda c: c.update(lora_alpha=16)),
        r"adapter and merged weights: log-probs differ",
    ),
    "rank": (
        edit_json("adapter/adapter_config.json", lambda c: c.update(r=2)),
        r"its adapter does not load",
    ),
}


def check_named(monkeypatch, learner, out, spoil, message):
    write = exporting._write

    def spoiled(causal, model, folder):
        write(causal, model, folder)
        spoil(folder)

    monkeypatch.setattr(exporting, "_write", spoiled)
    with pytest.raises(ModelError, match=message) as caught:
        exported(learner, out)
    assert "last checkpoint is complete" in str(caught.value)


@pytest.mark.parametrize("defect", WHOLE)
def test_a_defect_is_named(monkeypatch, base, tmp_path, defect):
    learner = trained(base, steps=1)
    check_named(monkeypatch, learner, tmp_path / "out", *WHOLE[defect])


@pytest.mark.parametrize("defect", ADAPTER)
def test_a_defect_of_adapters_is_named(monkeypatch, base, tmp_path, defect):
    learner = trained(base, lora=Lora(rank=4))
    check_named(monkeypatch, learner, tmp_path / "out", *ADAPTER[defect])


def test_adapters_merged_at_half_their_scale_are_named(monkeypatch, base, tmp_path):
    merged = exporting._merged

    def half(adapters):
        weaker = copy.deepcopy(adapters)
        with torch.no_grad():
            for name, weight in weaker.named_parameters():
                if "lora_B" in name:
                    weight.mul_(0.5)
        return merged(weaker)

    monkeypatch.setattr(exporting, "_merged", half)
    with pytest.raises(ModelError, match=r"log-probs differ by .* and rounding explains"):
        exported(trained(base, lora=Lora(rank=4)), tmp_path / "out")


FAMILIES = {
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": None},
    "phi3": {},
    "granite": {},
    "cohere2": {},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
}


def qwen2_moe(folder):
    return tiny_model(folder, family="qwen2_moe", tied=False, **FAMILIES["qwen2_moe"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tied", "dtype"), [(True, "float32"), (False, "bfloat16")])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_clean_exports_are_not_refused(tmp_path, family, tied, dtype, lora):
    folder = tiny_model(tmp_path / "base", family=family, tied=tied, **FAMILIES[family])
    proofs = exported(trained(folder, lora=lora, dtype=dtype), tmp_path / "out")
    assert {p.subject for p in proofs} == {Subject.EXPORT}
    assert len(proofs) == (2 if lora else 1)
    # A margin of two to the tolerance, which is 16 times the rounding.
    assert all(p.figures["gap"] <= max(8 * p.figures["rounding"], 1e-5) for p in proofs)


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("q_proj", "embed_tokens")])
def test_adapters_on_tied_ends_are_refused(tmp_path, targets):
    folder = tiny_model(tmp_path / "m", tied=True)
    with pytest.raises(ConfigError, match="one weight"):
        trained(folder, lora=Lora(rank=4, target_modules=targets))


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens", "q_proj")])
def test_adapters_on_untied_ends_are_exported_right(base, tmp_path, targets):
    learner = trained(base, lora=Lora(rank=4, target_modules=targets))
    _, adapter = exported(learner, tmp_path / "out")
    assert adapter.figures["reached"] == (1 if targets == ("lm_head",) else 3)
    assert "not: " in adapter.words


def test_a_target_that_no_module_has_is_refused(base):
    with pytest.raises(ConfigError, match="no module is called keys_proj"):
        trained(base, lora=Lora(rank=4, target_modules=("q_proj", "keys_proj")))


def test_a_merged_weight_moves_by_alpha_over_rank(base, tmp_path):
    exported(trained(base, lora=Lora(rank=4, alpha=6)), tmp_path / "out")
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    adapters = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    low, high = (adapters[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    moved = after[f"{name}.weight"] - before[f"{name}.weight"]
    assert float(moved.abs().max()) > 1e-3
    torch.testing.assert_close(moved, 6 / 4 * high @ low, rtol=0, atol=1e-6)


def test_all_linear_reaches_experts_and_routers(tmp_path):
    learner = trained(
        qwen2_moe(tmp_path / "m"),
        lora=Lora(rank=4),
    )
    said, *_ = learner.policy.proofs
    assert "adapters reach 22 of 22 weight matrices" in said.words
    names = {n for n, p in learner.policy.model.causal.named_parameters() if p.requires_grad}
    assert all(any(part in n for n in names) for part in ("mlp.experts", "mlp.gate"))


def test_equal_adapters_give_equal_files(tmp_path):
    folder = qwen2_moe(tmp_path / "m")
    for out in ("a", "b"):
        exported(trained(folder, lora=Lora(rank=4)), tmp_path / out)
    for file in sorted((tmp_path / "a").rglob("*")):
        if file.is_file():
            other = tmp_path / "b" / file.relative_to(tmp_path / "a")
            assert file.read_bytes() == other.read_bytes(), file.name


def test_settings_that_saving_would_refuse_are_carried_over(tmp_path):
    folder = tiny_model(tmp_path / "m")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": False, "temperature": 0.7, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    exported(trained(folder, steps=0), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings


def test_an_adapter_that_was_never_trained_is_said(base, tmp_path):
    learner = trained(base, lora=Lora(rank=4), steps=0)
    _, adapter = exported(learner, tmp_path / "out")
    assert "14 adapters never changed" in adapter.words


def test_a_start_folder_that_changed_under_adapters_is_found(tmp_path):
    folder = tiny_model(tmp_path / "m", tied=False)
    learner = trained(folder, lora=Lora(rank=4))
    shutil.rmtree(folder)
    tiny_model(folder, tied=False, seed=1)
    with pytest.raises(ModelError, match="its adapter: tensor"):
        exported(learner, tmp_path / "out")


def test_trained_adapters_on_experts_sample_what_they_score(tmp_path):
    learner = trained(
        qwen2_moe(tmp_path / "m"),
        lora=Lora(rank=4),
    )
    prompt = np.array([9, 12, 15, 20], np.int32)
    request = Request(prompt=prompt, sampling=Sampling(), max_new_tokens=8)
    for completion in learner.policy.generate([request] * 4):
        row = trajectory(prompt, completion.tokens)
        (scored,) = learner.policy.logprobs([row])
        np.testing.assert_allclose(scored[len(prompt) :], completion.logprobs, atol=2e-5)


def test_a_template_with_a_clock_is_no_difference(tmp_path):
    folder = tiny_model(tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%f') }}" + template)
    exported(trained(folder, steps=0), tmp_path / "out")


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_classifier_has_no_output_head_to_compare(tmp_path, lora):
    folder = tiny_model(tmp_path / "m", tied=False)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    judge.save_pretrained(folder)
    engine = LocalEngine(device=torch.device("cpu"))
    head = ScalarStart(trunk="shared", model=str(folder))
    learner = engine.learner(str(folder), name="t", optimizer=Optimizer(), lora=lora, scalar=head)
    *_, scalar = exported(learner, tmp_path / "out")
    assert "scalar head reads back bit for bit" in scalar.words


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_multimodal_model_is_exported_whole(tmp_path, lora):
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    text = {
        "vocab_size": size + 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "sliding_window": 64,
        "initializer_range": 0.3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=size + 1,
        boi_token_index=size + 2,
        eoi_token_index=size + 3,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder, out = tmp_path / "m", tmp_path / "out"
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"processor_config.json": "{}", "preprocessor_config.json": '{"size": 8}'}
    for name, content in processor.items():
        (folder / name).write_text(content)
    proofs = exported(trained(folder, lora=lora), out)
    assert {n: (out / n).read_text() for n in processor} == processor
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    for name in before:
        if "vision" in name:
            assert torch.equal(before[name], after[name])
    if lora:
        assert "never changed: model.vision_tower" in proofs[1].words


@pytest.mark.parametrize("targets", ["((", "nothing", ("mlp",), ("norm",)])
def test_targets_that_cannot_be_adapted_are_refused_in_words(base, targets):
    with pytest.raises(ConfigError, match=r"^lora on "):
        trained(base, lora=Lora(rank=4, target_modules=targets))
