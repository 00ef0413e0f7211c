"""One number per prompt, by name: what a gate can ask of a measurement.

``pass@1``, ``zero_variance@8`` ──per_prompt──▶ [P] values and their range ──▶ an interval

Every number is an unbiased estimate for its prompt, so that means and differences over prompts are
unbiased too. Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError, nearest
from posttrain.measure.bootstrap import Floats, Interval, mean_interval
from posttrain.measure.diversity import answer_entropies
from posttrain.measure.learnability import informative_at
from posttrain.measure.measurement import TaskMeasurement, require_same_task
from posttrain.measure.passk import best_at_k, pass_at_k, pass_hat_k
from posttrain.measure.voting import answers_of, majority_at_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A named quantity of a prompt. ``of(task, k)`` gives [P]; ``takes_k`` says if a k belongs."""

    of: Callable[[TaskMeasurement, int], Floats]
    takes_k: bool
    meaning: str
    share: bool = True  # lies between 0 and 1 whatever the samples are


def _all_right(task: TaskMeasurement, k: int) -> Floats:
    return pass_hat_k(task.counts, task.num_samples, k)


def _all_wrong(task: TaskMeasurement, k: int) -> Floats:
    return 1 - pass_at_k(task.counts, task.num_samples, k)


def _mean(values: np.ndarray) -> Floats:
    return np.asarray(values.mean(axis=1, dtype=np.float64))


def _kl(task: TaskMeasurement, k: int) -> Floats:
    if task.kl_base is None:
        raise ConfigError(
            f"{task.taskset}: no KL from the base was measured",
            expected="a policy other than the base, sampled at temperature 1 without truncation",
        )
    return _mean(task.kl_base)


def _texts(values: npt.NDArray[np.float32] | None, task: TaskMeasurement) -> Floats:
    if values is None:
        raise ConfigError(
            f"{task.taskset}: texts were not looked at", fix="measure the policy again"
        )
    return values.astype(np.float64) if values.ndim == 1 else _mean(values)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "pass": Metric(
            of=lambda t, k: pass_at_k(t.counts, t.num_samples, k),
            takes_k=True,
            meaning="at least one of k samples is right",
        ),
        "reliable": Metric(of=_all_right, takes_k=True, meaning="all of k samples are right"),
        "best": Metric(
            of=lambda t, k: best_at_k(t.scores, k),
            takes_k=True,
            meaning="the best score among k samples",
            share=False,
        ),
        "all_wrong": Metric(of=_all_wrong, takes_k=True, meaning="a group of k has no success"),
        "all_right": Metric(of=_all_right, takes_k=True, meaning="a group of k has no failure"),
        "zero_variance": Metric(
            of=lambda t, k: _all_wrong(t, k) + _all_right(t, k),
            takes_k=True,
            meaning="a group of k is all right or all wrong, and teaches nothing by comparison",
        ),
        "informative": Metric(
            of=lambda t, k: informative_at(t.counts, t.num_samples, k),
            takes_k=True,
            meaning="a group of k holds a success and a failure",
        ),
        "maj": Metric(
            of=lambda t, k: np.clip(majority_at_k(answers_of(t), t.successes, k), 0.0, 1.0),
            takes_k=True,
            meaning="the commonest of k answers is right",
        ),
        "answer_entropy": Metric(
            of=lambda t, k: answer_entropies(answers_of(t)),
            takes_k=False,
            meaning="entropy of the final answer, nats",
            share=False,
        ),
        "self_bleu": Metric(
            of=lambda t, k: _texts(t.self_bleu, t),
            takes_k=False,
            meaning="likeness of a prompt's samples to each other",
        ),
        "repetition": Metric(
            of=lambda t, k: _texts(t.repetition, t),
            takes_k=False,
            meaning="4-grams of a sample that it repeats",
        ),
        "score": Metric(
            of=lambda t, k: _mean(t.scores), takes_k=False, meaning="the mean score", share=False
        ),
        "truncated": Metric(
            of=lambda t, k: _mean(t.truncated), takes_k=False, meaning="samples cut off"
        ),
        "distinct": Metric(
            of=lambda t, k: t.distinct / t.num_samples,
            takes_k=False,
            meaning="different answers per sample",
        ),
        "tokens": Metric(
            of=lambda t, k: _mean(t.lengths),
            takes_k=False,
            meaning="tokens per answer",
            share=False,
        ),
        "entropy": Metric(
            of=lambda t, k: _mean(t.nll),
            takes_k=False,
            meaning="negative log-prob per token of own samples, nats",
            share=False,
        ),
        "kl_base": Metric(
            of=_kl, takes_k=False, meaning="KL from the base per answer, nats", share=False
        ),
    }
)
"""What can be asked, by the part of its name before ``@``."""


def parse(name: str) -> tuple[str, int]:
    """A metric's key in METRICS, and its k (1 where none belongs).

    Raises:
        ConfigError: no such metric, or a k that is missing or does not belong.

    Example:
        >>> parse("zero_variance@8"), parse("tokens")
        (('zero_variance', 8), ('tokens', 1))
    """
    key, at, k = name.partition("@")
    if key not in METRICS:
        known = [f"{m}@k" if METRICS[m].takes_k else m for m in METRICS]
        raise ConfigError(
            f"no metric {name!r}", expected=", ".join(known), fix=nearest(key, METRICS)
        )
    if METRICS[key].takes_k:
        if not k.isdigit() or int(k) < 1:
            raise ConfigError(f"metric {name!r}", expected=f"{key}@<k>, k >= 1")
        return key, int(k)
    if at:
        raise ConfigError(f"metric {name!r}", expected=f"{key}, without a number")
    return key, 1


def per_prompt(name: str, task: TaskMeasurement) -> Floats:
    """[P] the metric of that name.

    Raises:
        ConfigError: as for :func:`parse`; k above n; or what it needs was not measured.
    """
    key, k = parse(name)
    return METRICS[key].of(task, k)


def metric_interval(
    name: str, task: TaskMeasurement, *, since: TaskMeasurement | None = None, confidence: float
) -> Interval:
    """The mean over prompts with its interval; with ``since``, of the paired change from it.

    A quantity without natural bounds is taken to lie within what was seen, and 0: its interval
    says nothing of rarer extremes.

    Raises:
        RunError: ``since`` was not measured on the same prompts in the same way.
    """
    metric = METRICS[parse(name)[0]]
    now = per_prompt(name, task)
    seen, low, high = now, 0.0, 1.0
    if since is not None:
        require_same_task(since, task)
        before = per_prompt(name, since)
        now, seen = now - before, np.concatenate([now, before])
    if not metric.share:
        low, high = min(0.0, float(seen.min())), max(0.0, float(seen.max()))
    if since is not None:
        low, high = low - high, high - low
    if high <= low:
        high = low + 1e-12  # nothing but zeros were seen
    return mean_interval(now, lowest=low, highest=high, confidence=confidence)
