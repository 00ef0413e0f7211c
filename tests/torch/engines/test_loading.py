"""What was loaded is what the folder holds: nothing made up, dropped, changed or not finite."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Subject
from posttrain.engines.local import loading
from posttrain.engines.local.loading import load_model
from posttrain.models.files import counted
from posttrain.models.folder import read_folder
from posttrain.models.readers import read_ends, read_shape, read_tokenizer
from posttrain.testing import tiny_model
from posttrain.testing.tiny import tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    return tiny_model(tmp_path / "m")


def rewritten(folder, change):
    """The folder after ``change(weights)``, which may return others."""
    path = folder / "model.safetensors"
    held = load_file(path)
    found = change(held)
    save_file(found if isinstance(found, dict) else held, path, metadata={"format": "pt"})
    return str(folder)


def filled(start, end, value):
    return lambda w: w[UP].view(-1)[start:end].fill_(value)


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def words(model):
    (proof,) = (p for p in model.proofs if p.subject is Subject.LOAD)
    return proof.words


def test_the_proof_counts_tensors(folder):
    held = len(load_file(folder / "model.safetensors"))
    text = words(load_model(str(folder)))
    assert text.startswith(f"{held} tensors, none missing, none unexpected, all finite")
    assert f"{held} equal to the files; head tied" in text


def test_shards_are_compared_too(folder):
    causal = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    causal.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert f"{len(causal.state_dict()) - 1} equal to the files" in words(load_model(str(folder)))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(UP), "are missing: model.layers.1.mlp.up_proj.weight"),
        (lambda w: {n: t for n, t in w.items() if ".1.mlp" not in n}, "3 tensors .* are missing"),
        (
            lambda w: {**w, "model.more": w[UP].clone()},
            "belong to no part of the model: model.more",
        ),
        (lambda w: {**w, UP: w[UP][:3].clone()}, rf"{UP} has the shape \[3, 32\]"),
        (filled(5, 7, float("nan")), f"{UP} has 2 values that"),
        (filled(5, 6, float("inf")), f"{UP} has 1 values that"),
    ],
)
def test_faults_of_weights_are_named(folder, change, message):
    with pytest.raises(ModelError, match=message):
        load_model(rewritten(folder, change))


def test_finite_weights_whose_sum_is_not(folder, monkeypatch):
    monkeypatch.setattr(loading, "prove", lambda model, **_: ())
    load_model(rewritten(folder, filled(0, 4, 3e38)))


def test_a_loader_that_changes_a_weight_is_seen(folder, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained

    def changed(*args, **options):
        causal, report = load(*args, **options)
        with torch.no_grad():
            causal.get_parameter(UP)[0, 0] += 1e-6
        return causal, report

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", changed)
    with pytest.raises(ModelError, match=f"{UP} was loaded with other values than model.safet"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "sizes",
    [
        {"intermediate_size": 10**8},
        {"num_attention_heads": 10**6, "num_key_value_heads": 10**6},
        {"head_dim": 10**7},
    ],
)
def test_a_config_that_asks_for_far_more_is_stopped(folder, sizes):
    start = time.perf_counter()
    with pytest.raises(ModelError, match="asks for far more than the"):
        load_model(configured(folder, **sizes))
    assert time.perf_counter() - start < 10


# --- the head --------------------------------------------------------------------------------


def test_a_head_that_the_config_calls_tied(tmp_path):
    """The file's head is used, and the config is made to say so: an export keeps it."""
    folder = tiny_model(tmp_path / "m", tied=False)
    model = load_model(configured(folder, tie_word_embeddings=True))
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.causal.get_output_embeddings().weight, head)
    assert not model.causal.config.tie_word_embeddings
    assert "the file's own head, though the config says tied" in words(model)
    model.causal.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.get_output_embeddings().weight, head)


def test_a_head_that_is_not_there(folder):
    with pytest.raises(ModelError, match="would make up a random one"):
        load_model(configured(folder, tie_word_embeddings=False))


def test_a_classifier_has_no_head_and_loads(tmp_path):
    folder = tiny_model(tmp_path / "m")
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    other.save_pretrained(folder)
    assert not load_model(str(folder)).speaks


def test_a_bare_decoder_loads_without_its_head(tmp_path):
    folder = tiny_model(tmp_path / "m", tied=False)
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    assert not load_model(str(folder)).speaks


