"""maj@k against every subset, and its expectation against exact multinomial sums."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from math import comb, factorial, prod

import numpy as np
import pytest
from measurements import measured

from posttrain.core.errors import ConfigError
from posttrain.measure.readings import read
from posttrain.measure.voting import majority_at_k


def plurality(votes: tuple[int, ...], right: dict[int, float]) -> float:
    """Chance that the winner is right, ties by lot."""
    counts = Counter(votes)
    top = [a for a, c in counts.items() if c == max(counts.values())]
    return sum(right[a] for a in top) / len(top)


@pytest.mark.parametrize("k", range(1, 8))
def test_against_every_subset(k: int) -> None:
    answers = np.array([[0, 1, 0, 2, 1, 0, 3], [0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
    right = [{0: 1, 1: 0, 2: 0, 3: 0}, {0: 0, 1: 1, 2: 1}, {**dict.fromkeys(range(7), 0), 4: 1}]
    successes = np.array([[r[a] for a in row] for row, r in zip(answers, right, strict=True)])
    expected = [
        np.mean([plurality(s, r) for s in combinations(row.tolist(), k)])
        for row, r in zip(answers, right, strict=True)
    ]
    assert majority_at_k(answers, successes == 1, k) == pytest.approx(expected, abs=1e-12)


def test_an_answer_judged_both_ways_counts_by_its_share() -> None:
    answers = np.array([[0, 0, 0, 0]])
    assert majority_at_k(answers, np.array([[True, False, False, False]]), 3)[0] == 0.25


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_expectation_is_the_exact_multinomial_majority(k: int) -> None:
    p, n = [0.4, 0.35, 0.25], 6  # answer 0 is right

    def over(size: int):  # type: ignore[no-untyped-def]
        """(counts, probability) of every outcome of ``size`` draws."""
        for counts in product(range(size + 1), repeat=3):
            if sum(counts) == size:
                ways = factorial(size) / prod(map(factorial, counts))
                yield counts, ways * prod(q**c for q, c in zip(p, counts, strict=True))

    truth = 0.0
    for counts, probability in over(k):
        top = [a for a in range(3) if counts[a] == max(counts)]
        truth += probability * (0 in top) / len(top)
    mean = 0.0
    for counts, probability in over(n):
        row = np.repeat(np.arange(3), counts)[None]
        mean += probability * majority_at_k(row, row == 0, k)[0]
    assert mean == pytest.approx(truth, abs=1e-12)


def test_many_samples_stay_exact() -> None:
    # Two answers, odd k: the right one wins with more than k/2 of a hypergeometric draw.
    n, k, c = 2048, 33, 900
    row = (np.arange(n) >= c).astype(int)[None]
    exact = sum(comb(c, i) * comb(n - c, k - i) for i in range(17, k + 1)) / comb(n, k)
    assert majority_at_k(row, row == 0, k)[0] == pytest.approx(exact, rel=1e-10)


def test_reading_and_refusals() -> None:
    rng = np.random.default_rng(0)
    answers = (rng.random((24, 16)) < 0.3).astype(int)
    task = measured(answers == 0, answers=answers)
    r = read("maj@5", task)
    assert (r.name, r.units, r.samples) == ("maj@5", 24, 16)
    assert 0.7 < r.low < r.value < r.high <= 1
    with pytest.raises(ConfigError, match="16 samples"):
        read("maj@17", task)
    with pytest.raises(ConfigError, match="answers were not kept"):
        read("maj@5", measured(answers == 0))
