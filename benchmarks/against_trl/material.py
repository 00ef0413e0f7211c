"""Models with random weights, tokenizers of one token per word, and data, made on the spot.

<folder>/model/     student; its tokenizer ends a text with a token that the model can say
<folder>/endless/   the same weights; the end token has an id beyond the head, so that nothing
                    ever ends early and both libraries generate equally many tokens
<folder>/teacher/   other weights, the tokenizer of ``endless``
<folder>/documents.jsonl  pairs.jsonl  prompts.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging as library_logging

from against_trl.plan import Dims, Load

library_logging.disable_progress_bar()

PAD, END, UNKNOWN, NEVER = "<pad>", "<end>", "<unknown>", "<never>"
CONTEXT = 4096
DOCUMENT = (32, 500)


def make(folder: Path, dims: Dims, load: Load, *, steps: int, seed: int = 0) -> Path:
    """Write models and data for one size and load; data for ``steps`` steps without repetition.

    Prompts are as many as one step takes: every step generates from all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student, endless = words(dims.vocab, ends=True), words(dims.vocab, ends=False)
    for name, tokenizer, start in (
        ("model", student, seed),
        ("endless", endless, seed),
        ("teacher", endless, seed + 1),
    ):
        if not (folder / name).is_dir():
            _model(dims, tokenizer, seed=start, folder=folder / name)
    rng = np.random.default_rng(seed)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, dims.vocab, length))

    def between(mean: int, share: float) -> int:
        return int(rng.integers(round(mean * (1 - share)), round(mean * (1 + share)) + 1))

    low, high = np.log(DOCUMENT)
    lengths = np.exp(rng.uniform(low, high, load.groups * steps)).astype(int)
    _rows(folder / "documents.jsonl", ({"text": text(n)} for n in lengths.tolist()))
    _rows(
        folder / "pairs.jsonl",
        (
            {
                "prompt": text(between(load.prompt_tokens, 1 / 8)),
                "chosen": " " + text(between(load.completion_tokens, 1 / 4)),
                "rejected": " " + text(between(load.completion_tokens, 1 / 4)),
            }
            for _ in range(load.groups * steps)
        ),
    )
    # One more than a step takes: a task set keeps its last rows for measuring.
    _rows(
        folder / "prompts.jsonl",
        (
            {"prompt": text(between(load.prompt_tokens, 1 / 8)), "answer": ""}
            for _ in range(load.groups + 1)
        ),
    )
    return folder


def words(vocab: int, *, ends: bool) -> PreTrainedTokenizerFast:
    """One token per word ``w3``, ``w4``, …; ids are the numbers.

    Args:
        vocab: rows of the model's head.
        ends: False gives the end token the id ``vocab``, which no head of that size can produce.
    """
    table = {PAD: 0, END: 1, UNKNOWN: 2} | {f"w{i}": i for i in range(3, vocab)}
    if not ends:
        table[NEVER] = vocab
    core = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END if ends else NEVER,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def _model(dims: Dims, tokenizer: PreTrainedTokenizerFast, *, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=dims.vocab,
        hidden_size=dims.hidden,
        intermediate_size=dims.inner,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        head_dim=dims.head_size,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id if tokenizer.eos_token_id < dims.vocab else None,
        bos_token_id=None,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
