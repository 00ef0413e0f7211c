"""One policy on one task set at a glance: how often it succeeds, what it reaches, how it drifted.

TaskMeasurement ──profile──▶ Profile: pass@k, support per prompt, KL, entropy, length
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.measure.bootstrap import Interval, student_interval
from posttrain.measure.distance import kl_base_column
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.passk import Curve, curve
from posttrain.measure.support import Label, labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the samples of one policy say on one task set, with intervals over prompts.

    The last three are means over prompts with Student's interval, since they have no upper bound;
    ``kl_base`` is None where the measurement has none, as that of the base.
    """

    task: str
    prompts: tuple[str, ...]  # [P]
    curve: Curve  # pass@k for k = 1, 2, 4, ...
    labels: tuple[Label, ...]  # [P] whether each prompt is in reach
    kl_base: Interval | None  # nats per answer, KL(policy ‖ base)
    entropy: Interval | None  # nats per token
    tokens: Interval | None  # per answer


def profile(task: TaskMeasurement, *, epsilon: float, confidence: float = 0.95) -> Profile:
    """The profile of one measurement.

    Args:
        task: what was sampled.
        epsilon: success probability below which a prompt is out of reach.
        confidence: of each label's bound, and of the two-sided intervals.
    """
    kl_base = task.find(kl_base_column)
    return Profile(
        task=task.taskset,
        prompts=task.prompts,
        curve=curve(task, confidence=confidence),
        labels=labels(task, epsilon=epsilon, confidence=confidence),
        kl_base=None if kl_base is None else _mean(kl_base, confidence),
        entropy=_mean(task.nll, confidence),
        tokens=_mean(task.lengths, confidence),
    )


def _mean(values: npt.NDArray[Any], confidence: float) -> Interval:
    """Mean of [P, n] values, with its interval over prompts."""
    return student_interval(values.mean(axis=1, dtype=np.float64), confidence=confidence)
