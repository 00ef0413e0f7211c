"""The base's success probability on unsolved prompts, estimated through a later policy.

tasks ──later policy draws──▶ successes ──both score──▶ ImportanceSample per prompt ──▶ Reach
                                                                           └──▶ TaskReach

Sharpening of something very rare and true expansion look the same in samples of the base: it never
succeeds. They differ in the base's probability of the later policy's successes: "0 of 256" becomes
"about 1 in 40 million".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import Task, TaskSet
from posttrain.diagnosis.drawing import (
    Answer,
    draw_answers,
    require_plain,
    require_same_vocabulary,
    token_logprobs,
)
from posttrain.diagnosis.importance import ImportanceSample, odds_words
from posttrain.diagnosis.median import median_interval
from posttrain.measure.reading import Reading
from posttrain.protocols import Policy

WHY_PLAIN = (
    "the estimate divides by the probability with which the later policy wrote an answer, and "
    "asks for the base's own distribution"
)
CHOOSING = 4
"""1/CHOOSING of the samples selects the prompts when the caller has not."""
TAIL = 0.005
"""Probability that a single prompt's bound is wrong, for the median over prompts."""

NO_COUNTS: Mapping[str, tuple[int, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The base's success probability on one prompt, as log10; −inf is "none seen".

    ``low`` and ``high`` hold for the true probability with ``confidence`` together, whether or not
    ``log10`` can be trusted: ``low`` for any weights, ``high`` from the base's own draws only.
    """

    key: str
    log10: float
    low: float
    high: float
    floor: float  # certain: the sum over the different successes found
    weighted: float  # the plain importance estimate, for comparison
    num_samples: int
    successes: int
    distinct: int
    effective: float
    largest: float
    base_successes: int
    base_samples: int
    doubt: str | None
    confidence: float

    @property
    def trusted(self) -> bool:
        """True when ``log10`` is good to about a factor of two for the answers that the later
        policy generates. Other successful answers are not in it."""
        return self.doubt is None

    @property
    def words(self) -> str:
        """The finding in a sentence.

        Example: ``about 1 in 40 million (at least 1 in 90 million) by the ways the later policy
        writes; the base's own 256 samples allow 1 in 70``
        """
        text = odds_words(self.log10)
        if self.low > -math.inf:
            text += f" ({odds_words(self.low).replace('about', 'at least')})"
        text += " by the ways the later policy writes"
        if self.doubt is not None:
            text += f", not trustworthy: {self.doubt}"
        if self.base_samples:
            allowed = odds_words(self.high).removeprefix("about ")
            text += f"; the base's own {self.base_samples} samples allow {allowed}"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReach:
    """The base's success probabilities on the prompts of a task that the later policy solves.

    ``low`` and ``high`` bound the median over the distribution of such prompts, and allow for the
    uncertainty of every prompt (:func:`median_interval`).
    """

    task: str
    prompts: tuple[Reach, ...]
    skipped: tuple[str, ...]  # keys of prompts without a success of the later policy
    log10: float
    low: float
    high: float
    confidence: float
    seed: int

    @property
    def num_trusted(self) -> int:
        """Prompts whose estimate can be trusted."""
        return sum(p.trusted for p in self.prompts)

    def reachable(self, log10: float) -> tuple[int, int, int]:
        """Number of prompts with (at least, undetermined, less than) 10^``log10``, by bounds."""
        at_least = sum(p.low >= log10 for p in self.prompts)
        below = sum(p.high < log10 for p in self.prompts)
        return at_least, len(self.prompts) - at_least - below, below

    @property
    def reading(self) -> Reading | None:
        """``reach_log10``; None when there is no prompt."""
        if not self.prompts:
            return None
        words = (
            f"the base succeeds {odds_words(self.log10)} on the middle one of {len(self.prompts)} "
            f"prompts that the later policy solves; {self.num_trusted} of the estimates can be "
            "trusted, and ways to succeed that the later policy never writes are not in them"
        )
        return Reading(
            "reach_log10",
            self.task,
            self.log10,
            self.low,
            self.high,
            len(self.prompts),
            max(p.num_samples for p in self.prompts),
            words,
            self.confidence,
        )


def reachability(
    base: Policy,
    later: Policy,
    taskset: TaskSet,
    *,
    samples: int = 256,
    max_new_tokens: int,
    seed: int,
    tasks: Sequence[Task] | None = None,
    sampling: SamplingSpec = SamplingSpec(),
    base_counts: Mapping[str, tuple[int, int]] = NO_COUNTS,
    confidence: float = 0.95,
) -> TaskReach:
    """Estimate the base's success probabilities from the later policy's answers.

    Args:
        base: the policy to estimate for.
        later: the policy that solves prompts that the base does not.
        taskset: prompts and scorer.
        samples: answers of the later policy per prompt.
        max_new_tokens: budget of an answer; the probability is of success within it.
        seed: of the later policy's draws.
        tasks: prompts chosen on *other* samples, for example those that a measurement found newly
            solved. None: all held-out prompts; a quarter of the samples selects those that the
            later policy solves, and the rest estimates. (Selecting and estimating on the same
            samples would be biased.)
        sampling: must be the policy's own distribution.
        base_counts: (successes, samples) of the base by task key, for the upper bounds.
        confidence: of each interval.

    Raises:
        ConfigError: sampling with another temperature or truncation; too few samples.
        ModelError: different tokenizers, templates or too short a context of the base.
        TaskError: a prompt that does not fit.
    """
    require_plain(sampling, why=WHY_PLAIN)
    if samples < 2 * CHOOSING or not 0.5 < confidence < 1:
        raise ConfigError(
            f"reachability with {samples} samples at confidence {confidence}",
            expected=f"at least {2 * CHOOSING} samples and 0.5 < confidence < 1",
        )
    asked = list(taskset.held_out) if tasks is None else list(tasks)
    require_same_vocabulary(base, later, asked)
    answers = draw_answers(
        later, taskset, asked, samples=samples, max_new_tokens=max_new_tokens, seed=seed
    )
    skipped: tuple[str, ...] = ()
    if tasks is None:
        split = samples // CHOOSING
        solved = [any(a.success for a in group[:split]) for group in answers]
        skipped = tuple(t.key for t, s in zip(asked, solved, strict=True) if not s)
        answers = [group[split:] for group, s in zip(answers, solved, strict=True) if s]
    return reach_of(
        base,
        answers,
        task=taskset.name,
        skipped=skipped,
        base_counts=base_counts,
        confidence=confidence,
        seed=seed,
    )


def reach_of(
    base: Policy,
    answers: Sequence[tuple[Answer, ...]],
    *,
    task: str,
    seed: int,
    skipped: tuple[str, ...] = (),
    base_counts: Mapping[str, tuple[int, int]] = NO_COUNTS,
    confidence: float = 0.95,
) -> TaskReach:
    """:func:`reachability` from existing answers, one tuple per prompt.

    They must be *all* draws of the later policy on the prompt, at temperature 1 without
    truncation, and not those that selected the prompt.
    """
    firsts = [_distinct(group) for group in answers]
    flat = [answer for group in firsts for answer, _ in group]
    scored = iter(token_logprobs(base, [answer.trajectory for answer in flat]))
    evidence = [
        ImportanceSample(
            log_base=np.array([float(next(scored).sum()) for _ in found], np.float64),
            log_later=np.array([min(a.logprob, 0.0) for a, _ in found], np.float64),
            times=np.array([times for _, times in found], np.int64),
            num_samples=len(group),
            base_successes=base_counts.get(group[0].task.key, (0, 0))[0],
            base_samples=base_counts.get(group[0].task.key, (0, 0))[1],
        )
        for group, found in zip(answers, firsts, strict=True)
    ]
    keys = [group[0].task.key for group in answers]
    prompts = tuple(
        reach(one, key=key, confidence=confidence) for one, key in zip(evidence, keys, strict=True)
    )
    middle = (
        median_interval(
            [p.log10 for p in prompts],
            lows=[e.low(TAIL) for e in evidence],
            highs=[e.high(TAIL) for e in evidence],
            tail=TAIL,
            confidence=confidence,
        )
        if prompts
        else None
    )
    return TaskReach(
        task=task,
        prompts=prompts,
        skipped=skipped,
        log10=middle.value if middle else -math.inf,
        low=middle.low if middle else -math.inf,
        high=min(middle.high, 0.0) if middle else 0.0,
        confidence=confidence,
        seed=seed,
    )


def reach(evidence: ImportanceSample, *, key: str, confidence: float = 0.95) -> Reach:
    """Estimate, bounds and caveats of one prompt."""
    tail = (1 - confidence) / 2
    low, high = evidence.low(tail), evidence.high(tail)
    low = min(low, high)  # each may be wrong with small probability, so they may cross
    return Reach(
        key=key,
        log10=min(max(evidence.log10, low), high),
        low=low,
        high=high,
        floor=evidence.floor,
        weighted=evidence.weighted,
        num_samples=evidence.num_samples,
        successes=evidence.successes,
        distinct=len(evidence.times),
        effective=evidence.effective,
        largest=evidence.largest,
        base_successes=evidence.base_successes,
        base_samples=evidence.base_samples,
        doubt=evidence.doubt,
        confidence=confidence,
    )


def _distinct(answers: Sequence[Answer]) -> list[tuple[Answer, int]]:
    """Distinct successful token sequences with their counts, in order of first occurrence."""
    found: dict[bytes, tuple[Answer, int]] = {}
    for answer in answers:
        if answer.success:
            place = answer.tokens.tobytes()
            first, times = found.get(place, (answer, 0))
            found[place] = (first, times + 1)
    return list(found.values())
