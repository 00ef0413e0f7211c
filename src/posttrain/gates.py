"""Gates: decisions after a stage, on bounds of intervals rather than on their middle."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.probes.bootstrap import mean_interval
from posttrain.probes.measurement import TaskMeasurement
from posttrain.probes.passk import pass_at_k, pass_interval
from posttrain.recipe import Gate


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a gate, with the sentence that explains it."""

    passed: bool
    words: str


def decide(
    gate: Gate, *, base: TaskMeasurement, now: TaskMeasurement, confidence: float
) -> Decision:
    """Decide a gate. It passes only when the interval's cautious end does.

    Args:
        gate: what is asked.
        base: the base policy on the gate's task.
        now: the policy after the stage, on the same prompts.
        confidence: of the intervals.

    Raises:
        ConfigError: k is more than the number of samples.
    """
    k = int(gate.metric.partition("@")[2])
    if gate.at_least is not None:
        interval = pass_interval(now, k, confidence=confidence)
        passed = interval.low >= gate.at_least
        asked = f"at least {gate.at_least:g}"
        seen = f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    else:
        assert gate.at_most_lost is not None
        before, after = (pass_at_k(t.counts, t.num_samples, k) for t in (base, now))
        lost = mean_interval(before - after, lowest=-1.0, confidence=confidence)
        passed = lost.high <= gate.at_most_lost
        asked = f"at most {gate.at_most_lost:g} lost since the base"
        seen = f"lost {lost.value:.3f} [{lost.low:.3f}, {lost.high:.3f}]"
    verdict = "passed" if passed else f"not shown, so {gate.otherwise}"
    return Decision(passed, f"{gate.metric} on {gate.task}: {asked}; {seen}: {verdict}")
