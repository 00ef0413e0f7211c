"""Every family of causal models that transformers knows: exact with posttrain, or refused by name.

    python benchmarks/families.py [--only NAME ...] [--out docs/families.md]

Each family is built tiny and random from its configuration alone and loaded as a user would. One
that loads is then compared once more, independently of the proof at load and on longer rows: packed
and sampled log-probs against one sequence at a time through the library's own forward, with mixed
lengths, windows of 8 tokens, and the last positions of the context. No network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from posttrain.core.errors import ModelError
from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
from posttrain.core.trajectory import Trajectory
from posttrain.engines.local.loading import load_model
from posttrain.engines.local.policy import LocalPolicy, frozen
from posttrain.protocols import Request
from posttrain.testing.tiny import tiny_tokenizer

WRONG = 2e-3
"""Difference [nats] from which a family that loaded counts as wrong."""

LARGEST = 20_000_000
"""Weights of a tiny model. Larger: a size of the family was not found."""

SECONDS = 900
"""For one family."""

VOCABULARY = 64
WINDOW = 8
CONTEXT = 160

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "text_embed_dim", "hidden_size_global"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
        48,
    ),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "block_ff_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "d_state"), 8),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"), 1),
    "linear_num_key_heads": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "global_head_dim": 8,
    "is_decoder": True,
}
"""Sizes of a tiny model, by the names that configurations use."""

_LATENT = {"num_key_value_heads": 4}  # latent attention has a key head per query head
_DOTS3 = {
    **_LATENT,
    "head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    **{"index_topk": WINDOW, "index_head_dim": 16, "index_n_heads": 4},
    "shared_experts_intermediate_size": 24,
    # Its layers with windows have sizes of their own.
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16),
    **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
}
_INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": WINDOW, "indexer_compress_ratio": 2, "hc_lowrank": 8},
}
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT
    ),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "dots1": {"layer_types": ["full_attention"] * 4, "n_shared_experts": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2},
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "mlp_layer_types": ["dense"] * 4,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [16, CONTEXT // 16],
        "axial_pos_embds_dim": [8, 24],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "local_attn_chunk_length": WINDOW,
        "lsh_attn_chunk_length": WINDOW,
        "hash_seed": 0,  # else no two forward passes agree
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
}
"""What some families need besides. A part's sizes go under the name of the part."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one family."""

    family: str
    verdict: str  # exact, refused, wrong or not built
    words: str


# --- tiny models ----------------------------------------------------------------------------


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's configuration with every known size made small."""
    return CONFIG_MAPPING[family](**_sizes(CONFIG_MAPPING[family], SPECIAL.get(family, {})))


def _sizes(kind: type[PreTrainedConfig], special: Mapping[str, Any]) -> dict[str, Any]:
    parts = {n: v for n, v in special.items() if n in kind.sub_configs}
    try:
        plain = kind()
    except StrictDataclassClassValidationError:  # its own default is invalid
        plain = kind(**parts)
    known = set(plain.to_dict()) | set(kind.attribute_map)
    sizes = {**{n: v for n, v in SIZES.items() if n in known}, **special}
    for name in kind.sub_configs:
        part = vars(plain).get(name)
        if isinstance(part, PreTrainedConfig):
            sizes[name] = {
                "model_type": part.model_type,
                **_sizes(type(part), special.get(name, {})),
            }
    return sizes


def write_tiny(family: str, folder: Path) -> None:
    """Save a random model of the family, and the tiny tokenizer. Weights are drawn wide enough for
    its distributions to be far from uniform.

    Raises:
        Exception: whatever the family raises that cannot be built or run from these sizes.
    """
    config = tiny_config(family)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    num = sum(p.numel() for p in shape.parameters())
    if num > LARGEST:
        raise ValueError(f"{num:,} weights from the sizes that are known")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                wide = 2.0 if any(k in name for k in ("q_", "k_", "qkv", "query", "key")) else 1.2
                weight.copy_(
                    torch.randn(weight.shape, generator=draw) * wide / weight.shape[-1] ** 0.5
                )
            elif "bias" in name or "sink" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.3)
        model.set_attn_implementation("eager")
        model(input_ids=torch.arange(6, 30)[None], use_cache=False)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


# --- one family ------------------------------------------------------------------------------


def outcome(family: str, folder: Path) -> Outcome:
    """Build, load and compare one family."""
    try:
        write_tiny(family, folder)
    # Whatever the library raises for sizes it does not like is the row of the table.
    except Exception as error:  # noqa: BLE001
        return Outcome(family, "not built", _own_fault(family) + _first_line(error))
    try:
        policy = frozen(load_model(str(folder)))
        packed, sampled = gaps(policy, folder)
    except ModelError as error:
        return Outcome(family, "refused", _reason(error, folder))
    # Anything but a ModelError is a fault of posttrain: the table shows it as one.
    except Exception as error:  # noqa: BLE001
        return Outcome(family, "wrong", _first_line(error))
    verdict = "exact" if packed < WRONG and sampled < WRONG else "wrong"
    return Outcome(family, verdict, f"packed {packed:.0e}, sampled {sampled:.0e}")


