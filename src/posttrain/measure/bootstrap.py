"""Intervals by paired bootstrap over prompts, honest when prompts are few or all alike.

per-prompt contributions [P, D] ──resample prompts──▶ replicates [B, D] ──BCa──▶ Interval per column

Resampling whole prompts keeps what belongs together: samples of one prompt, and both policies on
it. Shape legend: ``P`` prompts, ``D`` statistics, ``B`` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.support import beta_quantile, clopper_pearson

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
RARE = 5
"""Fewer prompts than this away from an end or the middle of a range tell too little of a spread."""
FEW = 8
"""Below this many prompts, resamples are too alike, and Student's interval is the lower limit. So
it is where fewer than RARE resamples lie beyond a bound: they know nothing of such a tail."""
SKEWED = (0.8, 1.8)
"""Sample skewness from which the bound that holds for any distribution begins to count, and from
which it is all that counts. Chosen by simulation, see benchmarks/coverage.py."""
BLOCK = 1 << 22  # resampled prompts held in memory at a time
SAME = 1e-12  # float noise between equal contributions


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with a two-sided interval over the prompts that could have been asked.

    ``num_prompts`` and ``seed`` say what was resampled; ``low`` <= ``value`` <= ``high``.
    """

    value: float
    low: float
    high: float
    num_prompts: int
    seed: int
    confidence: float

    @property
    def is_positive(self) -> bool:
        """True when the whole interval is above zero."""
        return self.low > 0


class Bounded(Protocol):
    """A number and its bounds: an interval or a reading."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def interval_words(of: Bounded | None, *, missing: str = "not measured") -> str:
    """A number with its bounds as people read it; ``missing`` where there is no finite number.

    Example:
        >>> half = Interval(value=.5, low=.4, high=.6, num_prompts=8, seed=0, confidence=.95)
        >>> interval_words(half), interval_words(None, missing="–")
        ('0.50 [0.40, 0.60]', '–')
        >>> interval_words(student_interval([0.81]))
        '0.81 (no interval)'
    """
    if of is None or not math.isfinite(of.value):
        return missing
    if not (math.isfinite(of.low) and math.isfinite(of.high)):
        return f"{of.value:z.2f} (no interval)"
    return f"{of.value:z.2f} [{of.low:z.2f}, {of.high:z.2f}]"


def mean_interval(
    values: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Interval:
    """Interval of the mean of per-prompt values [P]: one column of :func:`mean_intervals`.

    Example:
        >>> all_solved = mean_interval(np.ones(24))
        >>> all_solved.value, round(all_solved.low, 3), all_solved.high
        (1.0, 0.858, 1.0)
    """
    column = np.asarray(values, np.float64)[:, None]
    ranges = ((lowest, highest),)
    return mean_intervals(column, confidence=confidence, seed=seed, ranges=ranges)[0]


def student_interval(values: npt.ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of per-prompt values [P] that have no bounds.

    One value says nothing about the spread: its interval is infinite.

    Example:
        >>> i = student_interval([1.0, 2.0, 3.0])
        >>> [round(x, 2) for x in (i.value, i.low, i.high)]
        [2.0, -0.48, 4.48]
    """
    x = np.asarray(values, np.float64)
    mean, half = float(x.mean()), math.inf
    if len(x) > 1:
        t = student_quantile((1 + confidence) / 2, degrees=len(x) - 1)
        half = t * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(
        value=mean,
        low=mean - half,
        high=mean + half,
        num_prompts=len(x),
        seed=0,
        confidence=confidence,
    )


