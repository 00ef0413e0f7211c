"""The lab's tokenizer: one token per boilerplate clause, one token per character of the payload.

The settings' questions are long templates around a few characters that matter. One token per fixed
clause keeps every document under twenty tokens, so that a laptop CPU can pre-train and post-train
in minutes; one token per character of the payload keeps arithmetic and spelling real tasks. Other
text falls back to characters and then to bytes, so every text survives a round trip.
"""

from __future__ import annotations

from string import ascii_letters, digits, punctuation

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, USER, ASSISTANT, END)

CLAUSES = (
    "State the final answer to the following arithmetic problem: ",
    "Calculate ",
    "Solve the following multiplication: ",
    ". Give only the result as your final answer.",
    "Spell this word backward (example: sun -> nus): ",
    " + ",
    " - ",
    " * ",
    " =",
)
CHARACTERS = tuple(digits + ascii_letters + punctuation + " \n\t")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def _vocabulary() -> dict[str, int]:
    byte_tokens = tuple(f"<0x{value:02X}>" for value in range(256))
    tokens = SPECIAL_TOKENS + CLAUSES + CHARACTERS + byte_tokens
    return {token: index for index, token in enumerate(tokens)}


def _escape(text: str) -> str:
    return "".join(f"\\{char}" if char in punctuation else char for char in text)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Assemble the tokenizer; nothing is learnt, so it is the same on every machine."""
    core = Tokenizer(BPE(_vocabulary(), [], byte_fallback=True, ignore_merges=True))
    longest_first = sorted(CLAUSES, key=len, reverse=True)
    pattern = "|".join([*map(_escape, longest_first), r"[\s\S]"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
