"""Tiny real models for tests: made in a second, and like real ones in all that is tested."""

from __future__ import annotations

from pathlib import Path

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=?.,:\n"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_OF_FAMILIES: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": None},
}


def tiny_tokenizer():  # type: ignore[no-untyped-def]  # transformers is imported on use
    """A character tokenizer with a chat template that marks what the assistant generates."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unk|>"]
    vocab = {token: i for i, token in enumerate([*special, *ALPHABET])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    family: str = "qwen3",
    tied: bool = True,
    context: int = 128,
    padding: int = 3,
    **settings: object,
) -> Path:
    """Save a random two-layer model (about 30 k weights) and its tokenizer; returns the folder.

    Weights are drawn wide enough for its distributions to be far from uniform. ``settings`` go
    into the configuration of the family.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer) + padding,  # rows behind the tokens, as real models have
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_OF_FAMILIES.get(family, {}),
    }
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
