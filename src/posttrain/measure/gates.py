"""Gates: decisions after a stage, on bounds of intervals rather than on point estimates.

measurements ──metric──▶ interval ──bound──▶ GateVerdict per gate ──▶ Detour: where the run goes on

A gate may ask for any metric that is computed from a run's measurements (registry.py). A decision
is a pure function of the gate and of measurements, so a run can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from posttrain.core.bounds import Number
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.measure.bootstrap import Interval
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.registry import Asked, Estimation, find_metric, metrics
from posttrain.measure.spec import Measure
from posttrain.parts.base import PolicyRef


class Gate(Config):
    """A decision after a stage, taken on the bound of an interval, not on the point estimate.

    ``at_least`` and ``at_most`` ask for the metric itself; ``at_most_lost``, ``at_least_gained``
    and ``at_most_gained`` for its change, prompt by prompt, since another policy: ``base``,
    ``input`` (what the stage started from) or an earlier stage. A bound that the whole interval
    keeps is shown; one that the whole interval breaks is refuted; in between, ``doubt`` decides.

    ``otherwise`` is the action of a gate that does not pass: ``stop`` the run, ``warn``,
    ``roll_back`` (go on from what the stage started from) or ``branch`` to the later stage ``to``.

    Example: ``{task: products, metric: zero_variance@8, at_most: 0.6, otherwise: branch,
    to: guided}``
    """

    task: str
    metric: str = "pass@1"
    at_least: Number | None = None
    at_most: Number | None = None
    at_most_lost: Number | None = None
    at_least_gained: Number | None = None
    at_most_gained: Number | None = None
    since: PolicyRef = "base"
    doubt: Literal["fails", "passes"] = "fails"
    otherwise: Literal["stop", "warn", "roll_back", "branch"] = "stop"
    to: str | None = None

    def __post_init__(self) -> None:
        if len(self.asked) != 1:
            raise ConfigError(
                f"gate on {self.task} with {', '.join(self.asked) or 'no bound'}",
                expected="exactly one of at_least, at_most, at_most_lost, at_least_gained, "
                "at_most_gained",
            )
        if (self.otherwise == "branch") != (self.to is not None):
            raise ConfigError(
                f"gate on {self.task} with otherwise: {self.otherwise} and to: {self.to}",
                expected="`to`, a later stage, exactly when it branches",
            )
        if self.since != "base" and not self.looks_back:
            raise ConfigError(
                f"gate on {self.task} with since: {self.since}",
                expected="a bound on a change: at_most_lost, at_least_gained or at_most_gained; "
                f"or one of {', '.join(m.name for m in metrics() if m.looks_back)}",
            )

    @property
    def asked(self) -> dict[str, float]:
        """The requested bound, by its name: one entry."""
        bounds = {
            "at_least": self.at_least,
            "at_most": self.at_most,
            "at_most_lost": self.at_most_lost,
            "at_least_gained": self.at_least_gained,
            "at_most_gained": self.at_most_gained,
        }
        return {name: bound for name, bound in bounds.items() if bound is not None}

    @property
    def compares(self) -> bool:
        """True when it asks for a change since another policy."""
        return not self.asked.keys() & {"at_least", "at_most"}

    @property
    def looks_back(self) -> bool:
        """True when it needs another policy as a baseline."""
        return self.compares or any(m.name == self.metric for m in metrics() if m.looks_back)

    @property
    def words(self) -> str:
        """The condition in words."""
        ((name, bound),) = self.asked.items()
        since = f" since {self.since}" if self.looks_back else ""
        head, _, tail = name.removeprefix("at_").partition("_")
        return f"at {head} {bound:g}{' ' + tail if tail else ''}{since}"


# --- conditions ------------------------------------------------------------------------------


def check_gate(gate: Gate, spec: Measure) -> None:
    """Refuse, before anything is trained, a gate that could not be decided afterwards.

    Raises:
        ConfigError: no such metric, more tries than samples, a change of a metric without a value
            per prompt, or a metric that this sampling does not give.

    Example:
        >>> check_gate(Gate(task="sums", metric="cover@0.5", at_least=0.5), Measure(samples=8))
    """
    name, metric = gate.metric, _askable(gate.metric).metric
    k, parameter = find_metric(name).k, metric.parameter
    if parameter is not None and parameter.whole and k > spec.samples:
        raise ConfigError(
            f"{name}, and every prompt is measured with {spec.samples} samples",
            expected=f"{parameter.letter} of {metric.name} <= measure.samples",
            fix=f"raise measure.samples, or lower {parameter.letter}",
        )
    if gate.compares and not metric.pairs:
        pairs = ", ".join(m.name for m in metrics() if m.pairs)
        raise ConfigError(
            f"a change of {name}, which has no number per prompt to pair",
            expected=f"at_least or at_most; or a change of {pairs}",
        )
    if any(c.plain_sampling for c in metric.columns) and spec.sampling != SamplingSpec():
        raise ConfigError(
            f"{name} with tempered or truncated sampling",
            expected="measure.sampling at temperature 1, without truncation",
        )


def _askable(name: str) -> Asked:
    """The metric, if a gate may ask for it."""
    every = ", ".join(m.name for m in metrics() if m.can_be_asked)
    try:
        asked = find_metric(name)
    except ConfigError as error:
        raise ConfigError(
            f"no metric {name!r} for a gate", expected=error.expected or every, fix=error.fix
        ) from None
    if not asked.metric.can_be_asked:
        raise ConfigError(f"no metric {name!r} for a gate", expected=every)
    return asked


def gate_interval(
    gate: Gate, *, now: TaskMeasurement, since: TaskMeasurement, how: Estimation
) -> Interval:
    """The metric or change that the gate asks for, with its interval.

    Raises:
        ConfigError: no such metric, k above the number of samples, or its raw data was not
            measured.
        RunError: the two policies were not measured in the same way.
    """
    asked = _askable(gate.metric)
    metric, k, estimator = asked.metric, asked.k, asked.metric.estimator
    assert estimator is not None
    for task in (now, since) if gate.looks_back else (now,):
        for column in metric.columns:
            task.need(column)
    if gate.compares:
        return estimator.change(now, since, k, how)
    found = estimator.read(now, since, k, how)
    if found is not None:
        return found.interval
    if metric.unknown is None:
        raise ConfigError(
            f"{now.taskset}: {gate.metric} cannot be told from these samples",
            fix="measure the policy again, with more samples",
        )
    value, low, high = metric.unknown
    return Interval(
        value=value,
        low=low,
        high=high,
        num_prompts=len(now.prompts),
        seed=how.seed,
        confidence=how.confidence,
    )


# --- deciding --------------------------------------------------------------------------------


class GateVerdict(StrEnum):
    """The verdict of an interval on a bound."""

    SHOWN = "shown"  # all of it keeps the bound
    REFUTED = "refuted"  # all of it breaks the bound
    OPEN = "open"  # the bound lies inside


@dataclass(frozen=True, slots=True)
class GateDecision:
    """The outcome of a gate, with the sentence that explains it."""

    gate: Gate
    verdict: GateVerdict
    interval: Interval
    words: str

    @property
    def passed(self) -> bool:
        """True when shown; when open, according to the gate's ``doubt``."""
        return self.verdict is GateVerdict.SHOWN or (
            self.verdict is GateVerdict.OPEN and self.gate.doubt == "passes"
        )


