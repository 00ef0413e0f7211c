"""Success within k tries, without bias, from n samples per prompt.

counts [P] ──pass_at_k──▶ per prompt [P] ──bootstrap over prompts──▶ Curve over k

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import Floats, Interval, mean_interval, mean_intervals
from posttrain.measure.estimators import per_prompt, seen_range
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.registry import Better, Topic


def pass_at_k(counts: npt.ArrayLike, num_samples: int, k: int) -> Floats:
    """[P] unbiased probability that at least one of k samples succeeds.

    1 − C(n−c, k) / C(n, k), worked out as 1 − exp Σ_{i=n−c+1..n} log(1 − k/i), which neither
    overflows nor loses digits (arXiv 2107.03374); exactly 1 when fewer than k samples failed.
    The plug-in 1 − (1 − c/n)^k would be biased low.

    Args:
        counts: [P] successes per prompt, 0 to n.
        num_samples: n.
        k: tries.

    Raises:
        ConfigError: k above n, for which no unbiased estimate exists, or a count outside 0 to n.

    Example:
        >>> pass_at_k([0, 1, 4], 4, 2).tolist()
        [0.0, 0.5, 1.0]
    """
    table = 0.0 - np.expm1(_log_all_fail(num_samples, k))
    return np.asarray(table[_checked(counts, num_samples)])


def pass_hat_k(counts: npt.ArrayLike, num_samples: int, k: int) -> Floats:
    """[P] unbiased probability that all of k samples succeed: C(c, k) / C(n, k) (arXiv 2406.12045).

    Raises:
        ConfigError: as for :func:`pass_at_k`.

    Example:
        >>> [round(p, 6) for p in pass_hat_k([1, 2, 4], 4, 2).tolist()]
        [0.0, 0.166667, 1.0]
    """
    table = np.exp(_log_all_fail(num_samples, k))
    return np.asarray(table[num_samples - _checked(counts, num_samples)])


def best_at_k(scores: npt.ArrayLike, k: int) -> Floats:
    """[P] unbiased expectation of the best score among k of the n samples of each prompt.

    Σ_{i=k..n} C(i−1, k−1) / C(n, k) · r_(i) with scores [P, n] in rising order r_(1) ... r_(n). On
    scores 0 and 1 it is pass@k.

    Raises:
        ConfigError: scores that are not [P, n], or k outside 1 to n.

    Example:
        >>> best_at_k([[0.0, 1.0, 0.5]], 2).round(6).tolist()
        [0.833333]
    """
    ranked = np.sort(np.asarray(scores, np.float64), axis=-1)
    if ranked.ndim != 2:
        raise ConfigError(f"scores of shape {ranked.shape}", expected="[prompts, samples]")
    n = ranked.shape[1]
    check_k(n, k)
    i = np.arange(n, k, -1)  # weight of rank n is k/n; going down a rank multiplies (i−k)/(i−1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((i - k) / (i - 1)))])
    weights = np.exp(np.log(k / n) + logs)
    return np.asarray(ranked[:, n - len(weights) :] @ weights[::-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """pass@k of one policy on one task set, with intervals over prompts, one entry per k."""

    task: str
    ks: tuple[int, ...]  # powers of two up to n
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_prompts: int
    num_samples: int
    confidence: float
    seed: int

    def at(self, k: int) -> Interval:
        """pass@k, for one of ``ks``."""
        i = self.ks.index(k)
        return Interval(
            value=self.value[i],
            low=self.low[i],
            high=self.high[i],
            num_prompts=self.num_prompts,
            seed=self.seed,
            confidence=self.confidence,
        )


def curve(task: TaskMeasurement, *, confidence: float = 0.95, seed: int = 0) -> Curve:
    """pass@k for k = 1, 2, 4, ... up to n. Each interval holds by itself, not all at once.

    Prompts are resampled as in :func:`posttrain.measure.bootstrap.mean_intervals`.
    """
    n = task.num_samples
    ks = tuple(2**i for i in range(n.bit_length()))
    columns = np.stack([pass_at_k(task.counts, n, k) for k in ks], axis=1)
    intervals = mean_intervals(
        columns, ranges=((0.0, 1.0),) * len(ks), confidence=confidence, seed=seed
    )
    return Curve(
        task=task.taskset,
        ks=ks,
        value=tuple(i.value for i in intervals),
        low=tuple(i.low for i in intervals),
        high=tuple(i.high for i in intervals),
        num_prompts=len(task.prompts),
        num_samples=n,
        confidence=confidence,
        seed=seed,
    )


def pass_interval(
    task: TaskMeasurement, k: int, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """pass@k with its interval over prompts.

    Raises:
        ConfigError: k is below 1 or above the number of samples.
    """
    values = pass_at_k(task.counts, task.num_samples, k)
    return mean_interval(values, confidence=confidence, seed=seed)


# --- the metrics -----------------------------------------------------------------------------


def _doublings(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return sorted({n, *(2**i for i in range(n.bit_length()))})


def _tries(value: float, k: float, task: TaskMeasurement) -> str:
    tries = "one try succeeds" if k == 1 else f"at least one of {k:.0f} tries succeeds"
    return f"{tries} with probability {value:.2f}"


def _all_of_them(value: float, k: float, task: TaskMeasurement) -> str:
    if k == task.num_samples:
        return f"{value:.0%} of prompts are solved in all of {k:.0f} tries"
    return f"all of {k:.0f} tries succeed with probability {value:.2f}"


def _none_of_them(value: float, k: float, task: TaskMeasurement) -> str:
    if k == task.num_samples:
        return f"{value:.0%} of prompts are never solved in {k:.0f} tries"
    return f"none of {k:.0f} tries succeeds with probability {value:.2f}"


@per_prompt(
    "pass@k",
    topic=Topic.SUCCESS,
    meaning="at least one of k tries succeeds",
    unit="probability",
    better=Better.HIGHER,
    source="2107.03374",
    usual=_doublings,
    sentence=_tries,
)
def _pass(task: TaskMeasurement, k: int) -> Floats:
    return pass_at_k(task.counts, task.num_samples, k)


@per_prompt(
    "pass^k",
    topic=Topic.SUCCESS,
    meaning="all of k tries succeed",
    unit="probability",
    better=Better.HIGHER,
    source="2406.12045",
    usual=lambda n: [*(k for k in (4, 8) if k <= n), n],
    share_at_n=True,
    sentence=_all_of_them,
    formerly={"reliable@k": "pass^k", "all_right@k": "pass^k", "all_right": "pass^k"},
)
def _all_right(task: TaskMeasurement, k: int) -> Floats:
    return pass_hat_k(task.counts, task.num_samples, k)


@per_prompt(
    "all_wrong@k",
    topic=Topic.SIGNAL,
    meaning="none of k tries succeeds",
    unit="probability",
    better=Better.LOWER,
    source="2509.25849",
    usual=lambda n: [n],
    share_at_n=True,
    sentence=_none_of_them,
)
def _all_wrong(task: TaskMeasurement, k: int) -> Floats:
    return 1 - pass_at_k(task.counts, task.num_samples, k)


@per_prompt(
    "best@k",
    topic=Topic.SUCCESS,
    meaning="expected best score of k tries; best@1 is the mean score",
    unit="score",
    better=Better.HIGHER,
    source="2608.00220",
    limits=seen_range,
    sentence=lambda value, k, task: f"the best of {k:.0f} tries scores {value:.2f} on average",
    formerly={"score": "best@1"},
)
def _best(task: TaskMeasurement, k: int) -> Floats:
    return best_at_k(task.scores, k)


@per_prompt(
    "efficiency_gap",
    topic=Topic.SUCCESS,
    meaning="pass@n minus pass@1: what choosing better could gain",
    unit="probability",
    better=Better.LOWER,
    source="2504.13837",
    phrase="success within all tries minus pass@1",  # a task may have more than 64
    sentence=lambda value, k, task: (
        f"one try succeeds {value:.2f} less often than the best of {task.num_samples}"
    ),
)
def _efficiency_gap(task: TaskMeasurement) -> Floats:
    n = task.num_samples
    return pass_at_k(task.counts, n, n) - pass_at_k(task.counts, n, 1)


def _log_all_fail(n: int, k: int) -> Floats:
    """[n + 1] log of the probability that k of n samples all fail, by number of successes c.

    Summed from i = n down, so that the entry of each c is a plain sum without cancellation.
    """
    check_k(n, k)
    i = np.arange(n, k, -1)
    sums = np.concatenate([[0.0], np.cumsum(np.log1p(-k / i))])
    return np.concatenate([sums, np.full(k, -np.inf)])


def check_k(n: int, k: int) -> None:
    """Refuse k outside 1 to n: more tries than samples have no unbiased estimate.

    Raises:
        ConfigError: it is.
    """
    if not 1 <= k <= n:
        raise ConfigError(
            f"k = {k} with {n} samples per prompt",
            expected=f"1 <= k <= {n}",
            fix="raise the samples per prompt, or ask for a smaller k",
        )


def _checked(counts: npt.ArrayLike, n: int) -> npt.NDArray[np.int64]:
    c = np.asarray(counts)
    if c.size and (c.dtype.kind not in "iu" or c.min() < 0 or c.max() > n):
        raise ConfigError(f"success counts {c.tolist()!r:.80}", expected=f"integers from 0 to {n}")
    return c.astype(np.int64)
