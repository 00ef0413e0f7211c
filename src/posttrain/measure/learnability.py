"""Whether a policy's own samples can teach it: where groups differ, and how large they must be.

counts [P] ──▶ band_share, in_share, …                          shares of prompts, exact
           └─▶ informative@g, zero_variance@g, needed_group     expected share of groups

Shape legend: ``P`` prompts, ``n`` samples per prompt, ``G`` samples of a group.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import (
    Floats,
    Interval,
    mean_intervals,
    proportion_interval,
)
from posttrain.measure.estimators import of_task, per_prompt, since
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.passk import pass_at_k, pass_hat_k
from posttrain.measure.registry import USUAL, Better, Estimation, Found, Topic
from posttrain.measure.support import Label, SupportChange, labels, support_change

BAND = (0.2, 0.8)
"""Success rates at which groups differ most of the time (arXiv 2605.26606 keeps these)."""
NEEDED = 0.5
"""Share of informative groups that ``needed_group`` asks for by default."""

# --- shares of prompts -----------------------------------------------------------------------


@of_task(
    "band_share",
    topic=Topic.SIGNAL,
    meaning="prompts with a success rate from 0.2 to 0.8",
    unit="share",
    better=Better.HIGHER,
    source="2605.26606",
)
def _band_share(task: TaskMeasurement, how: Estimation) -> Found:
    n, counts, (low, high) = task.num_samples, task.counts, BAND
    inside = (counts >= low * n) & (counts <= high * n)
    return _share(inside, "solved in a fifth to four fifths of tries", how)


@of_task(
    "in_share",
    topic=Topic.SUPPORT,
    meaning="prompts in reach",
    unit="share",
    better=Better.HIGHER,
    source="2507.14843",
)
def _in_share(task: TaskMeasurement, how: Estimation) -> Found:
    return _share(_labelled(task, Label.IN, how), "in reach", how)


@of_task(
    "out_share",
    topic=Topic.SUPPORT,
    meaning="prompts out of reach",
    unit="share",
    better=Better.LOWER,
    source="2507.14843",
)
def _out_share(task: TaskMeasurement, how: Estimation) -> Found:
    return _share(_labelled(task, Label.OUT, how), "out of reach", how)


@of_task(
    "undetermined_share",
    topic=Topic.SUPPORT,
    meaning="prompts with too few samples to say",
    unit="share",
    better=Better.NEITHER,
    source="2507.14843",
)
def _undetermined_share(task: TaskMeasurement, how: Estimation) -> Found:
    return _share(_labelled(task, Label.UNDETERMINED, how), "not decided by so few samples", how)


@since(
    "expanded_share",
    topic=Topic.CHANGE,
    meaning="prompts that came into reach",
    unit="share",
    better=Better.HIGHER,
    source="2507.14843",
)
def _expanded_share(before: TaskMeasurement, after: TaskMeasurement, how: Estimation) -> Found:
    change = support_change(before, after, epsilon=how.epsilon, confidence=how.confidence)
    return _crossed(change.expanded, change, f"came from {Label.OUT} to {Label.IN}", how)


@since(
    "shrunk_share",
    topic=Topic.CHANGE,
    meaning="prompts that went out of reach",
    unit="share",
    better=Better.LOWER,
    source="2507.14843",
    phrase="the share of prompts that went out of reach",
)
def _shrunk_share(before: TaskMeasurement, after: TaskMeasurement, how: Estimation) -> Found:
    change = support_change(before, after, epsilon=how.epsilon, confidence=how.confidence)
    return _crossed(change.shrunk, change, f"went from {Label.IN} to {Label.OUT}", how)


def _crossed(count: int, change: SupportChange, words: str, how: Estimation) -> Found:
    """A share of prompts whose label crossed over, exact."""
    num = len(change.before)
    interval = proportion_interval(count, num, confidence=how.confidence)
    return Found(interval, f"{count} of {num} prompts {words}")


def _labelled(task: TaskMeasurement, label: Label, how: Estimation) -> npt.NDArray[np.bool_]:
    """[P] True for prompts with this label. Labels and their share have the same confidence."""
    found = labels(task, epsilon=how.epsilon, confidence=how.confidence)
    return np.array([x is label for x in found])


def _share(mask: npt.NDArray[np.bool_], words: str, how: Estimation) -> Found:
    """A share of prompts with a property of their n samples. Exact, and dependent on n."""
    interval = proportion_interval(int(mask.sum()), len(mask), confidence=how.confidence)
    return Found(interval, f"{interval.value:.0%} of prompts are {words}")


# --- groups ----------------------------------------------------------------------------------


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


@per_prompt(
    "informative@g",
    topic=Topic.SIGNAL,
    meaning="a group of g samples holds a success and a failure",
    unit="probability",
    better=Better.HIGHER,
    source="2503.14476",
    usual=lambda n: (4, 8, 16),
    sentence=lambda value, g, task: (
        f"{value:.0%} of groups of {g:.0f} hold a success and a failure"
    ),
    phrase=lambda g: f"the share of groups of {g:.0f} with a success and a failure",
    overview=("informative@8", "groups of 8"),
)
def _informative(task: TaskMeasurement, group: int) -> Floats:
    return informative_at(task.counts, task.num_samples, group)


@per_prompt(
    "zero_variance@g",
    topic=Topic.SIGNAL,
    meaning="a group of g is all right or all wrong, and teaches nothing by comparison",
    unit="probability",
    better=Better.LOWER,
    source="2503.14476",
    sentence=lambda value, g, task: f"{value:.0%} of groups of {g:.0f} teach nothing by comparison",
)
def _zero_variance(task: TaskMeasurement, group: int) -> Floats:
    counts, n = task.counts, task.num_samples
    return 1 - pass_at_k(counts, n, group) + pass_hat_k(counts, n, group)


@of_task(
    "needed_group",
    topic=Topic.SIGNAL,
    meaning="group size at which the stated share of groups is informative",
    unit="samples",
    better=Better.LOWER,
    source="arithmetic",
)
def needed_group(task: TaskMeasurement, how: Estimation = USUAL, *, share: float = NEEDED) -> Found:
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
        columns, ranges=((0.0, 1.0),) * len(sizes), confidence=how.confidence, seed=how.seed
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
    interval = Interval(
        value=value,
        low=first([r.high for r in rows]),
        high=first([r.low for r in rows]),
        num_prompts=len(task.prompts),
        seed=how.seed,
        confidence=how.confidence,
    )
    return Found(interval, words)
