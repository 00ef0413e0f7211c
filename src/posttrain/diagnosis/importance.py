"""How probable success is under one policy, from the successes of another.

successes of π₁: tokens, log π₀, log π₁ ──▶ ImportanceSample ──▶ estimate, bounds, reasons for doubt

p₀ = Σ_y π₀(y) over successful answers y. A base that failed n times says only p₀ <= 3/n. A later
policy that succeeds shows *which* answers succeed, and the base can be asked how probable it finds
those. Everything is in log-space: p₀ may be far below the smallest float.

Shape legend: ``D`` different successful answers, ``n`` answers drawn, failures included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.support import clopper_pearson

Floats = npt.NDArray[np.float64]
LN10 = math.log(10)

FEWEST_SUCCESSES = 5
"""Successes from which on an estimate may be trusted."""
FEWEST_EFFECTIVE = 10.0
"""Effective successes from which on an estimate may be trusted."""
LARGEST_SHARE = 0.3
"""Share of the estimate that may hang on one answer found by luck."""

_BETS = 8
_MARKOV = 0.1  # weight of the plain Markov bound among the bets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportanceSample:
    """The successful answers of a later policy π₁ on one prompt, as the base π₀ sees them.

    Answers are token sequences; ``times`` says how often each came up in ``num_samples`` draws at
    temperature 1 without truncation. ``base_successes`` of ``base_samples`` are the base's own
    draws, if there are any.

    Raises:
        ConfigError: arrays of different lengths, more successes than draws, a positive log-prob.

    Example:
        >>> one = ImportanceSample(log_base=np.log([1e-8]), log_later=np.log([0.5]),
        ...                        times=np.array([32]), num_samples=64, base_samples=256)
        >>> round(one.log10, 6), round(one.floor, 6), one.doubt
        (-8.0, -8.0, None)
    """

    log_base: Floats  # [D] log π₀(y)
    log_later: Floats  # [D] log π₁(y)
    times: npt.NDArray[np.int64]  # [D]
    num_samples: int
    base_successes: int = 0
    base_samples: int = 0

    def __post_init__(self) -> None:
        shapes = {np.shape(a) for a in (self.log_base, self.log_later, self.times)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or self.num_samples < 1:
            raise ConfigError(
                f"answers of shapes {sorted(shapes)} among {self.num_samples} draws",
                expected="one log-prob of each policy and one count per answer",
            )
        if self.successes > self.num_samples or (self.times < 1).any():
            raise ConfigError(
                f"{self.successes} successes among {self.num_samples} draws",
                expected="every answer at least once, and no more than were drawn",
            )
        logs = np.concatenate([self.log_base, self.log_later])
        if np.isnan(logs).any() or (logs > 1e-3).any() or np.isinf(self.log_later).any():
            raise ConfigError("log-probs that are NaN or above 0", expected="log-probs in nats")
        if not 0 <= self.base_successes <= self.base_samples:
            raise ConfigError(f"the base solved {self.base_successes} of {self.base_samples}")

    @property
    def successes(self) -> int:
        """Successful draws, repeated answers counted each time."""
        return int(self.times.sum())

    @property
    def floor(self) -> float:
        """log10 of Σ π₀(y) over the different successes found: p₀ is certainly no less.

        No sampling error: these answers succeed, and the base gives them this much. (Floats:
        log-probs are summed from float32, about 1e-6 relative per token.)
        """
        return _total(self.log_base) / LN10

    @property
    def log10(self) -> float:
        """log10 of the estimate Σ π₀(y) / q(y) over the different successes found.

        q(y) = 1 − (1 − π₁(y))^n is the chance that y was found at all, so the sum is unbiased for
        p₀ whatever π₁ is (Horvitz and Thompson 1952): each y is in it with probability q(y).
        An answer that was bound to be found counts as what it is, without variance; one found by
        luck counts π₀/(nπ₁), its importance weight. It is never below ``floor``, and was never
        less accurate than :attr:`weighted` by more than simulation noise (see the lab log).
        """
        return _total(self._inferred) / LN10

    @property
    def weighted(self) -> float:
        """log10 of the plain importance estimate (1/n) Σ 1{success} π₀(y)/π₁(y) over all draws."""
        if not self.successes:
            return -math.inf
        return (_total(self._weights) - math.log(self.num_samples)) / LN10

    @property
    def effective(self) -> float:
        """Effective number of successes: 1 / (relative variance of the estimate), and not more
        than log-normal weights of the same spread would allow.

        The variance of the estimate is at most Σ_y π₀² (1 − q) / q, estimated without bias by
        Σ_found π₀² (1 − q) / q². If all answers are rare it is Σw² and this is (Σw)² / Σw², the
        usual effective sample size; if all were bound to be found it is infinite. That number is
        too high when the heaviest weights were not met yet, so a second one is taken from the
        spread s² of the log-weights: s_n · exp(−s²) for s_n successes, the share of the estimate
        that is certain left out.
        """
        if not self.successes:
            return 0.0
        possible = np.isfinite(self._ratio)  # what the base gives no chance adds nothing
        parts, luck = self._inferred[possible], self._log_luck[possible]
        if not len(parts):
            return 0.0
        total = _total(parts)
        relative = math.exp(_total(2 * parts + luck) - 2 * total)
        share = math.exp(_total(parts + luck) - total)
        seen = math.inf if relative == 0 else 1 / relative
        if share == 0 or len(parts) < 2:
            return seen
        weight, ratio = np.exp(luck - luck.max()), self._ratio[possible]
        mean = float((weight * ratio).sum() / weight.sum())
        spread = float((weight * (ratio - mean) ** 2).sum() / weight.sum())
        spread *= len(weight) / (len(weight) - 1)
        return min(seen, self.successes * math.exp(-min(spread, 700.0)) / share**2)

    @property
    def largest(self) -> float:
        """Greatest share of the estimate that hangs on one answer having been found by luck."""
        if not self.successes or not np.isfinite(self._inferred).any():
            return 1.0
        return math.exp(float((self._inferred + self._log_luck).max()) - _total(self._inferred))

    @property
    def doubt(self) -> str | None:
        """Why the estimate should not be trusted, in words; None when nothing speaks against it.

        Trusted means: good to a factor of two for the answers that the later policy writes. It
        never means that there are no others (see :meth:`high`).
        """
        if not self.successes:
            return "the later policy did not succeed either"
        if self.successes < FEWEST_SUCCESSES:
            return f"only {self.successes} of {self.num_samples} samples succeeded"
        if not np.isfinite(self.log_base).any():
            return "the base gives none of the answers found any chance"
        if self.largest > LARGEST_SHARE:
            return f"one sample carries {self.largest:.0%} of the weight"
        if self.effective < FEWEST_EFFECTIVE:
            return f"the weights differ so much that they count as {self.effective:.2g} samples"
        return None

    def low(self, tail: float) -> float:
        """log10 of a lower bound of p₀, wrong with probability ``tail`` at most, for any weights.

        The greater of ``floor`` and a betting bound. Under a mean of μ or less, a fortune that
        stakes a share λ on each weight w being above μ, Π(1 + λ(w/μ − 1)), is 1 on average, and so
        is a mixture over λ; it exceeds 1/tail with probability ``tail`` at most (Markov). The
        bound is the smallest μ that is not refuted so (Waudby-Smith and Ramdas, arXiv 2010.09686,
        for a fixed n and unbounded weights, where only this side exists).
        """
        if not self.successes:
            return -math.inf
        own = tail / 2 if self.base_successes else tail
        lows = [self.floor, self._betting(own)]
        if self.base_successes:
            share = clopper_pearson(self.base_successes, self.base_samples, confidence=1 - own)[0]
            lows.append(math.log10(share))
        return max(lows)

    def high(self, tail: float) -> float:
        """log10 of an upper bound of p₀, wrong with probability ``tail`` at most.

        It comes from the base's own draws (Clopper-Pearson) and is 0, which says nothing, without
        them. The later policy's successes cannot give one: what it never writes, however probable
        under the base, is not among them.
        """
        if not self.base_samples:
            return 0.0
        bound = clopper_pearson(self.base_successes, self.base_samples, confidence=1 - tail)[1]
        return max(math.log10(bound), self.floor)  # unlucky draws do not outweigh what is certain

    @property
    def _ratio(self) -> Floats:
        return np.asarray(self.log_base - self.log_later)

    @property
    def _weights(self) -> Floats:
        """[successes] log-weights of every successful draw."""
        return np.repeat(self._ratio, self.times)

    @property
    def _log_missed(self) -> Floats:
        """[D] log of the chance that the answer was not found."""
        with np.errstate(divide="ignore"):
            return self.num_samples * np.log1p(-np.exp(np.minimum(self.log_later, 0.0)))

    @property
    def _log_luck(self) -> Floats:
        """[D] the same, without −inf, which arithmetic would turn into NaN."""
        return np.maximum(self._log_missed, -700.0)

    @property
    def _inferred(self) -> Floats:
        """[D] log of each answer's part of the estimate."""
        with np.errstate(divide="ignore"):
            found = np.log(-np.expm1(self._log_missed))
        rare = self.log_later + math.log(self.num_samples)
        return np.asarray(self.log_base - np.where(rare < -20.0, rare, found))

    def _betting(self, tail: float) -> float:
        weights = self._weights[np.isfinite(self._weights)]
        if not len(weights):
            return -math.inf
        n, fails = self.num_samples, self.num_samples - len(weights)
        stakes = np.geomspace(0.5 / n, 0.95, _BETS) if n > 1 else np.array([0.5])
        mean = _total(weights) - math.log(n)
        prior = math.log((1 - _MARKOV) / len(stakes))

        def fortune(mu: float) -> float:
            grown = np.logaddexp(
                np.log1p(-stakes)[:, None], np.log(stakes)[:, None] + weights[None] - mu
            ).sum(axis=1)
            bets = fails * np.log1p(-stakes) + grown + prior
            return _total(np.append(bets, math.log(_MARKOV) + mean - mu))

        # At the mean the fortune is at most 1; at mean·tail·_MARKOV, Markov's part refutes alone.
        refuted, kept = mean + math.log(tail * _MARKOV), mean
        for _ in range(50):
            half = (refuted + kept) / 2
            if fortune(half) >= -math.log(tail):
                refuted = half
            else:
                kept = half
        return refuted / LN10


def _total(logs: Floats) -> float:
    """log Σ exp, −inf for nothing."""
    return float(np.logaddexp.reduce(logs)) if len(logs) else -math.inf


_SCALES = ((12, "trillion"), (9, "billion"), (6, "million"), (3, "thousand"))


def odds_words(log10: float) -> str:
    """A probability, given as its log10, as people say it.

    Example:
        >>> [odds_words(math.log10(p)) for p in (0.5, 0.034, 1 / 1234, 2.5e-8)]
        ['about 50 in 100', 'about 3.4 in 100', 'about 1 in 1,200', 'about 1 in 40 million']
        >>> odds_words(-40.3), odds_words(-math.inf)
        ('about 1 in 10^40', 'no chance seen')
    """
    if log10 == -math.inf:
        return "no chance seen"
    if log10 > -2:
        return f"about {100 * 10**log10:.2g} in 100" if log10 < 0 else "certain"
    if log10 < -15:
        return f"about 1 in 10^{-log10:.0f}"
    times = float(f"{10**-log10:.2g}")
    for power, word in _SCALES:
        if times >= 10**power and power > 3:
            return f"about 1 in {times / 10**power:.3g} {word}"
    return f"about 1 in {times:,.0f}"
