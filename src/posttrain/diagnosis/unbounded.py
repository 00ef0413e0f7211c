"""Intervals of means and ratios of unbounded values: nats, perplexities, errors.

per-prompt (part, whole) [P] ──bootstrap-t over prompts──▶ Interval

:mod:`posttrain.measure.bootstrap` can fall back on the range of its values; here there is none, so
no interval is valid for every distribution. Shape legend: ``P`` prompts, ``B`` resamples.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import Interval, student_quantile

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
SAME = 1e-12


def mean_of(values: npt.ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of [P] values: :func:`ratio_of` with ones.

    Example:
        >>> i = mean_of([0.0, 1.0, 2.0, 1.0, 0.5, 1.5])
        >>> i.value, 0.1 < i.low < 0.6, 1.4 < i.high < 1.9
        (1.0, True, True)
    """
    x = np.asarray(values, np.float64)
    return ratio_of(x, np.ones_like(x), confidence=confidence, seed=seed)


def ratio_of(
    part: npt.ArrayLike, whole: npt.ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of Σ part / Σ whole over prompts, both [P] and resampled together.

    Bootstrap-t: in each resample the deviation of the ratio is divided by its own standard error,
    and its quantiles replace Student's; the interval is at least Student's. Simulated with 5 to 32
    prompts, the nominal 95 % covers 92-96 % for exponential values and 87-94 % for log-normal ones
    (σ = 1), where Student's covers 78-92 % and 82-90 %. Long tails that no prompt shows are not
    covered.

    A single prompt gives an infinite interval; equal values a point, which is right only where
    values cannot differ (a policy against itself). With an infinite part the value and both ends
    are infinite.

    Raises:
        ConfigError: no prompts, NaN, or a ``whole`` that is not positive in sum.
    """
    a, b = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size or np.isnan(a).any() or not b.sum() > 0:
        raise ConfigError(
            f"a ratio of {a.shape} to {b.shape} values, the latter with sum {b.sum()}",
            expected="equal shapes [P], numbers, and a positive sum",
        )
    num, value = len(a), float(a.sum() / b.sum())
    low = high = value
    if num == 1:
        low, high = -math.inf, math.inf
    elif math.isfinite(value):
        rest = a - value * b
        error = float(rest.std(ddof=1)) / (float(b.mean()) * math.sqrt(num))
        if error > SAME * max(abs(value), 1e-300):
            usual = student_quantile((1 + confidence) / 2, degrees=num - 1)
            lowest, highest = _pivots(
                a, b, value=value, error=error, tail=1 - confidence, seed=seed
            )
            low = value - max(highest, usual) * error
            high = value - min(lowest, -usual) * error
    return Interval(
        value=value, low=low, high=high, num_prompts=num, seed=seed, confidence=confidence
    )


def _pivots(
    a: Floats, b: Floats, *, value: float, error: float, tail: float, seed: int
) -> tuple[float, float]:
    """Quantiles of (ratio* − ratio) / standard error* over resamples of the prompts."""
    num = len(a)
    drawn = np.random.default_rng(seed).integers(num, size=(RESAMPLES, num))
    some, wholes = a[drawn], b[drawn]
    usable = wholes.sum(axis=1) > SAME
    some, wholes = some[usable], wholes[usable]
    ratios = some.sum(axis=1) / wholes.sum(axis=1)
    rest = some - ratios[:, None] * wholes
    errors = rest.std(axis=1, ddof=1) / (wholes.mean(axis=1) * math.sqrt(num))
    spread = errors > 1e-9 * error  # resamples of a single repeated prompt carry no information
    pivots = (ratios[spread] - value) / errors[spread]
    if not len(pivots):
        return -math.inf, math.inf
    lowest, highest = np.quantile(pivots, [tail / 2, 1 - tail / 2])
    return float(lowest), float(highest)