def test_a_causal_model_without_a_head_is_no_classifier(tmp_path):
    folder = tiny_model(tmp_path / "m", tied=False)
    rewritten(folder, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(ModelError, match="hold no output head"):
        load_model(str(folder))


# --- no false alarms -------------------------------------------------------------------------

MOE = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"num_local_experts": 4, "n_routed_experts": 4},
}
MLA = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "num_key_value_heads": 4},
}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}
LINEAR = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "head_dim": 8},
}
FAMILIES = {
    **{name: {} for name in ("llama", "mistral", "qwen2", "phi3", "phi", "gpt_neox", "stablelm")},
    **{name: {} for name in ("starcoder2", "olmo", "olmo2", "olmo3", "nemotron", "smollm3")},
    **{name: {} for name in ("cohere", "cohere2", "granite", "arcee", "apertus", "ernie4_5")},
    **{name: {"head_dim": 8} for name in ("qwen3", "gemma", "gemma2", "gemma3_text", "glm4")},
    **{name: {"head_dim": 8} for name in ("helium", "seed_oss", "ministral3")},
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt"), GPT),
    **dict.fromkeys(("mixtral", "qwen2_moe", "olmoe", "granitemoe", "flex_olmo"), MOE),
    **{name: MOE | {"head_dim": 8} for name in ("qwen3_moe", "glm4_moe", "gpt_oss", "minimax")},
    "deepseek_v3": MOE | MLA | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen3_next": MOE | LINEAR,
    "qwen3_5_text": LINEAR,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "lfm2": {"block_ff_dim": 48},
}
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


def of_family(folder, family, *, dtype=torch.float32, **options):
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    own = {"vocab_size": len(tokenizer) + 3, "eos_token_id": end, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**SIZES, **own, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_every_family_is_whole(tmp_path, family, monkeypatch):
    """Loaded in both number types, from one file and from shards; every weight accounted for."""
    monkeypatch.setattr(loading, "prove", lambda model, **_: ())
    one = of_family(tmp_path / "one", family)
    shards = of_family(tmp_path / "more", family, dtype=torch.bfloat16, max_shard_size="40KB")
    for folder, dtype in ((one, "float32"), (one, "bfloat16"), (shards, "float32")):
        found = read_folder(folder)
        read_tokenizer(found)
        assert read_ends(found) == (1,)
        text = words(load_model(str(folder), dtype=dtype))
        counts = map(int, re.findall(r"(\d+) (?:equal|as joined)", text))
        assert sum(counts) == len(found.tensors), text


def test_the_sizes_of_a_plan(folder):
    shape = read_shape(read_folder(folder))
    assert (shape.context, shape.hidden_size) == (128, 32)
    assert shape.vocab_size == len(tiny_tokenizer()) + 3


def test_buffers_that_old_files_hold(folder):
    """Rotary frequencies were saved once; a model computes them."""
    freqs = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    load_model(rewritten(folder, lambda w: {**w, **freqs}))


def test_layers_ahead_are_left_out(folder):
    extra = {UP.replace(".1.", ".2."): torch.ones(3)}
    rewritten(folder, lambda w: {**w, **extra})
    with pytest.raises(ModelError, match="have a layer 2"):
        load_model(str(folder))
    load_model(configured(folder, num_nextn_predict_layers=1))


# --- tokenizers ------------------------------------------------------------------------------


def test_every_vocabulary_file_of_the_library_counts(folder):
    """A changed vocabulary is another model, whatever the tokenizer's class calls its file."""
    named = re.compile(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", re.DOTALL)
    top = Path(transformers.__file__).parent / "models"
    blocks = [named.search(p.read_text()) for p in top.glob("*/tokenization*.py")]
    files = {f for block in blocks if block for f in re.findall(r':\s*"([^"]+)"', block[1])}
    assert len(files) > 15
    for name in files:
        (folder / name).touch()
    assert files <= set(counted(folder))


def test_a_folder_of_templates_without_a_default(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"chatml": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="templates chatml, tool_use, and none is the default"):
        load_model(str(folder))


@pytest.mark.parametrize("change", [{"model_max_length": "x"}, {"extra_special_tokens": 3}])
def test_a_tokenizer_that_cannot_tokenise(folder, change):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match="the tokenizer of"):
        load_model(str(folder))


def test_a_tokenizer_without_its_vocabulary(folder):
    """The library makes an empty one of some classes."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gives a text no tokens"):
        load_model(str(folder))


def test_an_engine_proves_weights_once_and_a_configuration_whole_once(
    folder, tmp_path, monkeypatch
):
    asked = []
    prove = loading.prove

    def counted(model, *, brief):
        asked.append(brief)
        return prove(model, brief=brief)

    monkeypatch.setattr(loading, "prove", counted)
    known = {}
    first, again = (load_model(str(folder), known=known) for _ in range(2))
    assert asked == [False]
    assert [p.words for p in again.proofs] == [p.words for p in first.proofs]
    load_model(str(tiny_model(tmp_path / "other", seed=1)), known=known)
    load_model(str(tiny_model(tmp_path / "longer", context=256)), known=known)
    assert asked == [False, True, False]
