"""How much a policy's samples vary, and what they look like.

answers [P, n] ──▶ answer_entropy, distinct_answers, single_answer
texts          ──▶ self_bleu, repetition            (worked out while measuring, see texts.py)
log-probs      ──▶ token_entropy
lengths        ──▶ tokens_per_answer, truncated

All of it depends on temperature and truncation: compare at equal decoding and n only. Means over
prompts have intervals that allow for prompts not asked that vary as much as n samples can: with 32
prompts that never vary, up to 0.11 of that.

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import Floats, proportion_interval
from posttrain.measure.estimators import of_task, per_prompt, ratio
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.recording import TaskSamples, raw_column
from posttrain.measure.registry import Better, Estimation, Found, Topic
from posttrain.measure.texts import repeated_share, self_bleu
from posttrain.measure.voting import answers_column


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


# --- answers ---------------------------------------------------------------------------------


@per_prompt(
    "answer_entropy",
    topic=Topic.DIVERSITY,
    meaning="entropy of the final answer",
    unit="nats",
    better=Better.NEITHER,
    source="2507.14843",
    columns=(answers_column,),
    limits=lambda values, tasks: (0.0, highest_entropy(tasks[0].num_samples)),
    sentence=lambda value, k, task: (
        f"the answers to a prompt vary as much as {np.exp(value):.1f} equally likely ones"
    ),
    phrase="the entropy of the answers",
    overview=("answer_entropy", "entropy"),
    in_changes=True,
)
def _answer_entropy(task: TaskMeasurement) -> Floats:
    return answer_entropies(task.need(answers_column))


@per_prompt(
    "distinct_answers",
    topic=Topic.DIVERSITY,
    meaning="different answers to a prompt",
    unit="answers",
    better=Better.NEITHER,
    source="2507.14843",
    limits=lambda values, tasks: (1.0, float(tasks[0].num_samples)),
    sentence=lambda value, k, task: (
        f"{value:.1f} different answers to a prompt in {task.num_samples} tries"
    ),
    overview=("distinct_answers", "answers"),
    in_changes=True,
    formerly={"distinct": "distinct_answers"},
)
def _distinct_answers(task: TaskMeasurement) -> Floats:
    return task.distinct.astype(np.float64)


@of_task(
    "single_answer",
    topic=Topic.DIVERSITY,
    meaning="prompts with the same answer in all samples",
    unit="share",
    better=Better.NEITHER,
    source="2507.14843",
)
def _single_answer(task: TaskMeasurement, how: Estimation) -> Found:
    """A share of prompts, which says more than a mean about a policy that has collapsed."""
    same = int((task.distinct == 1).sum())
    share = proportion_interval(same, len(task.prompts), confidence=how.confidence)
    words = f"{share.value:.0%} of prompts got the same answer in all of {task.num_samples} tries"
    return Found(share, words)


# --- tokens ----------------------------------------------------------------------------------


def _known_logprobs(task: TaskMeasurement) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(task.nll) & (task.lengths > 0))


def _nll_range(task: TaskMeasurement) -> tuple[float, float]:
    """No prompt is taken to have more than the largest value of any sample seen."""
    seen = np.asarray(task.nll, np.float64)[_known_logprobs(task)]
    return min(float(seen.min()), 0.0), max(float(seen.max()), 1e-9)


@ratio(
    "token_entropy",
    topic=Topic.DIVERSITY,
    meaning="entropy of the next token",
    unit="nats",
    better=Better.NEITHER,
    source="2505.22617",
    limits=_nll_range,
    lacks=lambda task: None if _known_logprobs(task).any() else "no finite log-probs",
    sentence=lambda value, k, task: (
        f"the next token is as open as {np.exp(value):.2f} equally likely ones"
    ),
    formerly={"entropy": "token_entropy"},
)
def _token_entropy(task: TaskMeasurement) -> tuple[Floats, Floats]:
    """Σ −log π over Σ tokens, along the policy's own samples.

    −log π of a sampled token is unbiased for the entropy at its place. It is the entropy of what
    was sampled from: at another temperature it is that distribution's.
    """
    nll, lengths = np.asarray(task.nll, np.float64), task.lengths.astype(np.float64)
    finite = _known_logprobs(task)
    sums, tokens = np.where(finite, nll * lengths, 0.0), np.where(finite, lengths, 0.0)
    if not finite.any():
        raise ConfigError(f"{task.taskset}: no finite log-probs", fix="measure the policy again")
    return sums.sum(axis=1), tokens.sum(axis=1)


@per_prompt(
    "truncated",
    topic=Topic.FORM,
    meaning="samples that the budget cut off",
    unit="share",
    better=Better.LOWER,
    source="2604.08527",
    sentence=lambda value, k, task: f"{value:.0%} of samples were cut off by the budget",
    phrase="the share of answers cut off by the token budget",
)
def _truncated(task: TaskMeasurement) -> Floats:
    return _means(task.truncated)


@per_prompt(
    "tokens_per_answer",
    topic=Topic.FORM,
    meaning="tokens of a sample",
    unit="tokens",
    better=Better.LOWER,
    source="count",
    limits=lambda values, tasks: (0.0, max(1.0, *(float(t.lengths.max()) for t in tasks))),
    sentence=lambda value, k, task: f"{value:.1f} tokens per sample",
    overview=("tokens_per_answer", "tokens"),
    in_changes=True,
    formerly={"tokens": "tokens_per_answer"},
)
def _tokens_per_answer(task: TaskMeasurement) -> Floats:
    return _means(task.lengths)


def _means(values: npt.NDArray[Any]) -> Floats:
    return np.asarray(values.mean(axis=1, dtype=np.float64))


# --- texts -----------------------------------------------------------------------------------

_NO_TEXTS = "texts were not looked at"


@raw_column("self_bleu", dtype=np.float32, per="prompt", absent=_NO_TEXTS)
def self_bleu_column(samples: TaskSamples) -> list[float]:
    """[P] 0 to 1, see texts.py."""
    return [self_bleu(row) for row in samples.rows(samples.texts)]


@per_prompt(
    "self_bleu",
    topic=Topic.DIVERSITY,
    meaning="likeness of a prompt's samples to each other",
    unit="0 to 1",
    better=Better.NEITHER,
    source="1802.01886",
    columns=(self_bleu_column,),
    sentence=lambda value, k, task: (
        f"samples of a prompt are {value:.2f} alike in wording, on a scale to 1"
    ),
)
def _self_bleu(task: TaskMeasurement) -> Floats:
    return task.need(self_bleu_column).astype(np.float64)


@raw_column("repetition", dtype=np.float32, per="sample", absent=_NO_TEXTS)
def repetition_column(samples: TaskSamples) -> npt.ArrayLike:
    """[P, n] 0 to 1, see texts.py."""
    shares = [repeated_share(c.tokens) for c in samples.completions]
    return np.array(shares).reshape(-1, samples.num_samples)


@per_prompt(
    "repetition",
    topic=Topic.FORM,
    meaning="4-grams of a sample that it repeats",
    unit="share",
    better=Better.LOWER,
    source="1908.04319",
    columns=(repetition_column,),
    sentence=lambda value, k, task: f"{value:.0%} of the 4-grams of a sample repeat earlier ones",
    phrase="the share of repeated 4-grams",
)
def _repetition(task: TaskMeasurement) -> Floats:
    return _means(task.need(repetition_column))
