"""Calibration: when a policy gives an answer with probability q, is it right with probability q?

answers, successes [P, n] ──halves──▶ bins, confidence, outcome ──signs from other prompts──▶ error

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from posttrain.errors import ConfigError
from posttrain.probes.bootstrap import Floats, mean_interval
from posttrain.probes.measurement import TaskMeasurement
from posttrain.probes.reading import Reading, reading
from posttrain.probes.voting import answers_of

BINS = 5
"""Equal bins of confidence. A task set has tens of prompts, which do not fill the usual ten."""
FOLDS = 4
"""Groups of prompts; the sign of a bin's gap is taken from the other groups."""


def calibration_error(task: TaskMeasurement, *, confidence: float = 0.95, seed: int = 0) -> Reading:
    """Expected calibration error of the answer's probability: Σ_b share_b · |right_b − said_b|.

    The confidence of a sample is the probability of its final answer under the policy, measured
    by the share of other samples with the same answer (self-consistency). That, unlike the
    probability of a sequence, does not fall with length, and adds up over wordings.

    The usual estimate (arXiv 1706.04599) is positive for a perfectly calibrated policy, by chance,
    and no interval around it covers zero. Here three things never share a sample or a prompt:
    the first half of a prompt's samples puts an answer into its bin, the second half says how
    likely and how often right it is (then the other way round), and whether a bin is over- or
    under-confident is read off the other prompts. Each prompt then adds
    Σ_b sign_b · (right − said), whose expectation is zero for a calibrated policy, and the error
    itself once the signs are clear. While they are not, the value is too low, never too high.

    Raises:
        ConfigError: fewer than 4 samples per prompt, or a measurement without answers.
    """
    answers, n = answers_of(task), task.num_samples
    if n < 4:
        raise ConfigError(f"calibration from {n} samples per prompt", expected="at least 4")
    gaps = _gaps(answers, task.successes)
    fold = np.arange(len(gaps)) % FOLDS
    total = np.stack([gaps[fold == f].sum(axis=0) for f in range(FOLDS)])
    signs = np.sign(total.sum(axis=0) - total)  # [FOLDS, BINS], from the other prompts
    each = (signs[fold] * gaps).sum(axis=1)
    interval = mean_interval(
        np.clip(each, -1.0, 1.0), lowest=-1.0, confidence=confidence, seed=seed
    )
    over = -float(gaps.sum())
    words = (
        f"answers are right {abs(interval.value):.2f} "
        f"{'less' if over > 0 else 'more'} often than the policy's agreement with itself says"
    )
    return reading("calibration_error", task.taskset, interval, samples=n, words=words)


def _gaps(answers: npt.NDArray[np.integer], successes: npt.NDArray[np.bool_]) -> Floats:
    """[P, BINS] mean over samples of (right − said), by the bin that the other half chose."""
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
