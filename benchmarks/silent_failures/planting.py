"""How a fault is planted, and how it is known that nothing went wrong.

@planted("weights-nan", names="nan|finite")
def weights_nan(setup): ...          # a function that changes the inputs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from silent_failures.result import Result
from silent_failures.world import Setup

Side = Literal["posttrain", "trl"]
Patch = Callable[[Side], None]
Right = Callable[[Result, Result], bool]
"""(the run with the fault, its twin) -> nothing went wrong."""


def nothing(setup: Setup) -> None:
    """Change nothing."""


@dataclass(kw_only=True)
class Planter:
    """Where the fault enters a run."""

    fault: Callable[[Setup], None] = nothing  # before it
    twin: Callable[[Setup], None] = nothing
    names: str = ""  # pattern of words that would name the fault, in lower case
    right: Right | None = None
    must_work: bool = False  # a refusal is the fault itself
    patch: Patch | None = None  # in the process of the faulty run
    stop: Literal["", "interrupt", "terminate"] = ""  # the first of two runs, in the middle
    twin_stops: bool = True
    between: Callable[[Setup], None] | None = None  # before the second run, with the fault only
    stages: int = 1  # of the first of two runs; the second has all
    then: tuple[str, ...] = ()  # posttrain's commands on the finished run, after `between`


PLANTERS: dict[str, Planter] = {}


def planted(name: str, **how: object) -> Callable[[Callable[[Setup], None]], Planter]:
    """Register the function as the planter of a fault."""

    def register(function: Callable[[Setup], None]) -> Planter:
        PLANTERS[name] = Planter(fault=function, **how)  # type: ignore[arg-type]
        return PLANTERS[name]

    return register


def same_as_twin(result: Result, twin: Result) -> bool:
    """The trained weights are those of the twin, to the last bit."""
    return result.weights is not None and result.weights == twin.weights


def same_rewards(result: Result, twin: Result) -> bool:
    """The rewards of every step are those of the twin."""
    return bool(result.rewards) and result.rewards == twin.rewards


def finished(result: Result, twin: Result) -> bool:
    """The run took all its steps."""
    return result.end == "finished" and result.steps == twin.steps


def in_rows(text: str) -> Right:
    """The text is in the trained tokens of a row."""
    return lambda result, twin: any(text in row for row in result.trained)
