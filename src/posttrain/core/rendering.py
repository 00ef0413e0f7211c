"""How a rendered conversation may differ from its messages, and what to do about it.

A chat template decides which text a model reads. Some cut text (reasoning, indentation), some add
it. A renderer compares what it made with the messages and reports every difference as a
:class:`Change`; :class:`Rules` say which of them a data set accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

ControlTokens = Literal["text", "parse"]
"""What control tokens inside a message are: characters like others, or the tokens themselves."""

Loss = Literal["trim", "cut", "unknown"]
"""Kinds of change that take something away."""


class DifferenceKind(StrEnum):
    """A difference between a message and its text or tokens."""

    TRIM = "trim"  # whitespace at the start of a message is cut, such as indentation
    TRIM_END = "trim_end"  # whitespace at the end of a message is cut
    CUT = "cut"  # other text of a message is cut, such as its reasoning
    UNKNOWN = "unknown"  # characters that the tokenizer does not know
    SPACED = "spaced"  # only the whitespace inside a message is another
    ADDED = "added"  # an answer begins with text of the template's, such as an empty <think>
    UNOPENED = "unopened"  # generation starts with text that the answer is trained without
    CONTROL = "control"  # control tokens in a message are written as text


_WORDS = {
    DifferenceKind.TRIM: "the template cuts whitespace at the start of a message",
    DifferenceKind.TRIM_END: "the template cuts whitespace at the end of a message",
    DifferenceKind.CUT: "the template cuts text out of a message",
    DifferenceKind.UNKNOWN: "the tokenizer does not know characters of a message",
    DifferenceKind.SPACED: "the template changes whitespace inside a message",
    DifferenceKind.ADDED: "the template begins an answer with text of its own",
    DifferenceKind.UNOPENED: "generation starts with text that the answer is trained without",
    DifferenceKind.CONTROL: "control tokens in a message are written as text",
}
LOSSES = frozenset({DifferenceKind.TRIM, DifferenceKind.CUT, DifferenceKind.UNKNOWN})
"""Changes that are refused when a trained message suffers them."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. ``message`` counts from 1; ``text`` is what was cut, added or kept."""

    kind: DifferenceKind
    message: int
    trained: bool
    text: str

    @property
    def words(self) -> str:
        """The difference in words.

        Example:
            >>> Change(DifferenceKind.TRIM, 2, True, "    ").words
            "the template cuts whitespace at the start of a message: '    ' (message 2)"
        """
        return f"{_WORDS[self.kind]}: {shortened(self.text)} (message {self.message})"


def meaning(kind: DifferenceKind) -> str:
    """A kind of difference in words."""
    return _WORDS[kind]


def shortened(text: str, most: int = 40) -> str:
    """A text in quotes, its middle left out when it is long.

    Example:
        >>> shortened("abcdefghij", most=6)
        "'abc…hij'"
    """
    half = most // 2
    return repr(text if len(text) <= most else f"{text[:half]}…{text[-half:]}")


def unseen(change: Change) -> None:
    """An observer of changes that does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a caller accepts of a rendering.

    ``control_tokens``: what control tokens inside messages become. ``allow``: losses of trained
    text that are accepted. ``seen``: called with every accepted change.
    """

    control_tokens: ControlTokens = "text"
    allow: frozenset[str] = frozenset()
    seen: Callable[[Change], None] = unseen


STRICT = Rules()
"""Nothing that is trained may be lost, and text stays text."""

SAMPLED = Rules(control_tokens="parse", allow=frozenset(LOSSES))
"""For what a policy sampled: control tokens in it are tokens, and nothing is refused."""
