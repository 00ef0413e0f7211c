"""Whether the scorer can be trusted: some answers are scored twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from posttrain.measure.bootstrap import proportion_interval
from posttrain.measure.estimators import of_task
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.recording import TaskSamples, raw_column
from posttrain.measure.registry import Better, Estimation, Found, Topic

RECHECKED = 4
"""Samples per prompt that are scored twice. With 32 prompts a scorer that changes its mind on
one answer in 40 is found with probability 96 %."""


@raw_column(
    "recheck",
    dtype=np.bool_,
    per="first samples",
    absent="no answer was scored twice, so the verifier may not be deterministic",
)
def recheck_column(samples: TaskSamples) -> npt.NDArray[np.bool_]:
    """[P, R] True where scoring the same answer once more gave another score."""
    n = samples.num_samples
    twice = [i for i in range(len(samples.texts)) if i % n < RECHECKED]
    again = samples.taskset.score(
        [samples.tasks[i // n] for i in twice], [samples.texts[i] for i in twice]
    )
    changed = np.array(again, np.float32) != samples.scores.reshape(-1)[twice]
    return np.asarray(changed.reshape(len(samples.tasks), -1))


@of_task(
    "verifier_disagreement",
    topic=Topic.TRUST,
    meaning="answers scored otherwise at a second look",
    unit="share",
    better=Better.LOWER,
    source="count",
    columns=(recheck_column,),
    phrase="the share of answers scored otherwise at a second look",
)
def _verifier_disagreement(task: TaskMeasurement, how: Estimation) -> Found:
    """Exact, with answers as the units: the verifier's chance is drawn anew for each of them.

    0 says that none of those was, not that the verifier is deterministic; see the upper bound.
    """
    recheck = task.need(recheck_column)
    changed, size = int(recheck.sum()), recheck.size
    of_answers = proportion_interval(changed, size, confidence=how.confidence)
    words = f"{changed} of {size} answers got another score at a second look"
    return Found(replace(of_answers, num_prompts=len(task.prompts)), words, recheck.shape[1])


def verifier_words(task: TaskMeasurement) -> str | None:
    """A sentence when the scorer gave an answer two different scores, else None."""
    recheck = task.find(recheck_column)
    if recheck is None or not recheck.any():
        return None
    return (
        f"{task.taskset}: the verifier is not deterministic: of {recheck.size} answers that "
        f"were scored twice, {int(recheck.sum())} got another score; success rates "
        "include its chance"
    )
