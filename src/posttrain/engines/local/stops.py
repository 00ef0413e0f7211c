"""Stop strings: the token of a completion at which one of them is complete.

Tokens are not characters: a stop string may begin inside one token and end inside another, and a
token may be only a part of a character. So the *text* of a long enough tail is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SLACK = 8
"""Tokens without text (special ones) that may occur within a stop string."""

Decode = Callable[[list[int]], str]


def window(stops: Sequence[str]) -> int:
    """Tokens that a stop string can span: every token with text gives at least one byte."""
    return max(len(stop.encode()) for stop in stops) + SLACK


def find_stop(
    tokens: Sequence[int], stops: Sequence[str], decode: Decode, *, searched: int = 0
) -> int | None:
    """The number of tokens up to and with the first that completes a stop string, or None.

    The first ``searched`` tokens are known to complete none.

    Example:
        >>> letters = lambda ids: "".join(chr(i) for i in ids)
        >>> find_stop([ord(c) for c in "so: END. more"], ("END", "more"), letters)
        7
    """
    first = max(searched - window(stops), 0)
    if not _holds(decode(list(tokens[first:])), stops):
        return None
    for end in range(searched + 1, len(tokens) + 1):
        if _holds(decode(list(tokens[max(end - window(stops), 0) : end])), stops):
            return end
    return None


def _holds(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)
