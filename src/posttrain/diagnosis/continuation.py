"""Success from a correct prefix of the answer: where does a policy fail?

demonstrations ──first 0, ¼, ½, ¾ of the answer──▶ prompts ──policy completes──▶ success per share

    success   no prefix       short prefix      long prefix    what is missing
              high            high              high           nothing
              low             high              high           entry: it starts wrong
              low             low               high           skill at intermediate steps
              low             low               low            support

The probe gives the curve and its differences; rules interpret them. Shape legend:
``P`` prompts, ``S`` shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.core.provenance import IntArray
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import TaskSet
from posttrain.diagnosis.drawing import Demonstration, check_prompts, draw_answers
from posttrain.measure.bootstrap import Interval, mean_interval
from posttrain.measure.reading import Reading, reading
from posttrain.protocols import Policy

SHARES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Continuation:
    """Success rates from the first ``shares`` of right answers, [P, S] over the same prompts."""

    task: str
    prompts: tuple[str, ...]  # [P]
    shares: tuple[float, ...]  # [S] requested, rising
    given: tuple[float, ...]  # [S] actual mean share, after rounding to whole tokens
    rates: npt.NDArray[np.float64]  # [P, S]
    samples: int  # per prompt and share, at least
    confidence: float
    seed: int

    def success(self, share: float) -> Interval:
        """Mean over prompts of the success rate from this share, with its interval.

        Raises:
            ConfigError: a share that was not measured.
        """
        column = self.rates[:, self._index(share)]
        return mean_interval(column, confidence=self.confidence, seed=self.seed)

    def gain(self, low: float, high: float) -> Interval:
        """Success from ``high`` minus success from ``low``, paired by prompt, with its interval.

        ``gain(0, 0.25)`` is the loss at entry, ``gain(0.25, 0.75)`` the loss at intermediate
        steps; 1 − ``success(0.75)`` is the loss that no prefix removes.
        """
        change = self.rates[:, self._index(high)] - self.rates[:, self._index(low)]
        return mean_interval(change, confidence=self.confidence, seed=self.seed, lowest=-1.0)

    def _index(self, share: float) -> int:
        if share not in self.shares:
            raise ConfigError(
                f"success from {share} of an answer", expected=f"one of {list(self.shares)}"
            )
        return self.shares.index(share)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """``continue@0``, ``continue@0.25`` and so on."""
        out = []
        for share, given in zip(self.shares, self.given, strict=True):
            interval = self.success(share)
            words = f"{interval.value:.0%} of answers succeed when " + (
                f"the first {given:.0%} of a right one is given" if given else "nothing is given"
            )
            out.append(
                reading(
                    f"continue@{share:g}", self.task, interval, samples=self.samples, words=words
                )
            )
        return tuple(out)


def continuation(
    policy: Policy,
    taskset: TaskSet,
    demonstrations: Sequence[Demonstration],
    *,
    samples: int = 16,
    max_new_tokens: int,
    seed: int,
    shares: Sequence[float] = SHARES,
    sampling: SamplingSpec = SamplingSpec(),
    confidence: float = 0.95,
) -> Continuation:
    """Let a policy complete right answers from prefixes of several lengths.

    A share f gives the first ⌊f·(A − 1)⌋ of an answer's A tokens, its end of turn not counted:
    never more than requested, so short answers get less (``given`` is the actual share).
    Several demonstrations of one prompt are averaged, so that prompts have equal weight.

    Demonstrations may come from data, from a teacher or a later policy, or be the policy's own
    successes. The last kind does not cover prompts that it never solves, and is biased upwards:
    the policy has completed such a prefix before.

    Args:
        policy: the policy that completes them.
        taskset: the scorer.
        demonstrations: right answers in the policy's own tokens, at least one.
        samples: answers per demonstration and share; at share 0 per prompt.
        max_new_tokens: budget of a whole answer, the prefix included.
        seed: of the draws.
        shares: rising, from 0 on, below 1.
        sampling: decoding.
        confidence: of the intervals.

    Raises:
        ConfigError: no demonstrations, or shares that are not rising in [0, 1).
        TaskError: a prompt with its prefix leaves no room; nothing was drawn.
    """
    shares = _checked(demonstrations, samples, shares)
    keys = list(dict.fromkeys(d.task.key for d in demonstrations))
    place = {key: i for i, key in enumerate(keys)}
    # A prompt without a prefix is the same for all its demonstrations.
    firsts = list({d.task.key: d for d in demonstrations}.values())
    chosen = [firsts if share == 0 else list(demonstrations) for share in shares]
    heads = [
        [prefix_of(d.tokens, share) for d in some]
        for some, share in zip(chosen, shares, strict=True)
    ]
    tasks = [d.task for some in chosen for d in some]
    flat = [head for some in heads for head in some]
    check_prompts(policy, tasks, given=flat)
    groups = iter(
        draw_answers(
            policy,
            taskset,
            tasks,
            samples=samples,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            given=flat,
        )
    )
    sums, counts = np.zeros((2, len(keys), len(shares)))
    for column, some in enumerate(chosen):
        for demonstration in some:
            row = place[demonstration.task.key]
            sums[row, column] += np.mean([a.success for a in next(groups)])
            counts[row, column] += 1
    return Continuation(
        task=taskset.name,
        prompts=tuple(keys),
        shares=shares,
        given=tuple(_given(some, cut) for some, cut in zip(chosen, heads, strict=True)),
        rates=sums / counts,
        samples=samples,
        confidence=confidence,
        seed=seed,
    )


def _checked(
    demonstrations: Sequence[Demonstration], samples: int, shares: Sequence[float]
) -> tuple[float, ...]:
    shares = tuple(float(s) for s in shares)
    if not demonstrations or samples < 1:
        raise ConfigError(
            f"a continuation probe with {len(demonstrations)} demonstrations, {samples} samples",
            expected="at least one right answer to begin with, and one sample",
            fix="give demonstrations, a teacher, or prompts that the policy sometimes solves",
        )
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] < 1:
        raise ConfigError(f"shares {list(shares)}", expected="rising, each from 0 to below 1")
    return shares


def prefix_of(tokens: IntArray, share: float) -> IntArray:
    """The first ``share`` of an answer, its end of turn not counted, rounded down.

    Example:
        >>> prefix_of(np.array([5, 6, 7, 8, 0]), 0.75).tolist()
        [5, 6, 7]
        >>> prefix_of(np.array([5, 6, 0]), 0.25).tolist()
        []
    """
    return tokens[: int(share * (len(tokens) - 1) + 1e-9)]


def _given(demonstrations: Sequence[Demonstration], heads: Sequence[IntArray]) -> float:
    """Mean share of the answers' tokens that was actually given."""
    lengths = [max(len(d.tokens) - 1, 1) for d in demonstrations]
    return float(np.mean([len(h) / n for h, n in zip(heads, lengths, strict=True)]))
