"""Which prompts a policy practically solves: in reach, out of reach, or undetermined.

successes, n ──exact binomial bounds──▶ Label per prompt ──two policies──▶ SupportChange

A prompt is in a policy's support when its success probability is at least a threshold ε
(arXiv 2507.14843), decided with exact (Clopper-Pearson) bounds, which are valid for few samples.
Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.measurement import TaskMeasurement, require_same_task

ROUNDING = 1e-9
"""Relative slack in comparisons with 1 − confidence, so that 0 of n is OUT at the decidable ε."""


class Label(StrEnum):
    """Whether a policy practically reaches success on a prompt."""

    IN = "in"  # the lower bound of its success probability is at least ε
    OUT = "out"  # the upper bound is at most ε
    UNDETERMINED = "undetermined"  # ε lies between the bounds


# --- exact binomial bounds -------------------------------------------------------------------


def clopper_pearson(
    successes: float, num_samples: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Exact one-sided bounds of a success probability, each holding with ``confidence``.

    The lower bound is the p for which ``successes`` or more had probability 1 − confidence, the
    upper one the p for which ``successes`` or fewer had it. Both hold together with probability
    2·confidence − 1 at least (Clopper and Pearson, 1934). ``successes`` need not be whole: the
    Beta quantiles interpolate.

    Raises:
        ConfigError: no samples, more successes than samples, or a confidence outside (0, 1).

    Example:
        >>> low, high = clopper_pearson(0, 64, confidence=0.95)
        >>> low, round(high, 4)
        (0.0, 0.0457)
        >>> [round(bound, 3) for bound in clopper_pearson(8, 64)]
        [0.064, 0.214]
    """
    if num_samples < 1 or not 0 <= successes <= num_samples or not 0 < confidence < 1:
        raise ConfigError(
            f"{successes} successes of {num_samples} at confidence {confidence}",
            expected="0 <= successes <= samples, samples >= 1, 0 < confidence < 1",
        )
    c, n = float(successes), num_samples
    low = 0.0 if c == 0 else beta_quantile(1 - confidence, c, n - c + 1)
    high = 1.0 if c == n else beta_quantile(confidence, c + 1, n - c)
    return low, high


