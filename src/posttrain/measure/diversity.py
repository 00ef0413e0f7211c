"""How much a policy's samples vary, and what they look like.

answers [P, n] ──▶ answer_entropy, distinct_answers, single_answer
texts          ──▶ self_bleu, repetition            (worked out while measuring, see texts.py)
log-probs      ──▶ token_entropy
lengths        ──▶ tokens_per_answer, truncated

All of it depends on temperature and truncation: compare at equal decoding and n only.
Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import (
    Floats,
    Interval,
    mean_interval,
    proportion_interval,
    ratio_interval,
)
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.reading import Reading, reading
from posttrain.measure.voting import answers_of


def answer_entropies(answers: npt.NDArray[np.integer]) -> Floats:
    """[P] entropy of the answer to each prompt in nats, nearly without bias.

    Σ_a (m_a/n)·(H(n−1) − H(m_a−1)) with counts m_a and harmonic numbers H. Its expectation is
    Σ_v=1..n−1 Σ_a p_a (1 − p_a)^v / v: the series of −Σ p log p, cut off after n − 1 terms (Zhang,
    Neural Computation 24, 2012; the closed form is derived by summing the hypergeometric terms,
    and tested against the series). The plug-in entropy is too low by about (A − 1)/2n for A
    answers instead, more for the policy that varies more, which biases a comparison.

    Example:
        >>> answer_entropies(np.array([[0, 0, 0, 0], [0, 1, 0, 1]])).round(3).tolist()
        [0.0, 0.833]
    """
    n = answers.shape[1]
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n + 1))])
    out = np.zeros(len(answers))
    for i, row in enumerate(answers):
        counts = np.bincount(row)
        counts = counts[counts > 0]
        out[i] = (counts / n * (harmonic[n - 1] - harmonic[counts - 1])).sum()
    return out


def highest_entropy(num_samples: int) -> float:
    """The most that :func:`answer_entropies` gives: every answer another one."""
    return float((1.0 / np.arange(1, num_samples)).sum())


def answer_variety(
    task: TaskMeasurement, *, confidence: float = 0.95, seed: int = 0
) -> tuple[Reading, ...]:
    """answer_entropy, distinct_answers and single_answer.

    The first two are means over prompts, whose intervals allow for prompts not asked that vary as
    much as n samples can: with 32 prompts that never vary, up to 0.11 of that. ``single_answer``
    is a share of prompts, and says more about a policy that has collapsed.

    Raises:
        ConfigError: the measurement is of a version that did not keep the answers.
    """
    answers, n = answers_of(task), task.num_samples
    entropy = mean_interval(
        answer_entropies(answers), highest=highest_entropy(n), confidence=confidence, seed=seed
    )
    distinct = mean_interval(
        task.distinct, lowest=1.0, highest=float(n), confidence=confidence, seed=seed
    )
    same = int((task.distinct == 1).sum())
    single = proportion_interval(same, len(answers), confidence=confidence)
    return (
        _reading(
            task,
            "single_answer",
            single,
            f"{single.value:.0%} of prompts got the same answer in all of {n} tries",
        ),
        _reading(
            task,
            "answer_entropy",
            entropy,
            f"the answers to a prompt vary as much as {np.exp(entropy.value):.1f} equally likely "
            "ones",
        ),
        _reading(
            task,
            "distinct_answers",
            distinct,
            f"{distinct.value:.1f} different answers to a prompt in {n} tries",
        ),
    )


def token_entropy(task: TaskMeasurement, *, confidence: float = 0.95, seed: int = 0) -> Reading:
    """Mean entropy of the next token along the policy's own samples, in nats (arXiv 2505.22617).

    −log π of a sampled token is unbiased for the entropy at its place, so the mean over all tokens
    estimates it: Σ −log π / Σ tokens, both resampled by prompt. It is the entropy of what was
    sampled from: at another temperature it is that distribution's.

    For the bound on prompts not asked, no prompt is taken to have more than the largest value of
    any sample seen.
    """
    nll, lengths = np.asarray(task.nll, np.float64), task.lengths.astype(np.float64)
    finite = np.isfinite(nll) & (lengths > 0)
    sums, tokens = np.where(finite, nll * lengths, 0.0), np.where(finite, lengths, 0.0)
    if not finite.any():
        raise ConfigError(f"{task.taskset}: no finite log-probs", fix="measure the policy again")
    most = max(float(nll[finite].max()), 1e-9)
    interval = ratio_interval(
        sums.sum(axis=1),
        tokens.sum(axis=1),
        confidence=confidence,
        seed=seed,
        limits=(min(float(nll[finite].min()), 0.0), most),
    )
    words = f"the next token is as open as {np.exp(interval.value):.2f} equally likely ones"
    return _reading(task, "token_entropy", interval, words)


def form(task: TaskMeasurement, *, confidence: float = 0.95, seed: int = 0) -> tuple[Reading, ...]:
    """truncated, tokens_per_answer, and where they were kept self_bleu and repetition."""

    def mean(values: npt.ArrayLike, highest: float) -> Interval:
        return mean_interval(values, highest=highest, confidence=confidence, seed=seed)

    cut = mean(task.truncated.mean(axis=1, dtype=np.float64), 1.0)
    tokens = mean(task.lengths.mean(axis=1, dtype=np.float64), max(float(task.lengths.max()), 1.0))
    found = [
        _reading(task, "truncated", cut, f"{cut.value:.0%} of samples were cut off by the budget"),
        _reading(task, "tokens_per_answer", tokens, f"{tokens.value:.1f} tokens per sample"),
    ]
    if task.self_bleu is not None:
        alike = mean(task.self_bleu, 1.0)
        words = f"samples of a prompt are {alike.value:.2f} alike in wording, on a scale to 1"
        found.append(_reading(task, "self_bleu", alike, words))
    if task.repetition is not None:
        again = mean(task.repetition.mean(axis=1, dtype=np.float64), 1.0)
        words = f"{again.value:.0%} of the 4-grams of a sample repeat earlier ones"
        found.append(_reading(task, "repetition", again, words))
    return tuple(found)


def verifier_disagreement(task: TaskMeasurement, *, confidence: float = 0.95) -> Reading:
    """The share of answers that the verifier scored otherwise when asked again.

    Exact, with answers as the units: the verifier's chance is drawn anew for each of them. 0 says
    that none of those was, not that the verifier is deterministic; see the upper bound.

    Raises:
        ConfigError: the measurement is of a version that did not score twice.
    """
    if task.recheck is None:
        raise ConfigError(
            f"{task.taskset}: no answer of this measurement was scored twice",
            fix="measure the policy again",
        )
    changed, size = int(task.recheck.sum()), task.recheck.size
    interval = proportion_interval(changed, size, confidence=confidence)
    words = f"{changed} of {size} answers got another score at a second look"
    return Reading(
        "verifier_disagreement",
        task.taskset,
        interval.value,
        interval.low,
        interval.high,
        len(task.prompts),
        task.recheck.shape[1],
        words,
        confidence,
    )


def _reading(task: TaskMeasurement, name: str, interval: Interval, words: str) -> Reading:
    return reading(name, task.taskset, interval, samples=task.num_samples, words=words)
