"""Majority votes: how often the commonest of k answers is right, without bias, from n samples.

answers [P, n], successes [P, n] ──majority_at_k──▶ per prompt [P] ──▶ maj@k

Shape legend: ``P`` prompts, ``n`` samples per prompt, ``A`` distinct answers of one prompt.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from posttrain.measure.bootstrap import Floats
from posttrain.measure.columns import RawArray
from posttrain.measure.estimators import per_prompt
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.passk import check_k
from posttrain.measure.recording import TaskSamples, raw_column
from posttrain.measure.registry import Better, Topic
from posttrain.measure.texts import answer_numbers


def majority_at_k(
    answers: npt.NDArray[np.integer], successes: npt.NDArray[np.bool_], k: int
) -> Floats:
    """[P] unbiased probability that the plurality answer among k samples is right.

    The mean over all C(n, k) ways to choose k of the n samples (a U-statistic, so its expectation
    is the true value), worked out exactly rather than by drawing. Answers that tie for the most
    votes win with equal probability. An answer whose samples are judged differently is right in
    the share in which they are. Self-consistency: arXiv 2203.11171.

    Args:
        answers: [P, n] number of each sample's answer, as in :obj:`answers_column`.
        successes: [P, n].
        k: votes, 1 to n.

    Raises:
        ConfigError: k outside 1 to n.

    Example:
        >>> votes = np.array([[0, 0, 0, 1]])
        >>> [majority_at_k(votes, votes == 0, k).round(9).tolist() for k in (1, 2, 3)]
        [[0.75], [0.75], [1.0]]
    """
    n = answers.shape[1]
    check_k(n, k)
    return np.array(
        [
            _winning(
                np.bincount(row),
                np.asarray(np.bincount(row, right.astype(np.float64)), np.float64),
                n=n,
                k=k,
            )
            for row, right in zip(answers, successes, strict=True)
        ]
    )


def _winning(counts: npt.NDArray[np.int64], right: Floats, *, n: int, k: int) -> float:
    """Σ over right answers a of P(a wins), by generating functions.

    A draw of k without order gives answer b exactly i times in C(m_b, i) ways. With a drawn j
    times, a wins when every other answer is drawn j times or fewer, and shares the win with each
    that is drawn j times. So for each j the ways are the coefficient of x^(k−j) of

        ∫₀¹ Π_b≠a ( Σ_i<j C(m_b, i) x^i + y·C(m_b, j) x^j ) dy ,

    for ∫ y^t dy = 1 / (t + 1) is the share among t + 1 tied answers. The integrand is a polynomial
    of degree at most k/j in y, which Gauss-Legendre quadrature integrates exactly. x is scaled by
    k/n, which keeps all numbers near e^k instead of C(n, k).
    """
    present = counts > 0
    counts, right = counts[present], right[present]
    if len(counts) == 1:
        return float(right[0] / counts[0])
    ways = _ways(int(counts.max()), n=n, k=k)[counts]  # [A, k + 1]
    total = 0.0
    for j in range(1, k + 1):
        drawn = np.flatnonzero((counts >= j) & (right > 0))
        if not len(drawn):
            continue
        nodes, weights = np.polynomial.legendre.leggauss(k // j // 2 + 1)
        for y, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            below = ways[:, : j + 1].copy()
            below[:, j] *= y
            for a in drawn:
                others = _product(np.delete(below, a, axis=0), k - j)
                total += weight * right[a] / counts[a] * ways[a, j] * others[k - j]
    return float(total / _ways(n, n=n, k=k)[n, k])


def _ways(most: int, *, n: int, k: int) -> Floats:
    """[most + 1, k + 1] C(m, i)·(k/n)^i."""
    logs = np.array([math.lgamma(m + 1) for m in range(max(most, k) + 1)])
    m, i = np.arange(most + 1)[:, None], np.arange(k + 1)[None]
    possible = i <= m
    log = logs[m] - logs[i] - logs[np.where(possible, m - i, 0)] + i * math.log(k / n)
    return np.asarray(np.where(possible, np.exp(log), 0.0))


def _product(factors: Floats, degree: int) -> Floats:
    """Coefficients 0 to ``degree`` of the product of polynomials, one per row."""
    result = np.zeros(degree + 1)
    result[0] = 1.0
    for factor in factors:
        result = np.convolve(result, factor)[: degree + 1]
    return result


def _outside(answers: RawArray, num_samples: int) -> str | None:
    wrong = answers.min() < 0 or answers.max() >= num_samples
    return f"numbered outside 0 to {num_samples - 1}" if wrong else None


# --- the metric, and the answers that it counts ----------------------------------------------


@raw_column("answers", dtype=np.int32, per="sample", absent="answers were not kept", fault=_outside)
def answers_column(samples: TaskSamples) -> npt.NDArray[np.int32]:
    """[P, n] numbers of a prompt's distinct final answers, from 0 in the order they came."""
    return np.stack([answer_numbers(row) for row in samples.rows(samples.answers)])


@per_prompt(
    "maj@k",
    topic=Topic.SUCCESS,
    meaning="the commonest of k answers is right",
    unit="probability",
    better=Better.HIGHER,
    source="2203.11171",
    columns=(answers_column,),
    usual=lambda n: (16,),
    sentence=lambda value, k, task: (
        f"the commonest of {k:.0f} answers is right for {value:.0%} of prompts"
    ),
)
def majority(task: TaskMeasurement, k: int) -> Floats:
    """[P] chance that a vote of k is right.

    Raises:
        ConfigError: k outside 1 to n, or a measurement without answers.
    """
    votes = majority_at_k(task.need(answers_column), task.successes, k)
    return np.asarray(np.clip(votes, 0.0, 1.0))
