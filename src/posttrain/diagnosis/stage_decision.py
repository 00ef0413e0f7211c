"""Whether a stage helped, and whether its policy is kept: decided on bounds of paired changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.measure.bootstrap import Interval, mean_interval
from posttrain.measure.measurement import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDecision:
    """Whether a stage helped what it was for, and whether its policy is gone on from."""

    helped: bool
    kept: bool
    words: str


def decide_stage(
    before: Measurement,
    after: Measurement,
    *,
    treated: Sequence[str],
    counted: Sequence[str],
    confidence: float,
) -> StageDecision:
    """Decide about a stage on the bounds of paired changes of pass@1.

    It helped when the mean over the treated task sets certainly rose. It did harm when the mean
    over all counted ones certainly fell; then it is rolled back, as it is when it did not help
    and the mean over all did not rise either.

    Args:
        before: the policy that the stage started from.
        after: the policy after it, measured in the same way.
        treated: the task sets that it was for.
        counted: all that matter.
        confidence: of the intervals.
    """
    aim = _change(before, after, treated, confidence=confidence)
    whole = _change(before, after, counted, confidence=confidence)
    helped, harmed = aim.low > 0, whole.high < 0
    kept = not harmed and (helped or whole.value > 0)
    said = "helped" if helped else "did not certainly help"
    words = f"{said} {', '.join(treated)} ({_signed(aim)}); all together {_signed(whole)}: " + (
        "kept" if kept else "rolled back"
    )
    return StageDecision(helped=helped, kept=kept, words=words)


def _change(
    before: Measurement, after: Measurement, names: Sequence[str], *, confidence: float
) -> Interval:
    """Mean over task sets of the mean change of pass@1, with its interval over prompts."""
    parts = [
        after.task(n).successes.mean(axis=1) - before.task(n).successes.mean(axis=1) for n in names
    ]
    total = sum(len(p) for p in parts)
    # Task sets count alike, whatever their number of prompts.
    scaled = [p * total / (len(parts) * len(p)) for p in parts]
    most = max(total / (len(parts) * len(p)) for p in parts)
    return mean_interval(np.concatenate(scaled), lowest=-most, highest=most, confidence=confidence)


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
