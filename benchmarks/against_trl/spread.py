"""Ratios of paired times, with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from against_trl.plan import MIN_PAIRS, Bar


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, quartiles and extremes of a few numbers."""

    median: float
    lower: float
    upper: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise; quartiles are interpolated linearly.

        Raises:
            ValueError: no values.

        Example:
            >>> Spread.of([4.0, 1.0, 2.0])
            Spread(median=2.0, lower=1.5, upper=3.0, low=1.0, high=4.0, count=3)
        """
        if not len(values):
            raise ValueError("a spread of no values")
        cut = [float(q) for q in np.quantile(np.asarray(values, float), [0.5, 0.25, 0.75, 0, 1])]
        return cls(*cut, count=len(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Pair by pair: what stood side by side in time is divided by each other.

    Raises:
        ValueError: of unequal length.

    Example:
        >>> ratios([6.0, 8.0], [2.0, 4.0])
        [3.0, 2.0]
    """
    return [a / b for a, b in zip(above, below, strict=True)]


def verdict(spread: Spread, bar: Bar) -> str:
    """Whether a median reaches its bar. Too few pairs decide nothing.

    Example:
        >>> verdict(Spread.of([4.0] * 5), Bar(least=3, hope=5))
        'met'
        >>> verdict(Spread.of([6.0]), Bar(least=3, hope=5))
        'too few pairs'
    """
    if spread.count < MIN_PAIRS:
        return "too few pairs"
    return judge(spread.median, bar)


def judge(value: float, bar: Bar) -> str:
    """Whether one number reaches a bar.

    Example:
        >>> judge(0.3, Bar(least=0.5, hope=0.35, most=True)), judge(2.0, Bar(least=3, hope=5))
        ('hoped for', 'not met')
    """
    if bar.most:
        return "hoped for" if value <= bar.hope else "met" if value <= bar.least else "not met"
    return "hoped for" if value >= bar.hope else "met" if value >= bar.least else "not met"
