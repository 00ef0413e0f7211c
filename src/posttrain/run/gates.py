"""Gates: decisions after a stage, on bounds of intervals rather than on their middle.

measurements ──metric──▶ interval ──bound──▶ Verdict per gate ──▶ Detour: where the run goes on

A decision is a pure function of the gate and of measurements, so a run can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from posttrain.measure.asked import asked_interval
from posttrain.measure.bootstrap import Interval
from posttrain.measure.measurement import TaskMeasurement
from posttrain.recipe import Gate


class Verdict(StrEnum):
    """What an interval says about a bound."""

    SHOWN = "shown"  # all of it keeps the bound
    REFUTED = "refuted"  # all of it breaks the bound
    OPEN = "open"  # the bound lies inside


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a gate, with the sentence that explains it."""

    gate: Gate
    verdict: Verdict
    interval: Interval
    words: str

    @property
    def passed(self) -> bool:
        """True when shown; when open, as the gate says."""
        return self.verdict is Verdict.SHOWN or (
            self.verdict is Verdict.OPEN and self.gate.doubt == "passes"
        )


@dataclass(frozen=True, slots=True)
class Detour:
    """How a run goes on after a stage. The default: with the stage that follows."""

    rolled_back: bool = False  # the stage's result is left aside
    to: str | None = None  # the stage to go on with
    stopped_by: str | None = None  # the decision that ended the run, in words


def decide(
    gate: Gate,
    *,
    now: TaskMeasurement,
    since: TaskMeasurement,
    confidence: float,
    epsilon: float = 0.05,
) -> Decision:
    """Decide a gate.

    Args:
        gate: what is asked.
        now: the policy after the stage, on the gate's task.
        since: the policy that a change is counted from, on the same prompts.
        confidence: of the two-sided interval.
        epsilon: success rate from which a prompt is in reach, for gates on support.

    Raises:
        ConfigError: k is more than the number of samples, or the metric was not measured.
        RunError: the two policies were not measured in the same way.
    """
    ((name, bound),) = gate.asked.items()
    interval = asked_interval(
        gate.metric,
        now,
        since=since,
        change=gate.compares,
        epsilon=epsilon,
        confidence=confidence,
    )
    # A loss is a negative change: at most x lost is a change of at least -x.
    floor = name in ("at_least", "at_least_gained", "at_most_lost")
    limit = -bound if name == "at_most_lost" else bound
    shown = interval.low >= limit if floor else interval.high <= limit
    refuted = interval.high < limit if floor else interval.low > limit
    verdict = Verdict.SHOWN if shown else Verdict.REFUTED if refuted else Verdict.OPEN
    seen = f"{interval.value:+.3f}" if gate.compares else f"{interval.value:.3f}"
    edges = f"[{interval.low:.3f}, {interval.high:.3f}]"
    outcome = {
        Verdict.SHOWN: "shown",
        Verdict.REFUTED: "refuted",
        Verdict.OPEN: "not shown",
    }[verdict]
    decision = Decision(gate, verdict, interval, "")
    end = "passed" if decision.passed else f"so {_act(gate)}"
    words = f"{gate.metric} on {gate.task}: {gate.words}; {seen} {edges}: {outcome}, {end}"
    return Decision(gate, verdict, interval, words)


def detour(decisions: Sequence[Decision]) -> Detour:
    """What the decisions after one stage come to: stopping wins over going on elsewhere.

    A stage may be rolled back and the run branch as well; of several branches the first counts.
    """
    missed = [d for d in decisions if not d.passed]
    stops = [d.words for d in missed if d.gate.otherwise == "stop"]
    targets = [d.gate.to for d in missed if d.gate.otherwise == "branch"]
    return Detour(
        rolled_back=any(d.gate.otherwise == "roll_back" for d in missed),
        to=targets[0] if targets else None,
        stopped_by=stops[0] if stops else None,
    )


def _act(gate: Gate) -> str:
    return {
        "stop": "stop",
        "warn": "warn",
        "roll_back": "roll back",
        "branch": f"branch to {gate.to}",
    }[gate.otherwise]
