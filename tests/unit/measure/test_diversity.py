"""Diversity against closed forms: entropies by full enumeration, ratios by hand."""

from __future__ import annotations

from math import comb, log

import numpy as np
import pytest
from measurements import measured

from posttrain.core.errors import ConfigError
from posttrain.measure.diversity import answer_entropies, highest_entropy
from posttrain.measure.readings import read, take


def two_answers(c: int, n: int) -> np.ndarray:
    return (np.arange(n) >= c).astype(int)[None]


@pytest.mark.parametrize("p", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("n", [4, 16, 64])
def test_the_expectation_is_the_series_of_the_entropy(p: float, n: int) -> None:
    mean = sum(
        comb(n, c) * p**c * (1 - p) ** (n - c) * answer_entropies(two_answers(c, n))[0]
        for c in range(n + 1)
    )
    series = sum(q * (1 - q) ** v / v for q in (p, 1 - p) for v in range(1, n))
    assert mean == pytest.approx(series, abs=1e-12)
    truth = -p * log(p) - (1 - p) * log(1 - p)
    plug_in = sum(
        comb(n, c) * p**c * (1 - p) ** (n - c) * -sum(x / n * log(x / n) for x in (c, n - c) if x)
        for c in range(n + 1)
    )
    assert abs(mean - truth) <= abs(plug_in - truth) + 1e-12


def test_ends_of_the_entropy() -> None:
    assert answer_entropies(np.array([[3, 3, 3]]))[0] == 0.0
    assert answer_entropies(np.array([[0, 1, 2, 3]]))[0] == pytest.approx(highest_entropy(4))
    # Numbers are names: which number an answer has does not matter.
    assert answer_entropies(np.array([[5, 2, 5]])) == answer_entropies(np.array([[0, 1, 0]]))


def test_variety_readings() -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, (30, 64))
    distinct = [len(set(row)) for row in answers.tolist()]
    task = measured(answers == 0, answers=answers, distinct=distinct)
    single, entropy, number = (
        read(name, task) for name in ("single_answer", "answer_entropy", "distinct_answers")
    )
    assert single.value == 0.0
    assert entropy.value == pytest.approx(log(3), abs=0.02)
    assert entropy.low < entropy.value < entropy.high
    assert number.value == 3.0
    collapsed = np.zeros((32, 8), int)
    same = read("single_answer", measured(collapsed == 0, answers=collapsed))
    assert (same.value, same.low) == (1.0, pytest.approx(0.025 ** (1 / 32)))
    with pytest.raises(ConfigError, match="answers were not kept"):
        read("answer_entropy", measured(answers == 0))


def test_token_entropy_weighs_tokens_not_samples() -> None:
    # Nine samples of one token at 0 nats and one of nine tokens at 2 nats: half of all tokens.
    nll = np.zeros((12, 10))
    lengths = np.ones((12, 10), int)
    nll[:, 0], lengths[:, 0] = 2.0, 9
    r = read("token_entropy", measured(np.zeros((12, 10)), nll=nll, lengths=lengths))
    assert r.value == pytest.approx(1.0)
    # All prompts are alike; others could be anywhere between 0 and the 2 nats that were seen.
    unseen = 1 - 0.025 ** (1 / 12)
    assert (r.low, r.high) == (pytest.approx(1 - unseen), pytest.approx(1 + unseen))
    with pytest.raises(ConfigError, match="no finite log-probs"):
        read("token_entropy", measured(np.zeros((3, 2)), nll=np.full((3, 2), np.nan)))


def test_form() -> None:
    task = measured(
        np.zeros((8, 4)),
        lengths=np.tile([1, 2, 3, 4], (8, 1)),
        truncated=np.tile([0, 0, 0, 1], (8, 1)),
        self_bleu=np.full(8, 0.5),
        repetition=np.tile([0, 0, 0.2, 0.2], (8, 1)),
    )
    names = ("truncated", "tokens_per_answer", "self_bleu", "repetition")
    values = {name: read(name, task).value for name in names}
    assert values == {
        "truncated": 0.25,
        "tokens_per_answer": 2.5,
        "self_bleu": 0.5,
        "repetition": pytest.approx(0.1),
    }
    bare = measured(np.zeros((8, 4)))
    assert [r.name for r in take(bare) if r.name in names] == ["tokens_per_answer", "truncated"]


def test_verifier_disagreement_is_exact_over_answers() -> None:
    recheck = np.zeros((32, 4), bool)
    recheck[:4, 0] = True
    r = read("verifier_disagreement", measured(np.zeros((32, 8)), recheck=recheck))
    assert (r.value, r.units, r.samples) == (4 / 128, 32, 4)
    assert r.low == pytest.approx(0.0086, abs=1e-4)  # Clopper and Pearson, 4 of 128
    with pytest.raises(ConfigError, match="scored twice"):
        read("verifier_disagreement", measured(np.zeros((4, 8))))
