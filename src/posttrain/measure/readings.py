"""Readings: everything that can be read off samples alone, of one policy or since an earlier one.

TaskMeasurement ──take──▶ Readings of one policy
two of them ──take_change──▶ Readings of what changed
a name ──read──▶ one of them
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import proportion_interval
from posttrain.measure.measurement import Measurement, TaskMeasurement, require_same_task
from posttrain.measure.reading import FEWEST, Reading, reading
from posttrain.measure.registry import USUAL, Estimation, Found, Metric, find_metric, metrics


def require_prompts(measurement: Measurement) -> None:
    """Refuse task sets with too few prompts to say how much prompts differ.

    The probes themselves answer for any number of prompts, with intervals that are wide for few.
    Commands that draw conclusions ask here first.

    Raises:
        ConfigError: names the task sets.
    """
    few = [f"{t.taskset} ({len(t.prompts)})" for t in measurement.tasks if len(t.prompts) < FEWEST]
    if few:
        raise ConfigError(
            f"{measurement.policy}: too few prompts to judge by: {', '.join(few)}",
            expected=f"at least {FEWEST} held-out prompts per task set, better 32",
            fix="raise held_out of these task sets, or leave them out with --tasks",
        )


def take(task: TaskMeasurement, how: Estimation = USUAL) -> tuple[Reading, ...]:
    """Every routine reading of one policy on one task set that its samples allow.

    Those whose metric needs what the measurement lacks are left out; :func:`not_taken` says which
    and why.
    """
    return tuple(
        found
        for metric in metrics()
        if metric.can_be_asked and not metric.looks_back
        for k in metric.routine_numbers(task.num_samples)
        if metric.missing(task, k) is None
        and (found := _read(metric, k, task, None, how)) is not None
    )


def not_taken(task: TaskMeasurement) -> tuple[str, ...]:
    """Why readings are missing from :func:`take`, in sentences."""
    names: dict[str, list[str]] = {}
    for metric in metrics():
        if metric.can_be_asked and not metric.looks_back:
            for k in metric.routine_numbers(task.num_samples):
                if why := metric.missing(task, k):
                    names.setdefault(why, []).append(metric.at(k))
    return tuple(f"{why}: no {', '.join(missed)}" for why, missed in names.items())


def take_change(
    before: TaskMeasurement, after: TaskMeasurement, how: Estimation = USUAL
) -> tuple[Reading, ...]:
    """Readings of what changed from an earlier policy to a later one on one task set.

    Those that cannot be told, such as ``retention`` when nothing was certainly in reach before,
    are left out.

    Raises:
        RunError: the two were not measured on the same prompts in the same way.
    """
    return tuple(
        found
        for metric in metrics()
        if metric.looks_back
        for k in metric.routine_numbers(after.num_samples)
        if all(metric.missing(side, k) is None for side in (before, after))
        and (found := _read(metric, k, after, before, how)) is not None
    )


def read(
    name: str,
    task: TaskMeasurement,
    how: Estimation = USUAL,
    *,
    since: TaskMeasurement | None = None,
) -> Reading | None:
    """One reading by name; None when there is nothing to tell it from.

    Args:
        name: of a metric that is read off samples.
        task: the policy's samples.
        how: confidence, threshold and seed.
        since: an earlier policy, for a metric that is a change itself.

    Raises:
        ConfigError: no such name, or the measurement lacks what it needs.
        RunError: the two policies were not measured in the same way.

    Example:
        >>> m = TaskMeasurement(taskset="sums", prompts=("sums/1", "sums/2"),
        ...     scores=np.array([[1, 0, 1, 1], [0, 0, 0, 0]]), success=1.0,
        ...     lengths=np.full((2, 4), 3), truncated=np.zeros((2, 4)), nll=np.ones((2, 4)),
        ...     distinct=np.array([2, 1]))
        >>> found = read("pass@1", m)
        >>> found.value, found.words
        (0.375, 'one try succeeds with probability 0.38')
    """
    asked = find_metric(name)
    return _read(asked.metric, asked.k, task, since, how)


def paired_change(
    name: str, before: TaskMeasurement, after: TaskMeasurement, how: Estimation = USUAL
) -> Reading | None:
    """After minus before of a metric, paired by prompt. The reading keeps the metric's name.

    None when a measurement lacks what it needs.

    Raises:
        ConfigError: no such name, or one without a number per prompt.
        RunError: the two were not measured on the same prompts in the same way.
    """
    asked = find_metric(name)
    metric, k = asked.metric, asked.k
    if metric.estimator is None or not metric.pairs:
        pairs = ", ".join(m.name for m in metrics() if m.pairs)
        raise ConfigError(f"the change of {name}", expected=pairs)
    require_same_task(before, after)
    if metric.missing(before, k) or metric.missing(after, k):
        return None
    interval = metric.estimator.change(after, before, k, how)
    words = f"{interval.value:+.2f} {metric.unit}"
    return reading(name, after.taskset, interval, samples=after.num_samples, words=words)


def _read(
    metric: Metric, k: float, now: TaskMeasurement, since: TaskMeasurement | None, how: Estimation
) -> Reading | None:
    if metric.estimator is None:
        raise ConfigError(
            f"{metric.name} of samples", expected="a probe with rollouts of its own, see `diagnose`"
        )
    found: Found | None = metric.estimator.read(now, since, k, how)
    if found is None:
        return None
    return reading(
        metric.at(k),
        now.taskset,
        found.interval,
        samples=now.num_samples if found.samples is None else found.samples,
        words=found.words,
    )


# --- the token budget ------------------------------------------------------------------------

ROOM = 0.5
"""An answer that takes at most this share of the token budget fits with room to spare."""


def answer_room(
    task: TaskMeasurement, known: Mapping[str, int], *, budget: int, confidence: float = 0.95
) -> Reading | None:
    """Of the prompts with a known right answer, the share whose answer fits comfortably.

    Where answers are cut off, it tells a budget that is too small from a policy that rambles. A
    policy's own right answers count as well, where it takes more room than the known one: a bare
    result says little about the way that this policy takes to get there. The interval is exact.

    Args:
        task: what the policy itself said.
        known: tokens of a right answer by prompt, its end included.
        budget: ``max_new_tokens``.
        confidence: of the two-sided interval.

    Returns:
        None when no right answer is known.
    """
    needed: dict[str, float] = dict(known)
    for key, right, lengths in zip(task.prompts, task.successes, task.lengths, strict=True):
        if key in needed and right.any():
            needed[key] = max(needed[key], float(np.median(lengths[right])))
    if not needed:
        return None
    fits = sum(length <= ROOM * budget for length in needed.values())
    interval = proportion_interval(fits, len(needed), confidence=confidence)
    words = f"{fits} of {len(needed)} known right answers take at most half of {budget} tokens"
    return reading("answer_room", task.taskset, interval, samples=task.num_samples, words=words)
