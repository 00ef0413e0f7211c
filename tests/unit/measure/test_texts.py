"""Self-BLEU, repetition and answer numbers against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.measure.texts import BLEU_SAMPLES, answer_numbers, repeated_share, self_bleu


def test_self_bleu_by_hand() -> None:
    # "a b c d" against "a b c e": unigrams 3/4, bigrams (2 + 1)/(3 + 1), trigrams (1 + 1)/(2 + 1),
    # 4-grams (0 + 1)/(1 + 1); lengths are equal, so no penalty. The other way round is the same.
    by_hand = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(by_hand, rel=1e-12)


def test_the_shorter_text_pays_the_brevity_penalty() -> None:
    # "a b" against "a b c d": unigrams 1, bigrams (1 + 1)/(1 + 1), penalty exp(1 − 4/2).
    # "a b c d" against "a b": 2/4, (1 + 1)/(3 + 1), (0 + 1)/(2 + 1), (0 + 1)/(1 + 1), no penalty.
    short = math.exp(1 - 4 / 2)
    long = (2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** (1 / 4)
    assert self_bleu(["a b", "a b c d"]) == pytest.approx((short + long) / 2, rel=1e-12)


def test_counts_are_clipped_by_the_reference_that_has_most() -> None:
    # "x x x" against "x y" and "x x z": unigrams 2/3, bigrams (1 + 1)/(2 + 1), trigrams 1/2.
    first = (2 / 3 * 2 / 3 * 1 / 2) ** (1 / 3)
    # "x y": unigrams 1/2 (x is elsewhere, y is not), bigrams (0 + 1)/(1 + 1); nearest length 3.
    second = math.exp(1 - 3 / 2) * (1 / 2 * 1 / 2) ** (1 / 2)
    # "x x z": unigrams 2/3, bigrams (1 + 1)/(2 + 1), trigrams (0 + 1)/(1 + 1).
    third = (2 / 3 * 2 / 3 * 1 / 2) ** (1 / 3)
    expected = (first + second + third) / 3
    assert self_bleu(["x x x", "x y", "x x z"]) == pytest.approx(expected, rel=1e-12)


def test_ends_of_the_scale() -> None:
    assert self_bleu(["the same, twice"] * 5) == 1.0
    assert self_bleu(["one two", "three four", "five"]) == 0.0
    assert self_bleu([""] * 3) == 1.0
    assert self_bleu(["", "a"]) == 0.0
    assert self_bleu(["12"] * BLEU_SAMPLES + ["never looked at"] * 50) == 1.0
    assert self_bleu(["alone"]) == 1.0


def test_signs_are_units_of_their_own() -> None:
    assert self_bleu(["-1", "- 1"]) == 1.0


def test_repeated_share_by_hand() -> None:
    # 1 2 3 4 5 1 2 3 4: six 4-grams, the last equals the first.
    assert repeated_share(np.array([1, 2, 3, 4, 5, 1, 2, 3, 4])) == pytest.approx(1 / 6)
    assert repeated_share(np.array([1, 2, 3, 4])) == 0.0
    assert repeated_share(np.array([], np.int32)) == 0.0
    loop = np.tile([4, 9], 50)  # 97 4-grams, two different
    assert repeated_share(loop) == pytest.approx(95 / 97)


def test_answer_numbers() -> None:
    assert answer_numbers(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]