@lru_cache(maxsize=4096)
def beta_quantile(level: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = level, by bisection down to neighbouring floats.

    Below 1e-15 it cannot be distinguished from zero.

    Example:
        >>> round(beta_quantile(0.5, 2.0, 2.0), 12)
        0.5
    """
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high) or high < 1e-15:
            return middle
        if incomplete_beta(middle, a, b) < level:
            low = middle
        else:
            high = middle


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by Lentz's continued fraction.

    It is the distribution function of Beta(a, b); the binomial tail P(X >= c) of n trials is
    I_p(c, n − c + 1). Source: Abramowitz and Stegun, 26.5.8.

    Example:
        >>> round(incomplete_beta(0.25, 1.0, 1.0), 12)
        0.25
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only on the other side
        return 1 - incomplete_beta(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    tiny = 1e-300
    d = 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    c, fraction = 1.0, d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 + term * d, 1 + term / c
            d = 1 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return math.exp(front) * fraction


def cutoffs(num_samples: int, *, epsilon: float, confidence: float) -> tuple[int, int]:
    """(most successes that are OUT, fewest that are IN); −1 and n + 1 when none are.

    The bounds are never computed: a lower bound is at least ε exactly when that many successes or
    more have probability at most 1 − confidence under ε, and likewise for the upper one.

    Example:
        >>> cutoffs(64, epsilon=1 - 0.05 ** (1 / 64), confidence=0.95)
        (0, 7)
    """
    if not 0 < epsilon < 1 or not 0 < confidence < 1 or num_samples < 1:
        raise ConfigError(
            f"support at epsilon={epsilon}, confidence={confidence}, {num_samples} samples",
            expected="0 < epsilon < 1, 0 < confidence < 1, at least one sample",
        )
    n = num_samples
    c = np.arange(1, n + 1)
    steps = np.log((n - c + 1) / c) + math.log(epsilon) - math.log1p(-epsilon)
    log_pmf = n * math.log1p(-epsilon) + np.concatenate([[0.0], np.cumsum(steps)])
    pmf = np.exp(log_pmf)
    allowed = (1 - confidence) * (1 + ROUNDING)
    max_out = int((np.cumsum(pmf) <= allowed).sum()) - 1
    min_in = n + 1 - int((np.cumsum(pmf[::-1]) <= allowed).sum())
    return max_out, max(min_in, max_out + 1)  # both can hold below a confidence of one half


def labels(task: TaskMeasurement, *, epsilon: float, confidence: float = 0.95) -> tuple[Label, ...]:
    """The label of every prompt, from all its samples. Each bound holds with ``confidence``.

    IN when the lower bound is at least ε, OUT when the upper bound is at most ε. With
    ε = 1 − (1 − confidence)^(1/n), the smallest that n samples can decide, 0 of n is OUT.
    """
    max_out, min_in = cutoffs(task.num_samples, epsilon=epsilon, confidence=confidence)
    return tuple(
        Label.OUT if c <= max_out else Label.IN if c >= min_in else Label.UNDETERMINED
        for c in task.counts
    )


# --- two policies ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Solvable:
    """Prompts solved at least once by both, one or neither of two policies, in n samples each.

    The table does not account for chance: a prompt in ``after_only`` may be one that ``before``
    solves with more samples. :class:`SupportChange` uses labels with confidence bounds.
    """

    both: int
    before_only: int
    after_only: int
    neither: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportChange:
    """How the set of prompts in reach changed (the metrics of arXiv 2507.14843, per prompt).

    ``preserved`` were and are IN, ``expanded`` went OUT to IN, ``shrunk`` IN to OUT, ``out`` stayed
    OUT; ``undetermined`` are all with an undetermined label on either side. They add up to P.
    Metrics are None where they are 0/0.

    Example:
        >>> change = SupportChange(task="sums", epsilon=0.05, confidence=0.95,
        ...     before=(Label.IN, Label.IN, Label.OUT), after=(Label.IN, Label.OUT, Label.IN),
        ...     solvable=Solvable(both=1, before_only=1, after_only=1, neither=0))
        >>> change.srr, change.ndr, change.sds, change.nscr
        (0.5, 0.5, 0.5, 0.0)
    """

    task: str
    epsilon: float
    confidence: float
    before: tuple[Label, ...]  # [P]
    after: tuple[Label, ...]  # [P]
    solvable: Solvable

    def count(self, before: Label, after: Label) -> int:
        """Prompts with this pair of labels."""
        return sum(b is before and a is after for b, a in zip(self.before, self.after, strict=True))

    @property
    def preserved(self) -> int:
        """Prompts in reach before and after."""
        return self.count(Label.IN, Label.IN)

    @property
    def expanded(self) -> int:
        """Prompts out of reach before, in reach after."""
        return self.count(Label.OUT, Label.IN)

    @property
    def shrunk(self) -> int:
        """Prompts in reach before, out of reach after."""
        return self.count(Label.IN, Label.OUT)

    @property
    def out(self) -> int:
        """Prompts out of reach before and after."""
        return self.count(Label.OUT, Label.OUT)

    @property
    def undetermined(self) -> int:
        """Prompts whose label is undetermined for at least one policy."""
        return len(self.before) - self.preserved - self.expanded - self.shrunk - self.out

    @property
    def srr(self) -> float | None:
        """Support retention rate, preserved / (preserved + shrunk)."""
        return _share(self.preserved, self.preserved + self.shrunk)

    @property
    def ndr(self) -> float | None:
        """Net discovery rate, expanded / (preserved + expanded)."""
        return _share(self.expanded, self.preserved + self.expanded)

    @property
    def sds(self) -> float | None:
        """Support dynamic score, the harmonic mean of SRR and NDR: 2PE / (P² + 2PE + ES)."""
        p, e, s = self.preserved, self.expanded, self.shrunk
        return _share(2 * p * e, p * p + 2 * p * e + e * s)

    @property
    def nscr(self) -> float | None:
        """Net support change rate, (expanded − shrunk) / (preserved + expanded + shrunk)."""
        return _share(self.expanded - self.shrunk, self.preserved + self.expanded + self.shrunk)


def support_change(
    before: TaskMeasurement, after: TaskMeasurement, *, epsilon: float, confidence: float = 0.95
) -> SupportChange:
    """Label every prompt under both policies and count the transitions.

    Raises:
        RunError: the two were not measured on the same prompts in the same way.
        ConfigError: ``epsilon`` or ``confidence`` outside (0, 1).
    """
    require_same_task(before, after)
    return SupportChange(
        task=before.taskset,
        epsilon=epsilon,
        confidence=confidence,
        before=labels(before, epsilon=epsilon, confidence=confidence),
        after=labels(after, epsilon=epsilon, confidence=confidence),
        solvable=solvable(before.counts, after.counts),
    )


def solvable(before: npt.NDArray[np.integer], after: npt.NDArray[np.integer]) -> Solvable:
    """The four-way table (arXiv 2504.13837, appendix C.7) from success counts [P] of two policies.

    Example:
        >>> solvable(np.array([3, 1, 0, 0]), np.array([5, 0, 2, 0]))
        Solvable(both=1, before_only=1, after_only=1, neither=1)
    """
    old, new = before > 0, after > 0
    return Solvable(
        both=int((old & new).sum()),
        before_only=int((old & ~new).sum()),
        after_only=int((~old & new).sum()),
        neither=int((~old & ~new).sum()),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
