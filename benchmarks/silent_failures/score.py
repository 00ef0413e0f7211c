"""From what a run did and said to one of five verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from silent_failures.faults import Fault
from silent_failures.planting import Planter
from silent_failures.result import Result
from silent_failures.world import STEPS


class Verdict(StrEnum):
    """What became of a fault."""

    REFUSED = "refused"  # an error before the first step, or before the next one after a stop
    RIGHT = "done right"  # the result is that of the twin, or what was meant
    ALARMED = "alarmed"  # within 20 steps: an error, an alarm, or a line that names it
    SCORE = "final score"
    NEVER = "never"
    WRONGLY = "wrongly refused"  # the inputs are right, and were turned away
    BROKEN = "the twin fails"  # a fault of this bench, or a false alarm
    LEFT_OUT = "does not apply"


NOTICED = (Verdict.REFUSED, Verdict.RIGHT, Verdict.ALARMED)


class Judged(msgspec.Struct, kw_only=True):
    """One fault on one side."""

    id: str
    side: str
    verdict: Verdict
    words: str = ""  # what was said
    traceback: bool = False
    seconds: float = 0.0


def judge(fault: Fault, planter: Planter, result: Result, twin: Result) -> tuple[Verdict, str]:
    """The verdict, and the words that decided it."""
    if twin.end != "finished":
        return Verdict.BROKEN, twin.words or twin.end
    new = result.steps - result.before
    if result.end == "error" and planter.must_work:
        return Verdict.WRONGLY, result.words
    if result.end == "error" and new == 0:
        return Verdict.REFUSED, result.words
    if planter.right is not None and result.end == "finished" and planter.right(result, twin):
        return Verdict.RIGHT, ""
    if result.end == "error" and new <= STEPS:
        return Verdict.ALARMED, f"step {new}: {result.words}"
    known = {name(words) for _, words in twin.alarms}
    for step, words in result.alarms:
        if name(words) not in known:
            return Verdict.ALARMED, f"step {step + 1}: {words}"
    if said := named(result.said, twin.said, planter.names):
        return Verdict.ALARMED, said
    return Verdict(str(fault.silent)), "hung" if result.end == "hung" else ""


def name(words: str) -> str:
    """The name of an alarm."""
    return words.partition(":")[0]


def named(lines: Iterable[str], twin: Iterable[str], pattern: str) -> str | None:
    """The first line that the twin does not have and that names the fault. Numbers do not count."""
    if not pattern:
        return None
    known = {_plain(line) for line in twin}
    for line in lines:
        figures = line.startswith("{")  # a step's metrics are shown, and warn of nothing
        if not figures and _plain(line) not in known and re.search(pattern, line.lower()):
            return line
    return None


def _plain(line: str) -> str:
    return re.sub(r"[\d.]+|/\S+", "#", line)
