"""Scaffold against bare policy: what help at run time adds, and how much of it was amortised.

one or two measurements, a scaffold ──score per prompt [P]──▶ amortisation_gap, amortised_share

A scaffold is either part of the measurement (examples or a hint in the prompt, another decoding)
or made of the policy's own samples: the best of k by the verifier, or the commonest of k answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from posttrain.core.errors import ConfigError, RunError
from posttrain.measure.bootstrap import Floats, function_interval, mean_interval
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.passk import pass_at_k
from posttrain.measure.reading import Reading, reading
from posttrain.measure.voting import majority


class Help(StrEnum):
    """What is done with a policy's samples before they count."""

    NONE = "one sample"
    BEST = "the best of k by the verifier"
    MAJORITY = "the commonest of k answers"


@dataclass(frozen=True, slots=True)
class Scaffold:
    """Help at run time, from ``k`` samples.

    Example:
        >>> str(Scaffold(Help.MAJORITY, 16))
        'the commonest of 16 answers'
    """

    help: Help = Help.NONE
    k: int = 1

    def __str__(self) -> str:
        return str(self.help).replace(" k ", f" {self.k} ")

    def scores(self, task: TaskMeasurement) -> Floats:
        """[P] expected success with this help, without bias.

        Raises:
            ConfigError: k outside 1 to n, or votes without answers.
        """
        match self.help:
            case Help.NONE:
                return pass_at_k(task.counts, task.num_samples, 1)
            case Help.BEST:
                return pass_at_k(task.counts, task.num_samples, self.k)
            case Help.MAJORITY:
                return majority(task, self.k)


def amortisation_gap(
    bare: TaskMeasurement,
    scaffolded: TaskMeasurement | None = None,
    *,
    scaffold: Scaffold | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reading:
    """Score with the scaffold minus score of the bare policy, paired by prompt.

    Args:
        bare: the policy as it is; one sample counts.
        scaffolded: the same prompts measured with help, such as a hint. None: the bare samples.
        scaffold: what is done with the samples of ``scaffolded``.
        confidence: of the two-sided interval.
        seed: of the bootstrap.

    Raises:
        ConfigError: neither a second measurement nor a scaffold.
        RunError: other prompts or another threshold of success.
    """
    how = scaffold or Scaffold()
    if scaffolded is None and how.help is Help.NONE:
        raise ConfigError(
            "a policy compared with itself without a scaffold",
            expected="a second measurement, or a scaffold such as Scaffold(Help.MAJORITY, 16)",
        )
    helped = bare if scaffolded is None else scaffolded
    _require_same_prompts(bare, helped)
    gap = how.scores(helped) - Scaffold().scores(bare)
    interval = mean_interval(gap, lowest=-1.0, confidence=confidence, seed=seed)
    means = f"with {how}" if scaffolded is None else f"with help and {how}"
    words = f"{means} the policy succeeds {interval.value:+.2f} more often than by itself"
    return reading(
        "amortisation_gap", bare.taskset, interval, samples=bare.num_samples, words=words
    )


def amortised_share(
    before: TaskMeasurement,
    after: TaskMeasurement,
    scaffolded: TaskMeasurement | None = None,
    *,
    scaffold: Scaffold | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reading | None:
    """Gain of the bare policy as a share of what the scaffold had gained before training.

    (after − before) / (scaffolded − before), all in success rates (after arXiv 2604.07941, section
    7.2; the formula is ours). Above 1 the policy learned more than the scaffold showed, below 0 it
    lost. None when it is not certain that the scaffold gained anything: there is nothing to share.

    Raises:
        ConfigError: neither a second measurement nor a scaffold.
        RunError: other prompts or another threshold of success.
    """
    how = scaffold or Scaffold()
    gap = amortisation_gap(before, scaffolded, scaffold=how, confidence=confidence, seed=seed)
    if gap.low <= 0:
        return None
    _require_same_prompts(before, after)
    helped = before if scaffolded is None else scaffolded
    first, then, top = (
        Scaffold().scores(before),
        Scaffold().scores(after),
        how.scores(helped),
    )
    columns = np.stack([then - first, top - first], axis=1)
    mean_then, mean_gain = columns.mean(axis=0).tolist()
    share = mean_then / mean_gain
    interval = function_interval(
        columns,
        lambda m: np.asarray(m[:, 0] / np.maximum(m[:, 1], 1e-9)),
        bounds=(-np.inf, np.inf),
        # (d − share·g) / mean g, with a gain d of the bare policy and g of the scaffold within 1
        extremes=((-1 - abs(share)) / mean_gain, (1 + abs(share)) / mean_gain),
        confidence=confidence,
        seed=seed,
    )
    words = f"{interval.value:.0%} of what the scaffold added is now done without it"
    return reading(
        "amortised_share", after.taskset, interval, samples=after.num_samples, words=words
    )


def _require_same_prompts(one: TaskMeasurement, other: TaskMeasurement) -> None:
    """The scaffold may change decoding, samples and template, not the questions or the bar."""
    if one.prompts != other.prompts or one.success != other.success:
        raise RunError(
            f"{one.taskset} and {other.taskset}: other prompts, or success from a score of "
            f"{one.success} and {other.success}",
            expected="the same questions and the same bar, with and without the scaffold",
        )
