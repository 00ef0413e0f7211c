"""What the whole pass@k curve says: breadth, crossing, and the price of sharpening.

counts [P] of one policy ──▶ cover@t
counts [P] of two        ──▶ crossover, sharpening_tax

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import (
    Floats,
    Interval,
    function_interval,
    mean_intervals,
    proportion_interval,
)
from posttrain.measure.estimators import of_task, since
from posttrain.measure.measurement import TaskMeasurement, require_same_task
from posttrain.measure.passk import check_k, pass_at_k
from posttrain.measure.registry import USUAL, Better, Estimation, Found, Topic
from posttrain.measure.support import cutoffs

LABEL_ERROR = 0.01
"""Chance of a wrong label that cover@t allows per prompt, and takes off its bounds."""
GRID = 64
"""Values of k at which two curves are compared, evenly spaced in log k."""


def cover_share(rates: npt.ArrayLike, t: float) -> float:
    """Share of prompts whose success rate is at least ``t`` (arXiv 2510.08325).

    pass@k is a mean of it over all t: of rates p, 1 − (1 − p)^k averages to the integral from 0
    to 1 of Cover@t · k (1 − t)^(k−1), so large k looks at t near 0 only.

    Example:
        >>> cover_share([0.0, 0.2, 0.5, 1.0], 0.5)
        0.5
    """
    return float((np.asarray(rates, np.float64) >= t).mean())


@of_task(
    "cover@t",
    topic=Topic.SUCCESS,
    meaning="prompts solved at a rate of t or more",
    unit="share",
    better=Better.HIGHER,
    source="2510.08325",
    usual=lambda n: (0.1, 0.5, 0.9),
)
def cover(task: TaskMeasurement, t: float, how: Estimation = USUAL) -> Found:
    """cover@t: the share of prompts that the policy solves with probability ``t`` or more.

    The value is the observed share, which is biased where rates lie near t: no estimator from n
    samples is unbiased. The bounds hold all the same. With exact binomial labels that are wrong
    with probability at most α = LABEL_ERROR, E[share labelled "t or more"] <= C + α(1 − C) for
    the true share C, and an exact lower bound L of it gives C >= (L − α) / (1 − α); likewise from
    above. Both are conservative, and widest where many rates lie near t.

    Raises:
        ConfigError: t outside (0, 1).
    """
    n, num = task.num_samples, len(task.prompts)
    most_out, fewest_in = cutoffs(n, epsilon=t, confidence=1 - LABEL_ERROR)
    above, below = int((task.counts >= fewest_in).sum()), int((task.counts <= most_out).sum())
    low = proportion_interval(above, num, confidence=how.confidence).low
    high = 1 - proportion_interval(below, num, confidence=how.confidence).low
    value = cover_share(task.counts / n, t)
    interval = Interval(
        value=value,
        low=min(max((low - LABEL_ERROR) / (1 - LABEL_ERROR), 0.0), value),
        high=max(min(high / (1 - LABEL_ERROR), 1.0), value),
        num_prompts=num,
        seed=0,
        confidence=how.confidence,
    )
    words = f"{value:.0%} of prompts are solved in at least {t:.0%} of tries"
    return Found(interval, words)


@since(
    "crossover",
    topic=Topic.CHANGE,
    meaning="smallest k at which the later policy's pass@k is below the earlier one's",
    unit="tries",
    better=Better.HIGHER,
    source="2504.13837",
)
def crossover(before: TaskMeasurement, after: TaskMeasurement, how: Estimation = USUAL) -> Found:
    """The smallest k at which the later policy's pass@k is below the earlier one's.

    Infinite when that happens at no k up to n (arXiv 2504.13837: for RL in the tens to hundreds).
    ``low`` is the first k at which it cannot be excluded, ``high`` the first at which it is
    certain, from paired intervals at up to GRID values of k. For curves that cross once these
    bounds hold together with the confidence of a single interval: to miss the crossing, the
    interval at its own k, or at the k just before, has to miss.

    Raises:
        RunError: the two were not measured on the same prompts in the same way.
    """
    require_same_task(before, after)
    n = before.num_samples
    ks = sorted({round(k) for k in np.geomspace(1, n, GRID)})
    columns = np.stack(
        [pass_at_k(after.counts, n, k) - pass_at_k(before.counts, n, k) for k in ks], axis=1
    )
    rows = mean_intervals(
        columns, ranges=((-1.0, 1.0),) * len(ks), confidence=how.confidence, seed=how.seed
    )

    def first(below: list[bool]) -> float:
        return next((float(k) for k, is_below in zip(ks, below, strict=True) if is_below), math.inf)

    value = first([r.value < 0 for r in rows])
    high = first([r.high < 0 for r in rows])
    words = (
        f"the later policy is not seen to fall behind within {n} tries"
        if math.isinf(value)
        else f"from {value:.0f} tries on the earlier policy succeeds more often"
        + ("" if math.isfinite(high) else ", but that is not certain")
    )
    interval = Interval(
        value=value,
        low=first([r.low < 0 for r in rows]),
        high=high,
        num_prompts=len(before.prompts),
        seed=how.seed,
        confidence=how.confidence,
    )
    return Found(interval, words)


@since(
    "sharpening_tax",
    topic=Topic.CHANGE,
    meaning="how much less a further try helps the later policy, in shares of failures",
    unit="share",
    better=Better.LOWER,
    source="2610.01509",
)
def sharpening_tax(
    before: TaskMeasurement,
    after: TaskMeasurement,
    how: Estimation = USUAL,
    *,
    k: int | None = None,
) -> Found:
    """How much less a further try helps after training (arXiv 2610.01509).

    A(K) = Σ_k<K [pass@K − pass@k] is the expected number of failed tries before a success within
    K, S = A / ((K − 1)(1 − pass@1)) its share of the most that it could be, and the tax is
    S before − S after, with a paired bootstrap over prompts. A policy that never fails has S = 0.

    Raises:
        ConfigError: K below 2 or above n.
        RunError: the two were not measured on the same prompts in the same way.
    """
    require_same_task(before, after)
    n = before.num_samples
    k = n if k is None else k
    if k < 2:
        raise ConfigError(f"a sharpening tax over {k} try", expected="at least two tries")
    columns = [before.counts, after.counts]
    values = [failed_tries(n, k)[c] / (k - 1) for c in columns]
    values += [1 - pass_at_k(c, n, 1) for c in columns]

    def tax(means: Floats) -> Floats:
        helped, failed = means[:, :2], means[:, 2:]
        share = np.divide(helped, failed, out=np.zeros_like(helped), where=failed > 0)
        return np.asarray(share[:, 0] - share[:, 1])

    columns_PD = np.stack(values, axis=1)
    interval = function_interval(
        columns_PD,
        tax,
        bounds=(-1.0, 1.0),
        extremes=_tax_extremes(columns_PD.mean(axis=0)),
        confidence=how.confidence,
        seed=how.seed,
    )
    words = (
        f"a further try after a failure helps {abs(interval.value):.2f} "
        f"{'less' if interval.value >= 0 else 'more'} than before"
    )
    return Found(interval, words)


def _tax_extremes(means: Floats) -> tuple[float, float]:
    """Least and greatest influence of a prompt on the tax.

    On S = mean a / mean f it is (a − S f) / mean f, and 0 <= a <= f <= 1: from −S to 1 − S over
    mean f. Where nothing failed, a prompt that does could have any influence.
    """
    ends = []
    for helped, failed in zip(means[:2], means[2:], strict=True):
        share = float(helped / failed) if failed > 0 else 0.0
        room = max(float(failed), 1e-6)
        ends.append((-share / room, (1 - share) / room))
    (low0, high0), (low1, high1) = ends
    return low0 - high1, high0 - low1


def failed_tries(num_samples: int, k: int) -> Floats:
    """[n + 1] A(k) by number of successes c: Σ_j<k [pass@k − pass@j], without bias.

    Example:
        >>> failed_tries(2, 2).tolist()  # c = 1: pass@2 = 1 and pass@1 = 1/2
        [0.0, 0.5, 0.0]
    """
    n = num_samples
    check_k(n, k)
    failures = n - np.arange(n + 1.0)
    fail, total = np.ones(n + 1), np.zeros(n + 1)
    for j in range(1, k + 1):  # fail: the probability that j of the n all fail
        fail = fail * np.maximum(failures - j + 1, 0.0) / (n - j + 1)
        total += fail
    return np.asarray(total - k * fail)  # Σ_j<k [fail@j − fail@k]
