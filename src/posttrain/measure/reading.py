"""What every probe gives: a number, its interval, and one sentence that says what it means.

samples ──probe──▶ Reading ──name, value, bounds──▶ rules, gates, tables

NAMES is the list of all names. A name is a stable identifier that rules and recipes may use; a
number in it, as in ``pass@64``, is listed once as ``pass@k``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from posttrain.core.errors import ConfigError, nearest
from posttrain.measure.bootstrap import Interval

FEWEST = 5
"""Prompts from which on a task set can carry a finding. Below it no resampling of prompts tells
how much they differ: the commands refuse, and a table warns."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A probe's number with a two-sided interval of the stated ``confidence``.

    ``low`` <= ``value`` <= ``high``. An infinite value is a finding too: no group size suffices,
    no crossover was seen. ``units`` are the prompts behind the number and ``samples`` the samples
    per prompt. ``words`` is one plain sentence.

    Raises:
        ConfigError: a name that NAMES does not list, NaN, or bounds on the wrong side.

    Example:
        >>> r = Reading("pass@1", "sums", 0.5, 0.4, 0.6, 32, 64, "half of all tries succeed")
        >>> r.meaning.better, r.confidence
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
        meaning(self.name)
        if not self.low <= self.value <= self.high:
            raise ConfigError(
                f"{self.name} on {self.task}: {self.value} in [{self.low}, {self.high}]",
                expected="numbers with low <= value <= high",
            )

    @property
    def meaning(self) -> Meaning:
        """What the name stands for."""
        return meaning(self.name)

    def interval(self, *, seed: int = 0) -> Interval:
        """The number and its bounds alone."""
        return Interval(
            value=self.value,
            low=self.low,
            high=self.high,
            num_prompts=self.units,
            seed=seed,
            confidence=self.confidence,
        )

    @property
    def is_certain(self) -> bool:
        """True when the interval is a point: something counted, not estimated."""
        return self.low == self.high


