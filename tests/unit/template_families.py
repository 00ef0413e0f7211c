"""Chat templates in the styles of the field, each with a tokenizer that has its control tokens."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.chat.renderer import ChatRenderer

TEMPLATES = Path(__file__).parent / "chat" / "templates"
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
R1 = ("<|begin_of_sentence|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>")
FAMILIES = {  # control tokens: the first may be a start token, the last ends a turn
    "chatml": CHATML,
    "chatml_generation": CHATML,
    "default_system": CHATML,
    "llama3": LLAMA,
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "mistral": ("<s>", "[INST]", "[/INST]", "</s>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "thinking": CHATML,
    "thinking_opened": CHATML,
    "reasoning_cut": R1,
}
STARTS = {"llama3", "gemma", "mistral", "reasoning_cut"}
WORDS = ("<think>", "</think>", "<tool_response>", "</tool_response>")
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""As in many tokenizers: line breaks join what stands before them, and each other."""


@cache
def tokenizer(family):
    """One token per byte, but runs of line breaks and some pairs are single tokens."""
    controls = FAMILIES[family]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), (".", "Ċ"), ("Ġ", "Ġ"), ("t", "h"), ("th", "e"), ("Ġ", "<")]
    vocab = {c: i for i, c in enumerate([*letters, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(controls))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=controls[-1],
        bos_token=controls[0] if family in STARTS else None,
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    fast.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return fast


@cache
def renderer(family):
    """The renderer of a family."""
    return ChatRenderer(tokenizer(family))


def mask_of(family):
    """The assistant mask that the family's template supports."""
    return "template" if family == "chatml_generation" else "prefix"
