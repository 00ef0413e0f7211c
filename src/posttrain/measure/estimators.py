"""How numbers come from samples, and the decorators that register them under a name.

@per_prompt  values [P], one per prompt: their mean, and its paired change since another policy
@ratio       sums [P] over sums [P]: their quotient over all prompts, and its change
@of_task     a number of the task set as a whole
@since       what changed since an earlier policy

Every interval is over prompts (bootstrap.py). Shape legend: ``P`` prompts, ``n`` samples per
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, Unpack, final

import numpy as np

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import (
    Floats,
    Interval,
    function_interval,
    mean_interval,
    proportion_interval,
    ratio_interval,
)
from posttrain.measure.measurement import TaskMeasurement, require_same_task
from posttrain.measure.registry import Estimation, Found, Metric, MetricFields, register

Tasks = Sequence[TaskMeasurement]
Limits = Callable[[Floats, Tasks], tuple[float, float]]
Sentence = Callable[[float, float, TaskMeasurement], str]
"""From the value, the number in the name, and the measurement."""


def unit_range(values: Floats, tasks: Tasks) -> tuple[float, float]:
    """0 to 1, whatever the samples are."""
    return 0.0, 1.0


def seen_range(values: Floats, tasks: Tasks) -> tuple[float, float]:
    """For a quantity without natural bounds: what was seen, and 0.

    An interval then says nothing of rarer extremes.
    """
    return min(0.0, float(values.min())), max(0.0, float(values.max()))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PerPrompt:
    """The mean over prompts of a value per prompt, unbiased for its prompt."""

    values: Callable[[TaskMeasurement, float], Floats]  # [P]
    limits: Limits
    sentence: Sentence
    share_at_n: bool  # at k = n each prompt says yes or no: the exact interval of a share holds
    looks_back: bool = False
    pairs: bool = True

    def read(
        self, now: TaskMeasurement, since: TaskMeasurement | None, k: float, how: Estimation
    ) -> Found:
        """The mean with its interval."""
        values = self.values(now, k)
        if self.share_at_n and k == now.num_samples:
            interval = proportion_interval(
                round(float(values.sum())), len(values), confidence=how.confidence
            )
        else:
            interval = self._mean(values, self.limits(values, (now,)), how)
        return Found(interval, self.sentence(interval.value, k, now))

    def change(
        self, now: TaskMeasurement, since: TaskMeasurement, k: float, how: Estimation
    ) -> Interval:
        """The mean of the differences, prompt by prompt."""
        require_same_task(since, now)
        old, new = self.values(since, k), self.values(now, k)
        low, high = self.limits(np.concatenate([new, old]), (since, now))
        return self._mean(new - old, (low - high, high - low), how)

    def _mean(self, values: Floats, limits: tuple[float, float], how: Estimation) -> Interval:
        low, high = limits
        return mean_interval(
            values,
            lowest=low,
            highest=high if high > low else low + 1e-12,  # nothing but zeros were seen
            confidence=how.confidence,
            seed=how.seed,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A sum over all prompts divided by another."""

    sums: Callable[[TaskMeasurement], tuple[Floats, Floats]]  # part [P], whole [P]
    limits: Callable[[TaskMeasurement], tuple[float, float]]  # of the ratio of a prompt
    sentence: Sentence
    looks_back: bool = False
    pairs: bool = True

    def read(
        self, now: TaskMeasurement, since: TaskMeasurement | None, k: float, how: Estimation
    ) -> Found:
        """The ratio with its interval."""
        part, whole = self.sums(now)
        interval = ratio_interval(
            part, whole, confidence=how.confidence, seed=how.seed, limits=self.limits(now)
        )
        return Found(interval, self.sentence(interval.value, k, now))

    def change(
        self, now: TaskMeasurement, since: TaskMeasurement, k: float, how: Estimation
    ) -> Interval:
        """Ratio now minus ratio before, prompts resampled together.

        A prompt has at most the influence limits allow: (limit − ratio) · whole / mean whole.
        """
        require_same_task(since, now)
        columns: list[Floats] = []
        ends = []
        for task in (since, now):
            part, whole = self.sums(task)
            columns += [part, whole]
            ratio = float(part.sum() / whole.sum())
            weight = float(whole.max() / whole.mean())
            ends.append([(limit - ratio) * weight for limit in self.limits(task)])
        (old_low, old_high), (new_low, new_high) = ends
        return function_interval(
            np.stack(columns, axis=1),
            lambda m: np.asarray(_quotient(m[:, 2:]) - _quotient(m[:, :2])),
            bounds=(-math.inf, math.inf),
            extremes=(new_low - old_high, new_high - old_low),
            confidence=how.confidence,
            seed=how.seed,
        )


