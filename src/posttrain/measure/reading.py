"""The result of every probe: a number, its interval, and one sentence on its meaning.

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
"""Fewest prompts of a task set for a finding. With fewer, resampling does not show how much prompts
differ: the commands refuse, and a table warns."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A probe's number with a two-sided interval of the stated ``confidence``.

    ``low`` <= ``value`` <= ``high``. An infinite value is valid: no group size suffices, or no
    crossover was observed. ``units`` is the number of prompts and ``samples`` the samples per
    prompt. ``words`` is one plain sentence.

    Raises:
        ConfigError: an unknown metric, NaN, or bounds on the wrong side.

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
        """The metric of that name."""
        return find_metric(self.name).metric

    def interval(self, *, seed: int = 0) -> Interval:
        """The number and its bounds."""
        return Interval(
            value=self.value,
            low=self.low,
            high=self.high,
            num_prompts=self.units,
            seed=seed,
            confidence=self.confidence,
        )


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
    """A number as text; "none" for infinity.

    Example:
        >>> number_words(0.125), number_words(math.inf)
        ('0.12', 'none')
    """
    return "none" if math.isinf(value) else f"{value:.{digits}f}"
