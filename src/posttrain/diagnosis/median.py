"""A median over prompts with an exact interval, also when each prompt's value is uncertain itself.

per-prompt (low, value, high) [P] ──order statistics──▶ (median, low, high)

A mean of log-probabilities is dominated by its most extreme prompt, a median is not; and its
interval needs no assumption about how prompts differ. Shape legend: ``P`` prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MedianInterval:
    """The median over the distribution of prompts. Bounds may be infinite."""

    value: float
    low: float
    high: float
    num_prompts: int
    confidence: float


def median_interval(
    values: npt.ArrayLike,
    *,
    lows: npt.ArrayLike | None = None,
    highs: npt.ArrayLike | None = None,
    tail: float = 0.0,
    confidence: float = 0.95,
) -> MedianInterval:
    """Interval of the median over the prompts that the P prompts were drawn from.

    Let m be that median. A prompt's value exceeds m with probability 1/2 at most, and its lower
    bound exceeds its value with probability ``tail`` at most, so its lower bound exceeds m with
    1/2 + tail at most. The k-th smallest lower bound exceeds m only if P − k + 1 of them do. The
    greatest k for which the binomial probability of that is small enough gives ``low``; ``high``
    likewise. (An inverted sign test; the step for uncertain values is ours.) With too few prompts
    no k exists and the bound is infinite: below 6 prompts at 95 %.

    Args:
        values: [P].
        lows: [P] lower bounds, each wrong with probability ``tail`` at most. None: the values.
        highs: [P] upper bounds, likewise.
        tail: probability that a single bound is wrong.
        confidence: of the interval, both sides together.

    Example:
        >>> median_interval([1, 2, 3, 4, 5, 6, 7])
        MedianInterval(value=4.0, low=1.0, high=7.0, num_prompts=7, confidence=0.95)
    """
    x = np.sort(np.asarray(values, np.float64))
    low = x if lows is None else np.sort(np.asarray(lows, np.float64))
    high = x if highs is None else np.sort(np.asarray(highs, np.float64))
    num = len(x)
    if x.ndim != 1 or not num or len(low) != num or len(high) != num or np.isnan(x).any():
        raise ConfigError(
            f"a median of {x.shape} values with {low.shape} lower and {high.shape} upper bounds",
            expected="one of each per prompt, and at least one prompt",
        )
    if not 0.5 < confidence < 1 or not 0 <= tail < 0.5:
        raise ConfigError(
            f"a median at confidence {confidence} with bounds wrong at {tail}",
            expected="0.5 < confidence < 1 and 0 <= tail < 0.5",
        )
    rank = _rank(num, 0.5 + tail, allowed=(1 - confidence) / 2)
    value = middle(x)
    return MedianInterval(
        value=value,
        low=min(float(low[rank - 1]), value) if rank else -math.inf,
        high=max(float(high[num - rank]), value) if rank else math.inf,
        num_prompts=num,
        confidence=confidence,
    )


def middle(ordered: npt.NDArray[np.float64]) -> float:
    """The median of sorted values; of two middle ones, their mean, or the infinite one."""
    num = len(ordered)
    below, above = float(ordered[(num - 1) // 2]), float(ordered[num // 2])
    return below if below == above else (below + above) / 2


def _rank(num: int, p: float, *, allowed: float) -> int:
    """Greatest k with P(Bin(num, p) >= num − k + 1) <= allowed; 0 when there is none."""
    tail, rank = 0.0, 0
    for k in range(1, num + 1):
        hits = num - k + 1
        log_choose = math.lgamma(num + 1) - math.lgamma(hits + 1) - math.lgamma(num - hits + 1)
        tail += math.exp(log_choose + hits * math.log(p) + (num - hits) * math.log1p(-p))
        if tail > allowed:
            break
        rank = k
    return rank
