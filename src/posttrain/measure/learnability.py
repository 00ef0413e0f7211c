"""Whether a policy's own samples can teach it: where groups differ, and how large they must be.

counts [P] ──▶ all_wrong, all_right, band_share     shares of prompts, exact
           └─▶ informative@g, needed_group          expected share of groups with a signal

Shape legend: ``P`` prompts, ``n`` samples per prompt, ``G`` samples of a group.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import (
    Floats,
    mean_interval,
    mean_intervals,
    proportion_interval,
)
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.passk import pass_at_k, pass_hat_k
from posttrain.measure.reading import Reading, reading
from posttrain.measure.support import Label, labels

BAND = (0.2, 0.8)
"""Success rates at which groups differ most of the time (arXiv 2605.26606 keeps these)."""
NEEDED = 0.5
"""Share of informative groups that ``needed_group`` asks for by default."""

_SUPPORT_WORDS = {
    Label.IN: ("in_share", "in reach"),
    Label.OUT: ("out_share", "out of reach"),
    Label.UNDETERMINED: ("undetermined_share", "not decided by so few samples"),
}


def zero_variance(task: TaskMeasurement, *, confidence: float = 0.95) -> tuple[Reading, ...]:
    """all_wrong, all_right and band_share: what the samples of a prompt look like.

    Each is a share of prompts with a property of their n observed samples, so the exact interval
    for a share holds. All of them depend on n: a prompt of rate 0.01 is all wrong in half of the
    looks at 64 samples. That is what ``out_share`` is careful about.
    """
    n, counts = task.num_samples, task.counts
    low, high = BAND
    kinds = (
        ("all_wrong", counts == 0, f"never solved in {n} tries"),
        ("all_right", counts == n, f"solved in all of {n} tries"),
        (
            "band_share",
            (counts >= low * n) & (counts <= high * n),
            "solved in a fifth to four fifths of tries",
        ),
    )
    return tuple(
        _share(task, name, mask, f"of prompts are {words}", confidence=confidence)
        for name, mask, words in kinds
    )


def support_shares(
    task: TaskMeasurement, *, epsilon: float, confidence: float = 0.95
) -> tuple[Reading, ...]:
    """in_share, out_share and undetermined_share: prompts by label, with exact intervals.

    They are shares of labels, so they too depend on n, through ``undetermined``. The bounds of
    the labels and of the shares have the same confidence.
    """
    found = np.array(labels(task, epsilon=epsilon, confidence=confidence), object)
    return tuple(
        _share(task, name, found == label, f"of prompts are {words}", confidence=confidence)
        for label, (name, words) in _SUPPORT_WORDS.items()
    )


def _share(
    task: TaskMeasurement,
    name: str,
    mask: npt.NDArray[np.bool_],
    words: str,
    *,
    confidence: float,
) -> Reading:
    interval = proportion_interval(int(mask.sum()), len(mask), confidence=confidence)
    said = f"{interval.value:.0%} {words}"
    return reading(name, task.taskset, interval, samples=task.num_samples, words=said)


def informative_at(counts: npt.ArrayLike, num_samples: int, group: int) -> Floats:
    """[P] unbiased probability that ``group`` samples hold a success and a failure.

    1 − C(c, G)/C(n, G) − C(n − c, G)/C(n, G), whose expectation is 1 − p^G − (1 − p)^G. Only such
    groups have an advantage that is not zero (arXiv 2503.14476).

    Raises:
        ConfigError: a group outside 1 to n.

    Example:
        >>> informative_at([0, 1, 2], 2, 2).tolist()
        [0.0, 1.0, 0.0]
    """
    alike = pass_hat_k(counts, num_samples, group)
    return np.asarray(np.clip(pass_at_k(counts, num_samples, group) - alike, 0.0, 1.0))


def informative(
    task: TaskMeasurement, group: int, *, confidence: float = 0.95, seed: int = 0
) -> Reading:
    """informative@G with its interval over prompts.

    Raises:
        ConfigError: a group outside 1 to n.
    """
    values = informative_at(task.counts, task.num_samples, group)
    interval = mean_interval(values, confidence=confidence, seed=seed)
    words = f"{interval.value:.0%} of groups of {group} hold a success and a failure"
    return reading(
        f"informative@{group}", task.taskset, interval, samples=task.num_samples, words=words
    )


def needed_group(
    task: TaskMeasurement, *, share: float = NEEDED, confidence: float = 0.95, seed: int = 0
) -> Reading:
    """The smallest group of which a stated share is informative, averaged over prompts.

    Infinite when no group up to n reaches it; prompts that are all wrong or all right never help.
    ``low`` is the first size at which it cannot be excluded, ``high`` the first at which it is
    certain. The share rises with the group, so to miss the size, the interval at it or just
    before it has to miss: the bounds hold with the confidence of a single interval.

    Raises:
        ConfigError: a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ConfigError(f"a share of {share} informative groups", expected="0 < share < 1")
    n = task.num_samples
    sizes = sorted({2, *range(2, min(n, 32) + 1), *(round(g) for g in np.geomspace(2, n, 64))})
    sizes = [g for g in sizes if g <= n]
    columns = np.stack([informative_at(task.counts, n, g) for g in sizes], axis=1)
    rows = mean_intervals(
        columns, ranges=((0.0, 1.0),) * len(sizes), confidence=confidence, seed=seed
    )

    def first(bounds: list[float]) -> float:
        found = (float(g) for g, b in zip(sizes, bounds, strict=True) if b >= share)
        return next(found, math.inf)

    value = first([r.value for r in rows])
    words = (
        f"groups of {value:.0f} are informative in {share:.0%} of cases"
        if math.isfinite(value)
        else f"no group of up to {n} is informative in {share:.0%} of cases"
    )
    high = first([r.low for r in rows])
    low = first([r.high for r in rows])
    return Reading(
        "needed_group",
        task.taskset,
        value,
        low,
        high,
        len(task.prompts),
        n,
        words,
        confidence,
    )
