"""What is loaded computes packed and sampled as the model does by itself, or is refused by name."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Subject
from posttrain.engines.local import attention, proving
from posttrain.engines.local.attention import PackedPlan
from posttrain.engines.local.decoding import DecodePlan
from posttrain.engines.local.loading import load_model
from posttrain.engines.local.proving import prove
from posttrain.numerics.batch import Segment
from posttrain.testing import tiny_model
from posttrain.testing.tiny import tiny_tokenizer

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=DTYPES)
def windowed(request, tmp_path_factory):
    """A model with a sliding window of 6 in its layers."""
    folder = tiny_model(tmp_path_factory.mktemp("m") / "m", family="mistral", seed=1)
    return load_model(str(folder), dtype=request.param)


def leaking_prompt(patch):
    """Everybody reads everything before."""
    apart = PackedPlan.of

    def of(segments, *, device):
        whole = Segment(0, sum(s.length for s in segments), None)
        return apart((whole,), device=device)

    patch.setattr(PackedPlan, "of", of)


def sibling_read(patch):
    """An answer reads the answer before it."""
    apart = PackedPlan.of

    def of(segments, *, device):
        parents = [None if s.parent is None else s.parent + (i > 1) for i, s in enumerate(segments)]
        changed = [replace(s, parent=p) for s, p in zip(segments, parents, strict=True)]
        return apart(changed, device=device)

    patch.setattr(PackedPlan, "of", of)


def late_position(patch):
    """A sampled token stands one place too far."""
    right = DecodePlan.positions_S.fget
    patch.setattr(DecodePlan, "positions_S", property(lambda plan: right(plan) + 1))


def padding_read(patch):
    """Shorter prompts read the padding behind them."""
    patch.setattr(DecodePlan, "_hidden", lambda plan, hidden: torch.zeros(hidden.shape))


def window_dropped(patch):
    """Layers limit their attention in the mask only."""
    plain = attention.attend

    def attend(*args, sliding_window=None, **kwargs):
        return plain(*args, **kwargs)

    patch.setitem(attention.AttentionInterface._global_mapping, attention.IMPLEMENTATION, attend)


def window_off_by_one(patch):
    right = PackedPlan.attend

    def attend(plan, *args, window, **kwargs):
        return right(plan, *args, window=None if window is None else window + 1, **kwargs)

    patch.setattr(PackedPlan, "attend", attend)


FAULTS = [
    (leaking_prompt, "packed log-probs differ"),
    (sibling_read, "packed log-probs differ"),
    (late_position, "sampled log-probs differ"),
    (padding_read, "log-probs differ|cannot run packed"),
    (window_dropped, "do not pass on the window"),
    (window_off_by_one, "packed log-probs differ"),
]


@pytest.mark.parametrize(("plant", "words"), FAULTS, ids=[p.__name__ for p, _ in FAULTS])
def test_a_planted_fault_is_refused_by_name_in_every_number_type(
    windowed, monkeypatch, plant, words
):
    prove(windowed)
    plant(monkeypatch)
    with pytest.raises(ModelError, match=words) as refused:
        prove(windowed)
    assert "(mistral)" in str(refused.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_mixes_tokens_is_refused(tiny_folder, dtype):
    """A short convolution: each token takes a thousandth of the one before it."""
    model = load_model(str(tiny_folder), dtype=dtype)

    def mix(_module, _args, out):
        before = torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]
        return out + 1e-3 * before

    hook = model.causal.base_model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(ModelError, match="log-probs differ"):
        prove(model)
    hook.remove()
    prove(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "mistral"])
def test_what_is_exact_is_not_refused(family, dtype, tmp_path):
    for seed in range(6):
        folder = tiny_model(tmp_path / str(seed), family=family, seed=seed)
        proofs = load_model(str(folder), dtype=dtype).proofs
        sampler = [p for p in proofs if p.subject is Subject.SAMPLER]
        assert [p.words.split(":")[0] for p in sampler] == ["float32", "bfloat16"][: len(sampler)]
        assert len(sampler) == 1 + (dtype == "bfloat16")
        wide = sampler[0].figures
        # Far from both: exact models are well within the tolerance, planted faults well beyond.
        assert max(wide["packed"], wide["sampled"]) <= 6 * wide["floor"]


def test_a_deep_bfloat16_model_is_not_refused(tmp_path):
    """Thirty layers round thirty times: more than one fixed tolerance foresees."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wide, narrow = load_model(str(tmp_path), dtype="bfloat16").proofs[-2:]
    assert max(narrow.figures["packed"], narrow.figures["sampled"]) > 0.05
    assert max(wide.figures["packed"], wide.figures["sampled"]) < 1e-3


def test_proving_leaves_the_model_as_it_was(tiny_folder):
    model = load_model(str(tiny_folder), dtype="bfloat16")
    before = {n: (p.data_ptr(), p.dtype, p.clone()) for n, p in model.causal.named_parameters()}
    config = model.causal.config.to_dict()
    prove(model)
    for name, weight in model.causal.named_parameters():
        place, dtype, values = before[name]
        assert (weight.data_ptr(), weight.dtype) == (place, dtype)
        assert torch.equal(weight, values)
    assert model.causal.config.to_dict() == config
    assert not any(m._forward_hooks for m in model.causal.modules())


# --- positions beyond the original context ---------------------------------------------------


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 40,
    "long_factor": [8.0, 4.0, 2.0, 1.0],
    "short_factor": [1.0] * 4,
    "factor": 4.0,
}


def rotary(folder, rope):
    """A model whose rotary embeddings are these, of 160 positions."""
    tiny_model(folder)
    config = AutoConfig.from_pretrained(
        folder, rope_parameters=rope, max_position_embeddings=160, head_dim=8
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_set_of_frequencies_per_batch_ends_the_context(tmp_path, monkeypatch):
    model = load_model(str(rotary(tmp_path / "m", LONG)))
    assert model.context == 40
    # With the whole context, a long row changes how the short rows beside it are computed.
    monkeypatch.setattr(type(model), "context", 160)
    with pytest.raises(ModelError, match="log-probs differ"):
        prove(model)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_other_frequencies_hold_to_the_end_of_the_context(tmp_path, rope):
    model = load_model(str(rotary(tmp_path / "m", {"rope_theta": 10_000.0, **rope})))
    assert model.context == 160


def test_the_proofs_say_what_was_compared(tiny_folder):
    (proof,) = prove(load_model(str(tiny_folder)))
    assert proof.words.startswith("float32: packed rows ")
    assert "sampled rows" in proof.words
    assert proving.ALLOWED[torch.float32] * proof.figures["floor"] >= proof.figures["packed"]
