"""Every number that a gate may ask for, by name, and whether a policy can answer it.

METRICS        one number per prompt: the number itself, or its paired change since a policy
OF_ONE         readings of one policy as a whole
SINCE_READINGS readings of what changed since an earlier policy

All of them are read off samples that were taken anyway, so a decision can be replayed.
"""

from __future__ import annotations

from posttrain.core.errors import ConfigError, nearest
from posttrain.measure.bootstrap import Interval
from posttrain.measure.curves import cover
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.per_prompt import METRICS, metric_interval, parse
from posttrain.measure.reading import meaning
from posttrain.measure.readings import take, take_change
from posttrain.recipe import SINCE_READINGS

OF_ONE = (
    "in_share",
    "out_share",
    "undetermined_share",
    "band_share",
    "efficiency_gap",
    "needed_group",
    "token_entropy",
    "single_answer",
    "calibration_error",
    "verifier_disagreement",
)
"""Besides ``cover@t``: the share of prompts that are solved at a rate of t or more."""


def check_asked(name: str, *, samples: int, change: bool) -> None:
    """Refuse, before anything is trained, what could not be decided afterwards.

    Args:
        name: what a gate asks.
        samples: per prompt.
        change: True when its change is asked for rather than the number itself.

    Raises:
        ConfigError: no such name, more tries than samples, or a change of what has no number
            per prompt.

    Example:
        >>> check_asked("cover@0.5", samples=8, change=False)
    """
    stem = name.partition("@")[0]
    if stem in METRICS:
        key, k = parse(name)
        if METRICS[key].takes_k and k > samples:
            raise ConfigError(
                f"{name}, and every prompt is measured with {samples} samples",
                expected=f"k of {key}@k <= measure.samples",
                fix="raise measure.samples, or lower k",
            )
        return
    if name not in OF_ONE and name not in SINCE_READINGS and stem != "cover":
        known = [f"{m}@k" if METRICS[m].takes_k else m for m in METRICS]
        every = [*known, "cover@t", *OF_ONE, *SINCE_READINGS]
        raise ConfigError(
            f"no metric {name!r} for a gate", expected=", ".join(every), fix=nearest(name, every)
        )
    meaning(name)
    if change:
        raise ConfigError(
            f"a change of {name}, which has no number per prompt to pair",
            expected="at_least or at_most; or a change of " + ", ".join(METRICS),
        )


def asked_interval(
    name: str,
    now: TaskMeasurement,
    *,
    since: TaskMeasurement,
    change: bool,
    epsilon: float,
    confidence: float,
) -> Interval:
    """What was asked, with its interval.

    Args:
        name: see :func:`check_asked`.
        now: the policy asked about.
        since: the policy that a change is counted from.
        change: the paired change of the number rather than the number.
        epsilon: success rate from which a prompt is in reach.
        confidence: of the two-sided interval.

    Raises:
        ConfigError: what it needs was not measured.
        RunError: the two policies were not measured in the same way.
    """
    check_asked(name, samples=now.num_samples, change=change)
    if name.partition("@")[0] in METRICS:
        return metric_interval(name, now, since=since if change else None, confidence=confidence)
    if name.startswith("cover@"):
        return cover(now, float(name.partition("@")[2]), confidence=confidence).interval()
    found = (
        take_change(since, now, epsilon=epsilon, confidence=confidence)
        if name in SINCE_READINGS
        else take(now, epsilon=epsilon, confidence=confidence)
    )
    for reading in found:
        if reading.name == name:
            return reading.interval()
    if name == "retention":  # nothing was in reach that could have been lost: nothing is known
        return Interval(
            value=1.0,
            low=0.0,
            high=1.0,
            num_prompts=len(now.prompts),
            seed=0,
            confidence=confidence,
        )
    raise ConfigError(
        f"{now.taskset}: {name} was not measured",
        expected="samples with answers and log-probs, as this version takes them",
        fix="measure the policy again",
    )