def mean_intervals(
    values: npt.ArrayLike,
    *,
    ranges: tuple[tuple[float, float], ...],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[Interval, ...]:
    """Intervals of column means of [P, D] per-prompt values, from one set of resamples.

    What it covers: the mean over the *task distribution* that the P prompts were drawn from, with
    both sources of chance in it: which prompts were asked, and the samples drawn for each (the
    values scatter with both). It does not cover a change of prompts' kind, of decoding, or of
    training seed.

    Method: bias-corrected accelerated bootstrap (Efron 1987), its levels widened from the normal to
    Student's t with P − 1 degrees (the expansion of Hesterberg, arXiv 1411.5279).

    All alike, nearly, or skewed: a bootstrap of equal values has no width, and one of P values of
    which fewer than RARE differ, or of which a few carry all the spread, has too little. What
    matters then is the prompts not asked, and no number of samples per prompt speaks for those.
    Every value in a range is at worst 0 or 1 of that range (a mean of values in [0, 1] varies most
    when they are 0 or 1), so one trial per prompt and the exact binomial bound at c = the sum of
    the values hold for any mixture of prompts. The interval then reaches at least that far; with
    growing skewness only the end on the side of the tail moves there, over the range SKEWED.
    Example: 24 prompts all solved in all samples give [0.86, 1].

    Simulated coverage is in docs/lab-log.md: near the nominal one for values spread over their
    range, above it where the binomial bound takes part, which is exact in the worst case only.

    Args:
        values: [P, D].
        ranges: least and greatest possible value per column; intervals stay inside.
        confidence: of the two-sided interval.
        seed: of the resampling; equal P and seed give equal resamples.
        resamples: B.

    Raises:
        ConfigError: no prompts, a value outside its range, or a confidence outside (0.5, 1).
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or not x.size or x.shape[1] != len(ranges) or not 0.5 < confidence < 1:
        raise ConfigError(
            f"intervals of values of shape {x.shape} with {len(ranges)} ranges at {confidence}",
            expected="[prompts, statistics], a range per statistic, 0.5 < confidence < 1",
        )
    lowest, highest = np.array(ranges, np.float64).T
    if not ((x >= lowest - 1e-9) & (x <= highest + 1e-9)).all():
        raise ConfigError("a per-prompt value outside its range", expected=f"within {ranges}")
    x = np.clip(x, lowest, highest)
    replicates = _resampled_means(x, seed=seed, resamples=resamples)
    return tuple(
        _interval(
            value=float(x[:, d].mean()),
            replicates=replicates[:, d],
            influence=x[:, d] - x[:, d].mean(),
            caution=_caution(x[:, d], ranges[d], confidence=confidence),
            bounds=ranges[d],
            confidence=confidence,
            seed=seed,
        )
        for d in range(x.shape[1])
    )


def proportion_interval(
    count: int, num_prompts: int, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Exact interval of a share of prompts (Clopper and Pearson, 1934), with ``count`` observed.

    For properties that a prompt has or has not, such as "no success in n samples". Its coverage is
    at least the nominal one for every true share, and above it for nearly all, since counts are
    whole: 0 of 32 gives [0, 0.11]. ``seed`` is carried along; nothing is resampled.

    Example:
        >>> proportion_interval(0, 32).high.__round__(2)
        0.11
    """
    low, high = clopper_pearson(count, num_prompts, confidence=(1 + confidence) / 2)
    value = count / num_prompts
    return Interval(
        value=value,
        low=low,
        high=high,
        num_prompts=num_prompts,
        seed=seed,
        confidence=confidence,
    )


def function_interval(
    values: npt.ArrayLike,
    function: Callable[[Floats], Floats],
    *,
    bounds: tuple[float, float],
    extremes: tuple[float, float],
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a smooth function of column means of [P, D] per-prompt values.

    The bootstrap of :func:`mean_intervals`, with the influence of each prompt from leaving it out
    (the jackknife). value + influence is to first order a value per prompt whose mean is the
    function, so the bound for values that are alike or skewed applies, with ``extremes`` for its
    range. Of a ratio, a few prompts with a large denominator may carry all: Student's t has the
    degrees of the effective number of prompts, (Σ |influence|)² / Σ influence², less one.

    Args:
        values: [P, D].
        function: from means [B, D] to [B] values inside ``bounds``.
        bounds: least and greatest possible value.
        extremes: least and greatest influence that a prompt could have; bounds from theory.
        confidence: of the two-sided interval.
        seed: of the resampling.

    Example:
        >>> x = np.stack([np.linspace(0, 1, 9), np.ones(9)], axis=1)
        >>> i = function_interval(
        ...     x, lambda m: m[:, 0] / m[:, 1], bounds=(0.0, 1.0), extremes=(-0.5, 0.5)
        ... )
        >>> i.value, i.low < 0.35, i.high > 0.65
        (0.5, True, True)
    """
    x = np.asarray(values, np.float64)
    num = len(x)
    value = float(function(x.mean(axis=0)[None])[0])
    without = (x.sum(axis=0) - x) / max(num - 1, 1)
    influence = (num - 1) * (value - function(without)) if num > 1 else np.zeros(1)
    influence = influence - influence.mean()
    return _interval(
        value=value,
        replicates=function(_resampled_means(x, seed=seed, resamples=RESAMPLES)),
        influence=influence,
        effective=float(np.abs(influence).sum() ** 2 / max((influence**2).sum(), SAME**2)),
        caution=_caution(
            value + influence, (value + extremes[0], value + extremes[1]), confidence=confidence
        ),
        bounds=bounds,
        confidence=confidence,
        seed=seed,
    )


def combined_interval(parts: Sequence[Interval]) -> Interval:
    """Interval of the plain mean of independent values, one per task set.

    From the distances of the parts' own bounds, added in squares (MOVER, Zou and Donner, 2008):
    it needs no further resampling and keeps the lopsidedness and the caution of the parts. Its
    prompts are those of all parts together.

    Example:
        >>> one = Interval(value=.5, low=.2, high=.6, num_prompts=8, seed=0, confidence=.95)
        >>> both = combined_interval([one, one])
        >>> round(both.low, 3), round(both.high, 3), both.num_prompts
        (0.288, 0.571, 16)
    """
    if not parts:
        raise ConfigError("the mean of no intervals", expected="at least one task set")
    value = math.fsum(p.value for p in parts) / len(parts)
    down = math.sqrt(math.fsum((p.value - p.low) ** 2 for p in parts)) / len(parts)
    up = math.sqrt(math.fsum((p.high - p.value) ** 2 for p in parts)) / len(parts)
    return Interval(
        value=value,
        low=value - down,
        high=value + up,
        num_prompts=sum(p.num_prompts for p in parts),
        seed=parts[0].seed,
        confidence=parts[0].confidence,
    )


def ratio_interval(
    part: npt.ArrayLike,
    whole: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Interval of sum(part) / sum(whole) over prompts, both [P] and resampled together.

    Prompts with ``whole`` = 0 say nothing about the ratio. Resamples in which ``whole`` sums to
    zero are left out. The bound of :func:`mean_intervals` for values that are alike or skewed
    applies to ratio + influence of the prompts that have a ratio: a prompt not asked is taken to
    have a ratio inside ``limits`` and a ``whole`` no larger than the largest seen. The interval is
    not cut at ``limits``, since an unbiased ``part`` may exceed ``whole`` by chance.

    Raises:
        ConfigError: ``whole`` is zero or negative in sum.

    Example:
        >>> kept = ratio_interval(np.full(20, 0.25), np.full(20, 0.5))
        >>> kept.value, round(kept.low, 2), round(kept.high, 2)
        (0.5, 0.42, 0.58)
    """
    a, b = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    total = float(b.sum())
    if a.shape != b.shape or a.ndim != 1 or total <= 0:
        raise ConfigError(
            f"ratio of {a.shape} to {b.shape} values, the latter with sum {total}",
            expected="equal shapes [P] and a positive sum",
        )
    ratio = float(a.sum()) / total
    sums = _resampled_means(np.stack([a, b], axis=1), seed=seed, resamples=RESAMPLES)
    usable = sums[:, 1] > SAME
    has = b > 0
    influence = (a - ratio * b)[has] / b[has].mean()
    weight = float(b.max() / b[has].mean())
    lowest, highest = (ratio + (limit - ratio) * weight for limit in limits)
    return _interval(
        value=ratio,
        replicates=sums[usable, 0] / sums[usable, 1],
        influence=influence,
        caution=_caution(ratio + influence, (lowest, highest), confidence=confidence),
        bounds=(-math.inf, math.inf),
        confidence=confidence,
        seed=seed,
        num_prompts=len(a),
    )


def _interval(
    *,
    value: float,
    replicates: Floats,
    influence: Floats,  # [P'] what each prompt adds to the deviation of the value
    caution: _Caution | None,
    bounds: tuple[float, float],
    confidence: float,
    seed: int,
    num_prompts: int | None = None,
    effective: float | None = None,  # number of prompts that carry the value, if not all alike
) -> Interval:
    low = high = value
    m = len(influence)
    spread = float(influence.std(ddof=1)) if m > 1 else 0.0
    if spread > SAME:
        carried = m if effective is None else max(effective, 2.0)
        t = student_quantile((1 + confidence) / 2, degrees=max(carried - 1, 1))
        bca = _accelerated(replicates, value, influence, z=t * math.sqrt(m / (m - 1)))
        low, high = min(low, bca[0]), max(high, bca[1])
        if m < FEW or len(replicates) * (1 - confidence) / 2 < RARE:
            reach = t * spread / math.sqrt(m)
            low, high = min(low, value - reach), max(high, value + reach)
    if caution is not None:
        low += caution.at_low * min(caution.low - low, 0.0)
        high += caution.at_high * max(caution.high - high, 0.0)
    return Interval(
        value=value,
        low=min(max(low, bounds[0]), value),
        high=max(min(high, bounds[1]), value),
        num_prompts=m if num_prompts is None else num_prompts,
        seed=seed,
        confidence=confidence,
    )


def _accelerated(
    replicates: Floats, value: float, influence: Floats, *, z: float
) -> tuple[float, float]:
    """BCa limits: quantiles of the replicates at levels moved for bias and for skewness."""
    below = np.mean(replicates < value - SAME) + np.mean(np.abs(replicates - value) <= SAME) / 2
    edge = 1 / len(replicates)
    normal = NormalDist()
    bias = normal.inv_cdf(float(np.clip(below, edge, 1 - edge)))
    skew = float((influence**3).sum()) / (6 * float((influence**2).sum()) ** 1.5)
    levels = []
    for side in (-z, z):
        moved = bias + side
        room = 1 - skew * moved
        levels.append(normal.cdf(bias + moved / room) if room > 0 else float(moved > 0))
    low, high = np.quantile(replicates, levels)
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class _Caution:
    """How far an interval must reach whatever the distribution, and how much of that to heed."""

    low: float
    high: float
    at_low: float  # 0 to 1
    at_high: float


def _caution(values: Floats, bounds: tuple[float, float], *, confidence: float) -> _Caution | None:
    """The bound for any distribution, and its weight at either end. None: no weight.

    Values on both sides of the common one are bounded side by side. Skewness is the adjusted
    G1 = g1·√(m(m − 1)) / (m − 2) of m values.
    """
    center, m = float(np.median(values)), len(values)
    away = values - center
    at_low = at_high = 1.0
    if int((np.abs(away) > SAME).sum()) >= RARE:
        d = values - values.mean()
        square = float((d**2).mean())
        g1 = float((d**3).mean()) / square**1.5 if square > SAME**2 else 0.0
        skewness = g1 * math.sqrt(m * (m - 1)) / (m - 2)
        start, full = SKEWED
        weight = min(max((abs(skewness) - start) / (full - start), 0.0), 1.0)
        at_low, at_high = (weight, 0.0) if skewness < 0 else (0.0, weight)
        if not weight:
            return None
    one_sided = (1 + confidence) / 2
    reach = []
    for room, parts in ((center - bounds[0], -away), (bounds[1] - center, away)):
        if room <= SAME:
            reach.append((0.0, 0.0))
            continue
        share = float(np.clip(parts / room, 0.0, 1.0).sum())
        reach.append(_scaled(clopper_pearson(share, m, confidence=one_sided), room))
    (down_low, down_high), (up_low, up_high) = reach
    return _Caution(center - down_high + up_low, center + up_high - down_low, at_low, at_high)


def _scaled(pair: tuple[float, float], by: float) -> tuple[float, float]:
    return pair[0] * by, pair[1] * by


def _resampled_means(x: Floats, *, seed: int, resamples: int) -> Floats:
    """[B, D] means of B resamples of the rows of [P, D]."""
    num = len(x)
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // num)
    means = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(num, size=(size, num)) + np.arange(size)[:, None] * num
        weights = np.bincount(drawn.ravel(), minlength=size * num).reshape(size, num)
        means.append(weights @ x / num)
    return np.concatenate(means)


def student_quantile(level: float, *, degrees: float) -> float:
    """Quantile of Student's t at ``level`` >= 0.5, through the Beta quantile.

    For t > 0, P(|T| > t) = I_x(degrees/2, 1/2) with x = degrees / (degrees + t²).

    Example:
        >>> round(student_quantile(0.975, degrees=15), 3)
        2.131
    """
    if not 0.5 <= level < 1 or degrees < 1:
        raise ConfigError(
            f"Student quantile at {level} with {degrees} degrees of freedom",
            expected="0.5 <= level < 1 and at least one degree",
        )
    x = beta_quantile(2 * (1 - level), degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x)
