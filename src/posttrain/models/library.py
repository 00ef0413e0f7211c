"""What transformers makes of a model folder: its settings and its tokenizer, no weights.

A model folder is untrusted content, and the libraries raise whatever comes to pass inside them.
:func:`reading` turns all of it into a ModelError that names the folder.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from posttrain.core import guard
from posttrain.core.errors import ModelError
from posttrain.models.files import GENERATION, TOKENIZER
from posttrain.models.folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROBE = "The 3 quick-brown foxes don't cost $1,234.50!\n\tdef f(x):  return x**2  # naïve 数学 🙂"
"""A text on which different tokenizers give different tokens, and broken ones fail."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model, from the headers and the settings of its folder."""

    num_weights: int
    context: int
    vocab_size: int
    hidden_size: int


def reading(what: object) -> AbstractContextManager[None]:
    """Turn any error of a library that reads a model folder into a ModelError.

    Raises:
        ModelError: the block raised; the message has the library's words.
    """
    return guard.reading(
        f"{what} could not be loaded",
        kind="a causal language model that transformers can load",
        error=ModelError,
        fix="try AutoModelForCausalLM.from_pretrained on it; for code from the model's own "
        "repository set remote_code to the model's name",
    )


def read_shape(folder: ModelFolder, *, remote_code: bool = False) -> ModelShape:
    """Sizes of a model, no weight read.

    Raises:
        ModelError: a configuration that transformers cannot use.
    """
    from transformers import AutoConfig

    with reading(folder.path):
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=remote_code)
        settings = config.get_text_config()
        sizes = [
            settings.max_position_embeddings,
            settings.vocab_size,
            settings.hidden_size,
        ]
    for size in sizes:
        if type(size) is not int or not 0 < size < 2**31:
            raise ModelError(
                f"{folder.path}/config.json: {size!r:.60} where a size is expected",
                expected="a positive integer",
            )
    return ModelShape(folder.num_weights, *sizes)


def read_tokenizer(folder: ModelFolder, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ModelError: transformers cannot read it; a token without a row in the embeddings; several
            templates and no default.
    """
    from transformers import AutoTokenizer

    with reading(f"the tokenizer of {folder.path}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=remote_code)
        by_id = {i: text for text, i in tokenizer.get_vocab().items()}
        special = frozenset(tokenizer.all_special_ids) | folder.tokens.special
        tokenizer.decode(tokenizer(PROBE)["input_ids"])
        lacks_merges = not (folder.path / TOKENIZER).exists() and _lacks_merges(tokenizer)
    if lacks_merges:
        raise ModelError(
            f"the tokenizer of {folder.path} has a vocabulary and no merges: every character "
            "would be a token",
            expected="tokenizer.json, or vocab.json and merges.txt",
            fix="copy the tokenizer files again",
        )
    if folder.rows is not None:
        tokens = replace(folder.tokens, by_id=by_id, special=special)
        tokens.check(folder.rows, folder=folder.path)
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ModelError(
            f"{folder.path} has the chat templates {', '.join(sorted(named))}, and none is the "
            "default",
            expected="one template, or one named default",
            fix="tokenizer.chat_template = tokenizer.chat_template[name], then save_pretrained",
        )
    return tokenizer  # type: ignore[no-any-return]


def _lacks_merges(tokenizer: Any) -> bool:
    """True for a byte-pair vocabulary without its merges."""
    if not tokenizer.is_fast:
        return False
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["type"] == "BPE" and not model["merges"] and not model.get("ignore_merges")


def read_ends(folder: ModelFolder, *, remote_code: bool = False) -> tuple[int, ...]:
    """Tokens that end a turn, as generation will use them.

    Raises:
        ModelError: a configuration that transformers cannot use.
    """
    from transformers import AutoConfig, GenerationConfig

    with reading(folder.path):
        if (folder.path / GENERATION).is_file():
            ends = GenerationConfig.from_pretrained(folder.path).eos_token_id
        else:
            ends = AutoConfig.from_pretrained(
                folder.path, trust_remote_code=remote_code
            ).eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
