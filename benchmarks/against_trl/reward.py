"""A reward that costs nothing and differs between completions. Both libraries call it alike."""

from __future__ import annotations


def even_words(prompts: list[object], completions: list[str], **columns: object) -> list[float]:
    """The share of words that end in an even digit.

    Example:
        >>> even_words(["w3"], ["w2 w5 w8 w11"])
        [0.5]
    """
    return [_share([word[-1] in "02468" for word in text.split()]) for text in completions]


def _share(hits: list[bool]) -> float:
    return sum(hits) / max(len(hits), 1)