def _quotient(pairs: Floats) -> Floats:
    part, whole = pairs.T
    return np.asarray(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OfTask:
    """A number of the task set as a whole."""

    number: Callable[[TaskMeasurement, float, Estimation], Found]
    looks_back: bool = False
    pairs: bool = False

    def read(
        self, now: TaskMeasurement, since: TaskMeasurement | None, k: float, how: Estimation
    ) -> Found:
        """The number."""
        return self.number(now, k, how)

    def change(
        self, now: TaskMeasurement, since: TaskMeasurement, k: float, how: Estimation
    ) -> Interval:
        """Never."""
        raise ConfigError("a change of what has no number per prompt to pair")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """What changed from an earlier policy to a later one; None when nothing can be told."""

    number: Callable[[TaskMeasurement, TaskMeasurement, Estimation], Found | None]
    looks_back: bool = True
    pairs: bool = False

    def read(
        self, now: TaskMeasurement, since: TaskMeasurement | None, k: float, how: Estimation
    ) -> Found | None:
        """The change.

        Raises:
            ConfigError: there is no earlier policy.
        """
        if since is None:
            raise ConfigError("a change since no policy", expected="an earlier measurement")
        return self.number(since, now, how)

    def change(
        self, now: TaskMeasurement, since: TaskMeasurement, k: float, how: Estimation
    ) -> Interval:
        """Never."""
        raise ConfigError("a change of what is a change already")


# --- the decorators --------------------------------------------------------------------------

Values = TypeVar("Values", bound=Callable[..., Floats])
Numbers = TypeVar("Numbers", bound=Callable[..., Found | None])


def per_prompt(
    name: str,
    *,
    sentence: Sentence,
    limits: Limits = unit_range,
    share_at_n: bool = False,
    **about: Unpack[MetricFields],
) -> Callable[[Values], Values]:
    """Register a function (task) or (task, k) that gives one value per prompt, [P]."""
    numbered = "@" in name or "^" in name

    def decorate(values: Values) -> Values:
        def of(task: TaskMeasurement, k: float) -> Floats:
            return np.asarray(values(task, int(k)) if numbered else values(task))

        estimator = PerPrompt(values=of, limits=limits, sentence=sentence, share_at_n=share_at_n)
        register(Metric(name=name, estimator=estimator, **about))
        return values

    return decorate


def ratio(
    name: str,
    *,
    sentence: Sentence,
    limits: Callable[[TaskMeasurement], tuple[float, float]],
    **about: Unpack[MetricFields],
) -> Callable[
    [Callable[[TaskMeasurement], tuple[Floats, Floats]]],
    Callable[[TaskMeasurement], tuple[Floats, Floats]],
]:
    """Register a function (task) that gives what is summed above and below, [P] each."""

    def decorate(
        sums: Callable[[TaskMeasurement], tuple[Floats, Floats]],
    ) -> Callable[[TaskMeasurement], tuple[Floats, Floats]]:
        estimator = Ratio(sums=sums, limits=limits, sentence=sentence)
        register(Metric(name=name, estimator=estimator, **about))
        return sums

    return decorate


def of_task(name: str, **about: Unpack[MetricFields]) -> Callable[[Numbers], Numbers]:
    """Register a function (task, how) or (task, k, how) that gives a number."""
    numbered = "@" in name or "^" in name

    def decorate(number: Numbers) -> Numbers:
        def of(task: TaskMeasurement, k: float, how: Estimation) -> Found:
            found = number(task, k, how) if numbered else number(task, how)
            assert found is not None
            return found

        register(Metric(name=name, estimator=OfTask(number=of), **about))
        return number

    return decorate


def since(name: str, **about: Unpack[MetricFields]) -> Callable[[Numbers], Numbers]:
    """Register a function (before, after, how) that gives what changed, or None."""

    def decorate(number: Numbers) -> Numbers:
        register(Metric(name=name, estimator=Since(number=number), **about))
        return number

    return decorate
