"""The chat template of a tokenizer, compared with transformers once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from posttrain.chat.template import ChatTemplate, Refusal, compiled
from posttrain.chat.texts import TextRenderer
from posttrain.chat.tokenizer import Encoder, Tokenizer
from posttrain.core.errors import DataError, ModelError
from posttrain.core.provenance import Role
from posttrain.core.rendering import shortened
from posttrain.core.task import Message

_PROBES = (
    (Message(Role.USER, "a"),),
    (Message(Role.USER, "a"), Message(Role.ASSISTANT, "b")),
)
"""Conversations on which the template's text is compared with that of transformers."""


def load_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The default chat template, which gives the text that transformers gives.

    Raises:
        ModelError: there is no default, it cannot be run, or it gives another text.
    """
    template = compiled(_text_of(tokenizer), variables_of(tokenizer))
    for messages in _PROBES:
        generation = messages[-1].role is Role.USER
        try:
            ours, _ = template.render(messages, generation=generation)
        except Refusal:
            continue  # some templates want a system prompt first
        except DataError as error:
            raise ModelError(
                error.found,
                expected=error.expected,
                fix="copy the chat template of the original model again",
            ) from error
        if not template.reads_clock:
            _check_alike(tokenizer, messages, ours, generation=generation)
    return template


def variables_of(tokenizer: Tokenizer) -> str:
    """The special tokens that a template may use, by name, as JSON."""
    return json.dumps(dict(tokenizer.special_tokens_map), sort_keys=True, default=str)


def check_end_of_turn(texts: TextRenderer, encoder: Encoder, ends: Iterable[str]) -> None:
    """Check that the token with which the template ends an answer ends a turn.

    Raises:
        ModelError: it does not: a model that writes it would go on.
    """
    after = texts.after_answer or ""
    controls = [token for _, _, token in encoder.controls_in(after)]
    if controls and not texts.ends_turn(after):
        raise ModelError(
            f"the chat template ends an answer with {controls[0]}, which is no end token "
            f"({', '.join(sorted(ends))}): a model that writes it would go on, past the end of "
            "its turn",
            expected="the template's end of turn among the end tokens",
            fix=f"add the id of {controls[0]} ({encoder.controls[controls[0]]}) to eos_token_id "
            "in generation_config.json",
        )


def _text_of(tokenizer: Tokenizer) -> str:
    """The default chat template's text."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        known = tokenizer.chat_template
        names = ", ".join(sorted(map(str, known))) if isinstance(known, dict) else str(known)[:60]
        raise ModelError(
            f"chat templates named {names}, and none of them is the default",
            expected="one template, or one of them named `default`",
            fix="name one of them `default` in tokenizer_config.json, or write it to "
            "chat_template.jinja in the model folder",
        ) from error


def _check_alike(
    tokenizer: Tokenizer, messages: Sequence[Message], ours: str, *, generation: bool
) -> None:
    """Compare a rendering with that of transformers, which users of the model will call."""
    turns = [{"role": str(m.role), "content": m.content} for m in messages]
    theirs = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    if theirs != ours:
        raise ModelError(
            f"the chat template gives {shortened(ours)} here and {shortened(theirs)} in "
            "transformers",
            expected="one text",
            fix="please report this template",
        )