class Better(StrEnum):
    """Which way is good."""

    HIGHER = "higher is better"
    LOWER = "lower is better"
    NEITHER = "neither is better by itself"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name stands for, in which unit, which way is good, and who defined it."""

    words: str
    unit: str
    better: Better
    source: str


_UP, _DOWN, _OPEN = Better.HIGHER, Better.LOWER, Better.NEITHER

NAMES: Mapping[str, Meaning] = MappingProxyType(
    {
        # --- success ---------------------------------------------------------------------------
        "pass@k": Meaning("at least one of k tries succeeds", "probability", _UP, "2107.03374"),
        "pass^k": Meaning("all of k tries succeed", "probability", _UP, "2406.12045"),
        "best@k": Meaning("expected best score of k tries", "score", _UP, "2608.00220"),
        "maj@k": Meaning("the commonest of k answers is right", "probability", _UP, "2203.11171"),
        "cover@t": Meaning("prompts solved at a rate of t or more", "share", _UP, "2510.08325"),
        "efficiency_gap": Meaning(
            "pass@n minus pass@1: what choosing better could gain",
            "probability",
            _DOWN,
            "2504.13837",
        ),
        "crossover": Meaning(
            "smallest k at which the later policy's pass@k is below the earlier one's",
            "tries",
            _UP,
            "2504.13837",
        ),
        "sharpening_tax": Meaning(
            "how much less a further try helps the later policy, in shares of failures",
            "share",
            _DOWN,
            "2610.01509",
        ),
        # --- support ---------------------------------------------------------------------------
        "in_share": Meaning("prompts in reach", "share", _UP, "2507.14843"),
        "out_share": Meaning("prompts out of reach", "share", _DOWN, "2507.14843"),
        "undetermined_share": Meaning(
            "prompts with too few samples to say", "share", _OPEN, "2507.14843"
        ),
        "expanded_share": Meaning("prompts that came into reach", "share", _UP, "2507.14843"),
        "shrunk_share": Meaning("prompts that went out of reach", "share", _DOWN, "2507.14843"),
        "reach_log10": Meaning(
            "log10 of the policy's success probability, estimated from another's successes",
            "log10",
            _UP,
            "importance sampling",
        ),
        # --- signal for on-policy learning -----------------------------------------------------
        "all_wrong": Meaning("prompts with no success in n", "share", _DOWN, "2509.25849"),
        "all_right": Meaning("prompts with no failure in n", "share", _OPEN, "2509.25849"),
        "band_share": Meaning(
            "prompts with a success rate from 0.2 to 0.8", "share", _UP, "2605.26606"
        ),
        "informative@g": Meaning(
            "a group of g samples holds a success and a failure", "probability", _UP, "2503.14476"
        ),
        "needed_group": Meaning(
            "group size at which the stated share of groups is informative",
            "samples",
            _DOWN,
            "arithmetic",
        ),
        # --- diversity and form ----------------------------------------------------------------
        "answer_entropy": Meaning("entropy of the final answer", "nats", _OPEN, "2507.14843"),
        "token_entropy": Meaning("entropy of the next token", "nats", _OPEN, "2505.22617"),
        "distinct_answers": Meaning(
            "different answers to a prompt", "answers", _OPEN, "2507.14843"
        ),
        "single_answer": Meaning(
            "prompts with the same answer in all samples", "share", _OPEN, "2507.14843"
        ),
        "self_bleu": Meaning(
            "likeness of a prompt's samples to each other", "0 to 1", _OPEN, "1802.01886"
        ),
        "repetition": Meaning("4-grams of a sample that it repeats", "share", _DOWN, "1908.04319"),
        "truncated": Meaning("samples that the budget cut off", "share", _DOWN, "2604.08527"),
        "answer_room": Meaning(
            "prompts whose known right answer takes at most half of the token budget",
            "share",
            _UP,
            "count",
        ),
        "tokens_per_answer": Meaning("tokens of a sample", "tokens", _DOWN, "count"),
        "calibration_error": Meaning(
            "confidence (share of equal answers) against success",
            "probability",
            _DOWN,
            "1706.04599",
        ),
        "verifier_disagreement": Meaning(
            "answers scored otherwise at a second look", "share", _DOWN, "count"
        ),
        # --- over several policies -------------------------------------------------------------
        "retention": Meaning("earlier success that survived", "share", _UP, "1706.08840"),
        "backward_transfer": Meaning(
            "pass@1 at the end minus pass@1 just after the task's own stage",
            "probability",
            _UP,
            "1706.08840",
        ),
        "forward_transfer": Meaning(
            "pass@1 before the task's own stage minus pass@1 of the base",
            "probability",
            _UP,
            "1706.08840",
        ),
        "forgetting": Meaning(
            "best earlier pass@1 minus pass@1 at the end", "probability", _DOWN, "1801.10112"
        ),
        "handoff": Meaning(
            "prompts gained by a stage that the next stage still solves",
            "share",
            _UP,
            "2604.07941",
        ),
        "amortisation_gap": Meaning(
            "score with the scaffold minus score of the bare policy",
            "probability",
            _DOWN,
            "2604.07941",
        ),
        "amortised_share": Meaning(
            "gain of the bare policy as a share of the gain with the scaffold",
            "share",
            _UP,
            "2604.07941",
        ),
        # --- with log-probs or special rollouts ------------------------------------------------
        "kl_forward": Meaning(
            "KL(base, policy) on the base's samples", "nats", _OPEN, "2509.04259"
        ),
        "kl_reverse": Meaning(
            "KL(policy, base) on the policy's samples", "nats", _OPEN, "2509.04259"
        ),
        "kl_prior": Meaning("KL from the base on earlier tasks", "nats", _DOWN, "2607.04364"),
        "base_perplexity": Meaning(
            "perplexity of the policy's successes under the base", "1 or more", _OPEN, "2504.13837"
        ),
        "teacher_forced_accuracy": Meaning(
            "next tokens foreseen along a correct answer", "share", _UP, "2204.01171"
        ),
        "own_rollout_accuracy": Meaning(
            "next tokens foreseen along own rollouts", "share", _UP, "2204.01171"
        ),
        "exposure_excess": Meaning(
            "error on own prefixes over error on correct prefixes, minus 1",
            "ratio",
            _DOWN,
            "2204.01171",
        ),
        "recovery": Meaning(
            "answers that leave the demonstrations and still succeed", "share", _UP, "definition"
        ),
        "continue@f": Meaning(
            "success when a share f of a correct answer is given", "probability", _UP, "2604.07941"
        ),
    }
)
"""Every reading there is, by name; ids are of arXiv."""

_PARAMETER = re.compile(r"^([a-z]+)([@^])(\d+(?:\.\d+)?)$")


def meaning(name: str) -> Meaning:
    """What a reading's name stands for.

    Raises:
        ConfigError: no such name, or its number is missing or out of range; names the nearest.

    Example:
        >>> meaning("pass@64").words
        'at least one of k tries succeeds'
        >>> meaning("cover@0.5").unit
        'share'
    """
    found = _PARAMETER.match(name)
    if found is None and name in NAMES and not re.search(r"[@^][a-z]$", name):
        return NAMES[name]
    if found is not None:
        stem, mark, digits = found.groups()
        for letter in "kgtf":
            listed = f"{stem}{mark}{letter}"
            if listed not in NAMES:
                continue
            whole, number = letter in "kg", float(digits)
            if (digits.isdigit() and number >= 1) if whole else 0 <= number <= 1:
                return NAMES[listed]
            raise ConfigError(
                f"no reading {name!r}",
                expected=f"{listed} with {'a whole number' if whole else '0 to 1'} for {letter}",
            )
    raise ConfigError(f"no reading {name!r}", fix=nearest(name, NAMES))


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
    """A number as people read it; infinity as such.

    Example:
        >>> number_words(0.125), number_words(math.inf)
        ('0.12', 'none')
    """
    return "none" if math.isinf(value) else f"{value:.{digits}f}"
