"""Similarity of a prompt's sampled texts: answers, self-BLEU, repetition.

texts of one prompt ──answer_numbers──▶ which answers are the same
                    ──self_bleu───────▶ how similar the wordings are
tokens of one sample ──repeated_share──▶ how much of it is a loop
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from posttrain.core.provenance import IntArray

ORDER = 4
"""Longest n-gram of BLEU and repetition, as in both papers."""
BLEU_SAMPLES = 16
"""Samples per prompt that self-BLEU compares: the cost grows with the square."""

_UNITS = re.compile(r"\w+|[^\w\s]")


def normalised(text: str) -> str:
    """A text stripped and with single spaces: answers are equal when this is.

    Example:
        >>> normalised("  42\\n apples ")
        '42 apples'
    """
    return " ".join(text.split())


def answer_numbers(answers: Sequence[str]) -> IntArray:
    """[n] numbers of the distinct answers, from 0 in the order in which they first came.

    Example:
        >>> answer_numbers(["7", "8", "7", "9"]).tolist()
        [0, 1, 0, 2]
    """
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(a, len(numbers)) for a in answers], np.int32)


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all the others as references (arXiv 1802.01886), 0 to 1.

    1 when all texts are equal, 0 when no two share a word. BLEU (Papineni and others, 2002) is
    exp(mean_m log p_m) times the brevity penalty min(1, exp(1 − r/c)), where p_m is the share of
    the text's m-grams found in a reference, clipped to the highest count in one reference, c the
    text's length and r the nearest length of a reference. Orders go to 4, or to the text's length
    if that is less; from order 2 on one hit is added to hits and total (Lin and Och, 2004), so
    that short texts do not fall to 0. Words and single signs are the units, not tokens, so that
    models with different tokenizers can be compared. At most BLEU_SAMPLES texts are compared.

    Example:
        >>> self_bleu(["6 x 7 = 42"] * 4), self_bleu(["yes", "no"])
        (1.0, 0.0)
    """
    units = [_UNITS.findall(t) for t in texts[:BLEU_SAMPLES]]
    if len(units) < 2:
        return 1.0
    most = [_two_highest([_grams(u, order) for u in units]) for order in range(1, ORDER + 1)]
    scores = [_bleu(u, i, units, most) for i, u in enumerate(units)]
    return float(np.mean(scores))


_Most = dict[tuple[str, ...], tuple[int, int, int]]


def _two_highest(counts: Sequence[Counter[tuple[str, ...]]]) -> _Most:
    """Per n-gram: the highest count in a text, that text's number, and the highest elsewhere."""
    most: _Most = {}
    for i, counter in enumerate(counts):
        for gram, count in counter.items():
            first, owner, second = most.get(gram, (0, -1, 0))
            if count > first:
                most[gram] = (count, i, first)
            elif count > second:
                most[gram] = (first, owner, count)
    return most


def _bleu(unit: list[str], i: int, units: list[list[str]], most: list[_Most]) -> float:
    others = [len(u) for j, u in enumerate(units) if j != i]
    if not unit:
        return sum(length == 0 for length in others) / len(others)
    logs = []
    for order in range(1, min(ORDER, len(unit)) + 1):
        grams = _grams(unit, order)
        hits = 0
        for gram, count in grams.items():
            first, owner, second = most[order - 1][gram]
            hits += min(count, second if owner == i else first)
        extra = int(order > 1)
        share = (hits + extra) / (grams.total() + extra)
        if not share:
            return 0.0
        logs.append(math.log(share))
    nearest = min(others, key=lambda length: (abs(length - len(unit)), length))
    penalty = min(1.0, math.exp(1 - nearest / len(unit)))
    return penalty * math.exp(sum(logs) / len(logs))


def _grams(unit: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(unit[k:] for k in range(order)), strict=False))


def repeated_share(tokens: npt.NDArray[np.integer]) -> float:
    """Share of a sample's 4-grams of tokens that occurred in it before (arXiv 1908.04319), 0 to 1.

    0 in a sample without a repeated 4-gram, near 1 in a loop. Tokens rather than words, since a
    loop of one sign is one word. A compression ratio also shows loops, but has no natural zero:
    short texts never compress.

    Example:
        >>> repeated_share(np.array([1, 2, 3, 4, 5])), repeated_share(np.array([7] * 23))
        (0.0, 0.95)
    """
    if len(tokens) <= ORDER:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, ORDER)
    return 1 - len(np.unique(windows, axis=0)) / len(windows)
