"""What transformers makes of a model folder: its settings and its tokenizer, no weights.

A model folder is untrusted content, and libraries raise whatever comes to pass inside of them:
:func:`library` turns all of it into a ModelError that names the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from posttrain.core.errors import ModelError
from posttrain.core.guard import reading
from posttrain.models.code import check_code
from posttrain.models.files import GENERATION
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


@contextmanager
def library(what: object) -> Iterator[None]:
    """Turn any error of a library that reads a model folder into a ModelError that names it.

    Its logger is silent meanwhile: what it warns of is compared, and proved or refused.

    Example:
        >>> with library("m/config.json"):
        ...     {}["hidden_size"]
        Traceback (most recent call last):
        ...
        posttrain.core.errors.ModelError: m/config.json: KeyError: 'hidden_size'
          expected: a causal language model that transformers can load
          to mend:  check config.json; for code of its own set remote_code to the model's name
    """
    from transformers.utils import logging as library_logging

    before = library_logging.get_verbosity()
    library_logging.set_verbosity(logging.ERROR)
    try:
        with reading(
            str(what),
            kind="a causal language model that transformers can load",
            error=ModelError,
            fix="check config.json; for code of its own set remote_code to the model's name",
        ):
            yield
    finally:
        library_logging.set_verbosity(before)


def read_shape(folder: ModelFolder, *, remote_code: bool = False) -> ModelShape:
    """Sizes of a model, no weight read.

    Raises:
        ModelError: a configuration that transformers cannot use; code from elsewhere.
    """
    from transformers import AutoConfig

    if remote_code:
        check_code(folder.path)
    with library(folder.path):
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

    if remote_code:
        check_code(folder.path)
    with library(f"the tokenizer of {folder.path}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=remote_code)
        by_id = {i: text for text, i in tokenizer.get_vocab().items()}
        special = frozenset(tokenizer.all_special_ids) | folder.tokens.special
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        tokenizer.decode(ids)
    if not ids:
        raise ModelError(
            f"the tokenizer of {folder.path} gives a text no tokens: its vocabulary is not there",
            expected="tokenizer.json, or the vocabulary files of its class",
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


def read_ends(folder: ModelFolder, *, remote_code: bool = False) -> tuple[int, ...]:
    """Tokens that end a turn, as generation will use them.

    Raises:
        ModelError: a configuration that transformers cannot use.
    """
    from transformers import AutoConfig, GenerationConfig

    if remote_code:
        check_code(folder.path)
    with library(folder.path):
        if (folder.path / GENERATION).is_file():
            ends = GenerationConfig.from_pretrained(folder.path).eos_token_id
        else:
            ends = AutoConfig.from_pretrained(
                folder.path, trust_remote_code=remote_code
            ).eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
