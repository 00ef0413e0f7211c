"""What a run reports to its observer. Plain values; the observer decides how to show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from posttrain.core.proofs import Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStarted:
    """A stage starts, resumes (``step`` > 0), or was already finished."""

    stage: str
    method: str
    provenance: str
    step: int
    steps: int
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One optimiser step.

    ``metrics`` holds loss, reward, entropy and others by name, and the time per activity as
    ``seconds/<name>`` (see ``clock.py``).
    """

    stage: str
    step: int
    steps: int
    seconds: float  # wall time since the previous step, drawing and scoring included
    num_tokens: int  # tokens that were sampled or trained on
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRaised:
    """A monitor of a running stage raised an alarm."""

    stage: str
    step: int
    words: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """A policy is being measured: ``done`` of ``total`` task sets."""

    policy: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A policy was measured: pass@1 per task set as (value, low, high)."""

    policy: str
    pass_at_1: Mapping[str, tuple[float, float, float]]
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GateDecided:
    """A gate was decided."""

    stage: str
    passed: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A log line, such as which file is being loaded or written."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """A comparison held: something is what it claims to be."""

    proof: Proof


Event = StageStarted | StepDone | AlarmRaised | Measuring | Measured | GateDecided | Note | Proved
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An observer that does nothing."""