def _own_fault(family: str) -> str:
    """Words that say so, where the library cannot build its own default configuration either."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]())
    # Whatever it raises: the model that the library itself proposes cannot be built.
    except Exception:  # noqa: BLE001
        return "the library's own default configuration fails too: "
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]


def _reason(error: ModelError, folder: Path) -> str:
    return error.found.replace(str(folder), "").strip(": ")[:150]


def gaps(policy: LocalPolicy, folder: Path) -> tuple[float, float]:
    """Largest difference of packed, and of sampled log-probs from the stock model's."""
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def own(tokens: Sequence[int], temperature: float) -> np.ndarray:
        with torch.inference_mode():
            logits = stock(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        logp = (logits.float() / temperature).log_softmax(-1)
        return np.array([float(logp[i, t]) for i, t in enumerate(tokens[1:])])

    rng = np.random.default_rng(0)
    room = policy.context

    def drawn(num: int) -> list[int]:
        return rng.integers(6, len(tiny_tokenizer()), num).tolist()

    long, short = drawn(min(30, room // 3)), drawn(5)
    pairs = [(long, drawn(25)), (long, drawn(3)), (short, drawn(40)), (short, [7])]
    pairs = [(p, a[: room - len(p)]) for p, a in [*pairs, (drawn(room // 2), drawn(room // 2))]]
    rows = [_row(p, a) for p, a in pairs]
    packed = max(
        float(np.abs(values[len(p) :] - own([*p, *a], 1.0)[len(p) - 1 :]).max())
        for (p, a), values in zip(pairs, policy.logprobs(rows), strict=True)
    )
    asked = [(long, s) for s in range(3)] + [(short, 9), (pairs[-1][0], 5)]
    done = policy.generate(
        [
            Request(
                prompt=np.array(p, np.int32),
                sampling=Sampling(temperature=0.7, seed=seed),
                max_new_tokens=room,
            )
            for p, seed in asked
        ]
    )
    sampled = max(
        float(np.abs(own([*p, *c.tokens.tolist()], 0.7)[len(p) - 1 :] - c.logprobs).max())
        for (p, _), c in zip(asked, done, strict=True)
    )
    return packed, sampled


def _row(prompt: Sequence[int], answer: Sequence[int]) -> Trajectory:
    asker = Producer(kind=Kind.ENVIRONMENT, name="families")
    author = Producer(kind=Kind.EXTERNAL, name="families")
    return Trajectory(
        task="families/0",
        tokens=np.array([*prompt, *answer], np.int32),
        prompt_length=len(prompt),
        spans=(
            Span(length=len(prompt), role=Role.USER, producer=asker),
            Span(length=len(answer), role=Role.ASSISTANT, producer=author),
        ),
    )


# --- the table -----------------------------------------------------------------------------


def all_families() -> list[str]:
    """The names that AutoModelForCausalLM knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _alone(family: str, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        results.put(outcome(family, Path(folder) / family))


def outcomes(families: Sequence[str]) -> Iterator[Outcome]:
    """Each in a process of its own: a family may hang, or die."""
    context = multiprocessing.get_context("fork")
    for family in families:
        results = context.Queue()
        process = context.Process(target=_alone, args=(family, results))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
        died = Outcome(family, "not built", f"no answer within {SECONDS} s")
        yield died if results.empty() else results.get()


def page(rows: Sequence[Outcome]) -> str:
    """The table as a page of the documents."""
    count = {
        v: sum(r.verdict == v for r in rows) for v in ("exact", "refused", "wrong", "not built")
    }
    lines = [
        "# Families of models",
        "",
        f"Made by `python benchmarks/families.py` with transformers {transformers.__version__}. "
        "Each family that `AutoModelForCausalLM` knows is built tiny and random from its "
        "configuration, and loaded. *Exact*: packed rows and sampled tokens have the log-probs of "
        "the library's own forward pass, one sequence at a time: mixed lengths, shared prompts, "
        f"windows of {WINDOW} tokens, up to the last position. *Refused*: loading ends with an "
        "error that names the family and the reason, before anything is trained.",
        "",
        f"Of {len(rows)} families {count['exact']} are exact, {count['refused']} refused, "
        f"{count['wrong']} wrong, and {count['not built']} could not be built from a configuration "
        "alone.",
    ]
    titles = {
        "exact": ("Exact", "largest difference of a log-prob"),
        "refused": ("Refused", "why"),
        "wrong": ("Wrong", "what happened"),
        "not built": ("Not built", "why"),
    }
    for verdict, (title, column) in titles.items():
        chosen = [r for r in rows if r.verdict == verdict]
        if chosen:
            lines += ["", f"## {title}", "", f"| family | {column} |", "|---|---|"]
            lines += [f"| {r.family} | {r.words.replace('|', '/')} |" for r in chosen]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="these families, on the screen only")
    parser.add_argument("--out", type=Path, default=Path("docs/families.md"))
    args = parser.parse_args()
    rows = []
    for row in outcomes(args.only or all_families()):
        print(f"{row.family:28} {row.verdict:10} {row.words}", flush=True)
        rows.append(row)
    if not args.only:
        args.out.write_text(page(rows), encoding="utf-8")
    sys.exit(any(row.verdict == "wrong" for row in rows))


if __name__ == "__main__":
    main()
