"""Calibration: is an answer of probability q right with probability q?

answers, successes [P, n] ──halves of the samples──▶ gaps per prompt and bin ──▶ Σ |mean gap|

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import Floats, Interval, mean_intervals
from posttrain.measure.estimators import of_task
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.registry import USUAL, Better, Estimation, Found, Topic
from posttrain.measure.voting import answers_column

BINS = 5
"""Equal bins of confidence. A task set has tens of prompts, which do not fill the usual ten."""
FEWEST_SAMPLES = 4
"""Per prompt: two to choose a bin, and two to estimate confidence and accuracy."""


@of_task(
    "calibration_error",
    topic=Topic.TRUST,
    meaning="confidence (share of equal answers) against success",
    unit="probability",
    better=Better.LOWER,
    source="1706.04599",
    columns=(answers_column,),
    lacks=lambda task: None if task.num_samples >= FEWEST_SAMPLES else _too_few(task.num_samples),
    overview=("calibration_error", "calibra-\ntion"),
)
def calibration_error(task: TaskMeasurement, how: Estimation = USUAL) -> Found:
    """Expected calibration error of the answer's probability: Σ_b share_b · |right_b − said_b|.

    The confidence of a sample is the probability of its final answer under the policy, measured
    by the share of other samples with the same answer (self-consistency). That, unlike the
    probability of a sequence, does not fall with length, and adds up over wordings.

    Unbiased bins: the first half of a prompt's samples puts an answer into its bin, the second
    half estimates its confidence and accuracy; then the halves are swapped. So the mean gap G_b of
    a bin (right minus said, times its share) is estimated without bias, and is zero for a
    calibrated policy.

    The error is Σ_b |G_b| (arXiv 1706.04599), whose usual estimate is positive by chance alone.
    The value subtracts the noise from the squares: Σ_b √max(0, Ĝ_b² − s_b²) with standard error
    s_b. For the bounds, Σ_b |G_b| is the largest of all signed sums Σ_b ±G_b, each a mean over
    prompts with its own interval. The upper bound is the largest of their upper bounds; the lower
    bound is the largest of their lower bounds, with the error divided among all 2^BINS of them,
    and at least zero. Both are conservative, unless a few rare prompts differ from all others.

    Raises:
        ConfigError: fewer than 4 samples per prompt, or a measurement without answers.
    """
    answers, n = task.need(answers_column), task.num_samples
    if n < FEWEST_SAMPLES:
        raise ConfigError(f"calibration from {_too_few(n)}", expected=f"at least {FEWEST_SAMPLES}")
    gaps = _gaps(answers, task.successes)
    gaps = gaps[:, (gaps != 0).any(axis=0)]
    num, bins = len(gaps), gaps.shape[1]
    signs = np.array(list(product((1.0, -1.0), repeat=bins)))  # [2^bins, bins]
    sums = np.clip(gaps @ signs.T, -1.0, 1.0)
    ranges = ((-1.0, 1.0),) * len(signs)
    shared = 1 - (1 - how.confidence) / len(signs)
    usual = mean_intervals(sums, ranges=ranges, confidence=how.confidence, seed=how.seed)
    strict = mean_intervals(sums, ranges=ranges, confidence=shared, seed=how.seed)
    noise = gaps.var(axis=0, ddof=1) / num if num > 1 else np.zeros(bins)
    means = gaps.mean(axis=0)
    value = float(np.sqrt(np.maximum(means**2 - noise, 0.0)).sum())
    interval = Interval(
        value=value,
        low=min(max(0.0, *(i.low for i in strict)), value),
        high=max(value, *(i.high for i in usual)),
        num_prompts=num,
        seed=how.seed,
        confidence=how.confidence,
    )
    over = float(means.sum()) < 0
    words = (
        f"answers are right {value:.2f} {'less' if over else 'more'} often "
        "than the policy's agreement with itself says"
    )
    return Found(interval, words)


def _too_few(num_samples: int) -> str:
    return f"{num_samples} samples per prompt"


def _gaps(answers: npt.NDArray[np.integer], successes: npt.NDArray[np.bool_]) -> Floats:
    """[P, BINS] mean over samples of (right − said), by the bin chosen on the other half."""
    num, n = answers.shape
    half = np.arange(n) % 2 == 0
    out = np.zeros((num, BINS))
    for row, right, gaps in zip(answers, successes, out, strict=True):
        for here in (half, ~half):
            size = int(here.sum())
            inside = np.bincount(row[here], minlength=n)
            elsewhere = np.bincount(row[~here], minlength=n) / (n - size)
            said = (inside[row[here]] - 1) / max(size - 1, 1)
            bins = np.minimum((elsewhere[row[here]] * BINS).astype(np.int64), BINS - 1)
            gaps += np.bincount(bins, right[here] - said, minlength=BINS) / n
    return out
