"""What a chain of stages kept: transfer, forgetting and hand-off over every earlier task.

Measurement of the base, after stage 1, …, after stage T
    ──▶ per task: backward_transfer, forward_transfer, forgetting, handoff
    └─▶ means over the task sets, under the task name ALL

R[s, i] is pass@1 on task set i after stage s, and stage 0 is the base. Every difference is paired
by prompt. Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from posttrain.core.errors import ConfigError, nearest
from posttrain.measure.attribution import FOLDS, attribute
from posttrain.measure.bootstrap import (
    Floats,
    Interval,
    combined_interval,
    mean_interval,
    mean_intervals,
    proportion_interval,
)
from posttrain.measure.estimators import since
from posttrain.measure.measurement import (
    Measurement,
    TaskMeasurement,
    require_comparable,
    require_same_task,
)
from posttrain.measure.reading import Reading, reading
from posttrain.measure.registry import Better, Estimation, Found, Topic, declare
from posttrain.measure.support import cutoffs

ALL = "all"
"""Task name of a mean over task sets."""

declare(
    "backward_transfer",
    topic=Topic.CHAIN,
    meaning="pass@1 at the end minus pass@1 just after the task's own stage",
    unit="probability",
    better=Better.HIGHER,
    source="1706.08840",
)
declare(
    "forward_transfer",
    topic=Topic.CHAIN,
    meaning="pass@1 before the task's own stage minus pass@1 of the base",
    unit="probability",
    better=Better.HIGHER,
    source="1706.08840",
)
declare(
    "forgetting",
    topic=Topic.CHAIN,
    meaning="best earlier pass@1 minus pass@1 at the end",
    unit="probability",
    better=Better.LOWER,
    source="1801.10112",
)
declare(
    "handoff",
    topic=Topic.CHAIN,
    meaning="prompts gained by a stage that the next stage still solves",
    unit="share",
    better=Better.HIGHER,
    source="2604.07941",
)


def transfer(
    chain: Sequence[Measurement],
    learned: Mapping[str, int],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Reading, ...]:
    """Backward transfer, forward transfer and forgetting for each task set, and their means.

    Args:
        chain: the base, then the policy after each stage, all measured in the same way.
        learned: the stage that a task set belongs to, counted from 1; 0 for what the base could
            do already.
        confidence: of the two-sided intervals.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer than two policies, a stage that the chain does not have.
        RunError: two policies were not measured in the same way.
    """
    last = len(chain) - 1
    if last < 1:
        raise ConfigError(f"a chain of {len(chain)} policy", expected="a base and what came of it")
    for later in chain[1:]:
        require_comparable(chain[0], later)
    known = [t.taskset for t in chain[0].tasks]
    found: list[Reading] = []
    for name, stage in learned.items():
        if name not in known or not 0 <= stage <= last:
            raise ConfigError(
                f"task set {name!r} learned in stage {stage}",
                expected=f"stage 0 to {last} and a measured task set",
                fix=nearest(name, known),
            )
        tasks = [m.task(name) for m in chain]
        if stage < last:
            found.append(
                backward_transfer(tasks[stage], tasks[-1], confidence=confidence, seed=seed)
            )
            found.append(forgetting(tasks, confidence=confidence, seed=seed))
        if stage >= 2:
            found.append(
                forward_transfer(tasks[0], tasks[stage - 1], confidence=confidence, seed=seed)
            )
    names = dict.fromkeys(r.name for r in found)
    return (*found, *(_mean([r for r in found if r.name == n], seed=seed) for n in names))


def backward_transfer(
    learned: TaskMeasurement, last: TaskMeasurement, *, confidence: float = 0.95, seed: int = 0
) -> Reading:
    """R[T, i] − R[i, i]: what later stages did to what a stage had taught (arXiv 1706.08840)."""
    return _difference(
        "backward_transfer",
        learned,
        last,
        "after the later stages than just after its own",
        confidence=confidence,
        seed=seed,
    )


def forward_transfer(
    base: TaskMeasurement, before: TaskMeasurement, *, confidence: float = 0.95, seed: int = 0
) -> Reading:
    """R[i − 1, i] − R[0, i]: what earlier stages did for a task before its own stage.

    Against the base policy rather than a random one, which arXiv 1706.08840 takes.
    """
    return _difference(
        "forward_transfer",
        base,
        before,
        "before its own stage than under the base",
        confidence=confidence,
        seed=seed,
    )


def _difference(
    name: str,
    old: TaskMeasurement,
    new: TaskMeasurement,
    words: str,
    *,
    confidence: float,
    seed: int,
) -> Reading:
    require_same_task(old, new)
    rates = [t.successes.mean(axis=1, dtype=np.float64) for t in (old, new)]
    interval = mean_interval(rates[1] - rates[0], lowest=-1.0, confidence=confidence, seed=seed)
    more = "more" if interval.value >= 0 else "less"
    said = f"solved {abs(interval.value):.2f} {more} often {words}"
    return reading(name, new.taskset, interval, samples=new.num_samples, words=said)


def forgetting(
    chain: Sequence[TaskMeasurement], *, confidence: float = 0.95, seed: int = 0
) -> Reading:
    """max_l<T R[l, i] − R[T, i]: how far the end is below the best that was (arXiv 1801.10112).

    The best of several noisy means is too good, and by itself makes forgetting out of chance. So
    for the value the samples are split: those outside a fold choose the best earlier policy, those
    in the fold measure the difference, and the folds are averaged. Nothing changed then has
    expectation zero, and a value may come out slightly negative. When the best is hard to tell,
    the value is low by less than the differences among the candidates.

    Its bounds do not depend on a choice. max_l D_l of the differences D_l is at most the largest
    of their upper bounds, and at least the largest of their lower bounds with the error shared
    out among the candidates. With one earlier policy they are those of the paired difference.

    Raises:
        ConfigError: fewer than two policies, or one sample per prompt.
        RunError: the policies were not measured on the same prompts in the same way.
    """
    if len(chain) < 2 or chain[0].num_samples < 2:
        raise ConfigError(
            f"forgetting over {len(chain)} policies",
            expected="an earlier and a later one, with two samples per prompt",
        )
    for later in chain[1:]:
        require_same_task(chain[0], later)
    n = chain[0].num_samples
    lost: Floats = np.zeros(len(chain[0].prompts))
    folds = min(FOLDS, n)
    for fold in range(folds):
        measures = np.arange(n) % folds == fold
        best = max(chain[:-1], key=lambda t: float(t.successes[:, ~measures].mean()))
        gap = best.successes[:, measures].mean(axis=1, dtype=np.float64)
        gap -= chain[-1].successes[:, measures].mean(axis=1, dtype=np.float64)
        lost += measures.sum() / n * gap
    rates = np.stack([t.successes.mean(axis=1, dtype=np.float64) for t in chain], axis=1)
    gaps, ranges = rates[:, :-1] - rates[:, -1:], ((-1.0, 1.0),) * (len(chain) - 1)
    shared = 1 - (1 - confidence) / len(ranges)
    usual = mean_intervals(gaps, ranges=ranges, confidence=confidence, seed=seed)
    strict = mean_intervals(gaps, ranges=ranges, confidence=shared, seed=seed)
    value = float(lost.mean())
    interval = Interval(
        value=value,
        low=min(value, max(i.low for i in strict)),
        high=max(value, max(i.high for i in usual)),
        num_prompts=len(lost),
        seed=seed,
        confidence=confidence,
    )
    words = f"solved {max(value, 0.0):.2f} less often than when it was best"
    return reading("forgetting", chain[0].taskset, interval, samples=n, words=words)


@since(
    "retention",
    topic=Topic.CHANGE,
    meaning="earlier success that survived",
    unit="share",
    better=Better.HIGHER,
    source="1706.08840",
    unknown=(1.0, 0.0, 1.0),  # nothing was in reach that could have been lost
)
def _retention(before: TaskMeasurement, after: TaskMeasurement, how: Estimation) -> Found | None:
    """None when nothing was certainly in reach before, so that there was nothing to keep."""
    kept = attribute(
        before, after, epsilon=how.epsilon, confidence=how.confidence, seed=how.seed
    ).retention
    if kept is None:
        return None
    share = min(max(kept.value, 0.0), 1.0)
    return Found(kept, f"{share:.0%} of the earlier success is still there")


def handoff(
    before: TaskMeasurement,
    gained: TaskMeasurement,
    later: TaskMeasurement,
    *,
    epsilon: float,
    confidence: float = 0.95,
) -> Reading | None:
    """|L ∩ solved later| / |L|: of the prompts a stage brought into reach, those still there.

    L holds the prompts that were not IN before the stage and are IN after it; later they have to
    be IN again. A prompt whose rate lies near the label's threshold may drop out by chance, so the
    share is a lower bound of what was really handed on. The interval is exact, given L. None
    when the stage brought nothing into reach.

    Raises:
        RunError: the three were not measured on the same prompts in the same way.
    """
    require_same_task(before, gained)
    require_same_task(gained, later)
    n = before.num_samples
    _, fewest = cutoffs(n, epsilon=epsilon, confidence=confidence)
    won = (before.counts < fewest) & (gained.counts >= fewest)
    if not won.any():
        return None
    kept = int((won & (later.counts >= fewest)).sum())
    interval = proportion_interval(kept, int(won.sum()), confidence=confidence)
    words = f"{kept} of {won.sum()} prompts that a stage brought into reach stayed there"
    return reading("handoff", later.taskset, interval, samples=n, words=words)


def _mean(readings: Sequence[Reading], *, seed: int) -> Reading:
    """The mean over task sets, each counting once."""
    interval = combined_interval([r.interval(seed=seed) for r in readings])
    names = ", ".join(r.task for r in readings)
    first = readings[0]
    return reading(
        first.name,
        ALL,
        interval,
        samples=first.samples,
        words=f"{first.metric.meaning}; mean over {names}",
    )
