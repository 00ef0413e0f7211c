"""Model folders with a fault: changes of weights, configs, tokenizers and templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
Tensors = dict[str, np.ndarray]


def change_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rewrite the weights' file."""
    tensors = change(load_file(folder / WEIGHTS))
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def change_config(folder: Path, **entries: Any) -> None:
    """Set entries of config.json."""
    change_json(folder / "config.json", lambda config: config.update(entries))


def template(folder: Path) -> str:
    """The chat template."""
    return (folder / "chat_template.jinja").read_text(encoding="utf-8")


def change_template(folder: Path, *swaps: tuple[str, str]) -> None:
    """Replace parts of the chat template, each of which must be there."""
    text = template(folder)
    for before, after in swaps:
        if before not in text:
            raise ValueError(f"the template has no {before!r}")
        text = text.replace(before, after)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def add_token(folder: Path, text: str, *, special: bool = False, resize: bool = True) -> None:
    """Add a token to the tokenizer, and rows for it to the weights if ``resize``."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, special=special)], special_tokens=special)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if resize and len(tokenizer) > config["vocab_size"]:
        add_rows(folder, len(tokenizer) - config["vocab_size"])


def add_rows(folder: Path, number: int, *, scale: float = 0.02, seed: int = 0) -> None:
    """Add rows to the (tied) embeddings."""
    rng = np.random.default_rng(seed)

    def grown(tensors: Tensors) -> Tensors:
        name = "model.embed_tokens.weight"
        old = tensors[name]
        new = rng.normal(0, scale, (number, old.shape[1])).astype(old.dtype)
        return {**tensors, name: np.concatenate([old, new])}

    change_weights(folder, grown)
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    change_config(folder, vocab_size=size + number)


def teacher_of(model: Path, folder: Path, *, seed: int = 1) -> None:
    """A teacher of the same family: the same weights with a little noise."""
    shutil.copytree(model, folder)
    rng = np.random.default_rng(seed)

    def shaken(tensors: Tensors) -> Tensors:
        return {
            name: (value + rng.normal(0, 0.02, value.shape)).astype(value.dtype)
            for name, value in tensors.items()
        }

    change_weights(folder, shaken)


def mixture_of_experts(folder: Path, **entries: Any) -> None:
    """Replace the model by a small mixture of experts with the same tokenizer, random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.05,
        **entries,
    )
    torch.manual_seed(0)
    (folder / WEIGHTS).unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
