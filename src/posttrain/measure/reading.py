"""What every probe gives: a number, its interval, and one sentence that says what it means.

samples ──metric──▶ Reading ──name, value, bounds──▶ rules, gates, tables

Names are those of registered metrics: see registry.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import Interval
from posttrain.measure.registry import Metric, find_metric

FEWEST = 5
"""Prompts from which on a task set can carry a finding. Below it no resampling of prompts tells
how much they differ: the commands refuse, and a table warns."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A probe's number with a two-sided interval of the stated ``confidence``.

    ``low`` <= ``value`` <= ``high``. An infinite value is a finding too: no group size suffices,
    no crossover was seen. ``units`` are the prompts behind the number and ``samples`` the samples
    per prompt. ``words`` is one plain sentence.

    Raises:
        ConfigError: a name that no metric has, NaN, or bounds on the wrong side.

    Example:
        >>> r = Reading("pass@1", "sums", 0.5, 0.4, 0.6, 32, 64, "half of all tries succeed")
        >>> r.metric.better, r.confidence
        (<Better.HIGHER: 'higher is better'>, 0.95)
    """

    name: str
    task: str
    value: float
    low: float
    high: float
    units: int
    samples: int
    words: str
    confidence: float = 0.95

    def __post_init__(self) -> None:
        find_metric(self.name)
        if not self.low <= self.value <= self.high:
            raise ConfigError(
                f"{self.name} on {self.task}: {self.value} in [{self.low}, {self.high}]",
                expected="numbers with low <= value <= high",
            )

    @property
    def metric(self) -> Metric:
        """What the name stands for."""
        return find_metric(self.name).metric

    def interval(self, *, seed: int = 0) -> Interval:
        """The number and its bounds alone."""
        return Interval(
            value=self.value,
            low=self.low,
            high=self.high,
            num_prompts=self.units,
            seed=seed,
            confidence=self.confidence,
        )

    @property
    def is_certain(self) -> bool:
        """True when the interval is a point: something counted, not estimated."""
        return self.low == self.high


def reading(
    name: str, task: str, interval: Interval, *, samples: int, words: str, scale: float = 1.0
) -> Reading:
    """A reading from an interval over prompts, in another unit when ``scale`` is not 1.

    Example:
        >>> i = Interval(value=.5, low=.4, high=.6, num_prompts=8, seed=0, confidence=.9)
        >>> reading("pass@1", "sums", i, samples=4, words="half").confidence
        0.9
    """
    return Reading(
        name,
        task,
        interval.value * scale,
        interval.low * scale,
        interval.high * scale,
        interval.num_prompts,
        samples,
        words,
        interval.confidence,
    )


def number_words(value: float, *, digits: int = 2) -> str:
    """A number as people read it; infinity as such.

    Example:
        >>> number_words(0.125), number_words(math.inf)
        ('0.12', 'none')
    """
    return "none" if math.isinf(value) else f"{value:.{digits}f}"