@dataclass(frozen=True, slots=True)
class Detour:
    """How a run goes on after a stage. The default: with the stage that follows."""

    rolled_back: bool = False  # the stage's result is not used
    to: str | None = None  # the stage to go on with
    stopped_by: str | None = None  # the decision that ended the run, in words


def decide(
    gate: Gate,
    *,
    now: TaskMeasurement,
    since: TaskMeasurement,
    confidence: float,
    epsilon: float = 0.05,
) -> GateDecision:
    """Decide a gate.

    Args:
        gate: the condition.
        now: the policy after the stage, on the gate's task.
        since: the baseline of a change, on the same prompts.
        confidence: of the two-sided interval.
        epsilon: success rate from which a prompt is in reach, for gates on support.

    Raises:
        ConfigError: k is more than the number of samples, or the metric was not measured.
        RunError: the two policies were not measured in the same way.
    """
    ((name, bound),) = gate.asked.items()
    how = Estimation(confidence=confidence, epsilon=epsilon)
    interval = gate_interval(gate, now=now, since=since, how=how)
    # A loss is a negative change: at most x lost is a change of at least -x.
    floor = name in ("at_least", "at_least_gained", "at_most_lost")
    limit = -bound if name == "at_most_lost" else bound
    shown = interval.low >= limit if floor else interval.high <= limit
    refuted = interval.high < limit if floor else interval.low > limit
    verdict = GateVerdict.SHOWN if shown else GateVerdict.REFUTED if refuted else GateVerdict.OPEN
    seen = f"{interval.value:+.3f}" if gate.compares else f"{interval.value:.3f}"
    edges = f"[{interval.low:.3f}, {interval.high:.3f}]"
    outcome = {
        GateVerdict.SHOWN: "shown",
        GateVerdict.REFUTED: "refuted",
        GateVerdict.OPEN: "not shown",
    }[verdict]
    decision = GateDecision(gate, verdict, interval, "")
    end = "passed" if decision.passed else f"so {_act(gate)}"
    words = f"{gate.metric} on {gate.task}: {gate.words}; {seen} {edges}: {outcome}, {end}"
    return GateDecision(gate, verdict, interval, words)


def detour(decisions: Sequence[GateDecision]) -> Detour:
    """The combined effect of the decisions after one stage: stopping wins over branching.

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
