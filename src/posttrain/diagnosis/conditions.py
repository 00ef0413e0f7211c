"""From evidence to a diagnosis: rules decided on bounds, never on the middle of an interval.

Evidence ──Rule by order──▶ holds · fails · open · not looked at ──▶ TaskDiagnosis

                    at_least t:   low ─────── high
                                      t  │ fails        t  holds
                                         └─ t inside: open, and more samples would decide
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from posttrain.diagnosis.card import (
    Bottleneck,
    Evidence,
    Finding,
    OpenRule,
    TaskDiagnosis,
)
from posttrain.diagnosis.rules import Condition, Rule, RuleBook
from posttrain.measure.reading import Reading


class ConditionVerdict(StrEnum):
    """What the readings say about a condition or a rule."""

    HOLDS = "holds"
    FAILS = "fails"
    OPEN = "open"
    UNREAD = "not looked at"


@dataclass(frozen=True, slots=True)
class DecidedCondition:
    """A condition with its verdict. ``likely`` is what the middle of the interval says."""

    condition: Condition
    verdict: ConditionVerdict
    words: str
    likely: bool = False
    more: float = 0.0  # times as many units until an interval of this shape would decide
    units: int = 0
    readings: tuple[Reading, ...] = ()


def diagnose_task(evidence: Evidence, book: RuleBook) -> TaskDiagnosis:
    """Name the bottleneck of one task set, or say that the readings do not.

    The first rule that holds names it. The answer is undetermined, with the likeliest bottleneck
    as a leaning, when no rule holds; and when a rule on another bottleneck that would come first
    is open and likely, or open and one whose absence the first rule presupposes.

    Args:
        evidence: the readings.
        book: the rules in force.
    """
    findings: list[tuple[Rule, Finding]] = []
    unsettled: list[tuple[Rule, OpenRule]] = []
    for rule in book.active:
        if any(r.id in rule.unless for r, _ in findings):
            continue
        if any(evidence.get(name) for name in rule.without):
            continue
        decided = [decide_condition(c, evidence) for c in rule.when]
        match all_of(decided):
            case ConditionVerdict.HOLDS:
                findings.append((rule, _finding(rule, decided)))
            case ConditionVerdict.OPEN:
                unsettled.append((rule, _open(rule, decided)))
            case _:
                pass
    return _conclude(evidence, findings, unsettled)


def _conclude(
    evidence: Evidence,
    findings: Sequence[tuple[Rule, Finding]],
    unsettled: Sequence[tuple[Rule, OpenRule]],
) -> TaskDiagnosis:
    first = findings[0] if findings else None
    in_the_way = [o for r, o in unsettled if first is None or _in_front(r, o, first[0])]
    leaning = None
    if first is not None and not in_the_way:
        bottleneck, headline = first[1].bottleneck, first[1].words
    else:
        bottleneck = Bottleneck.UNDETERMINED
        likely = sorted(
            [
                *((r.order, r.bottleneck) for r, _ in findings),
                *((r.order, r.bottleneck) for r, o in unsettled if o.likely),
            ],
            key=lambda pair: pair[0],
        )
        leaning = likely[0][1] if likely else None
        in_the_way.sort(key=lambda o: (not o.likely, o.more))
        headline = _undetermined_words(leaning, in_the_way)
    return TaskDiagnosis(
        task=evidence.task,
        bottleneck=bottleneck,
        headline=headline,
        evidence=evidence,
        findings=tuple(f for _, f in findings),
        open=tuple(in_the_way),
        leaning=leaning,
    )


def _in_front(rule: Rule, found: OpenRule, first: Rule) -> bool:
    """True when an open rule forbids to say that ``first`` names the bottleneck."""
    matters = found.likely or rule.id in first.unless
    return matters and rule.order < first.order and rule.bottleneck is not first.bottleneck


def _undetermined_words(leaning: Bottleneck | None, in_the_way: Sequence[OpenRule]) -> str:
    if not in_the_way:
        return "No rule applies to these readings: the rules in force leave a gap here."
    lean = f"The likeliest is {leaning}, but that is not shown. " if leaning else ""
    return f"The intervals do not decide. {lean}To decide: {in_the_way[0].decide}."


# --- conditions ------------------------------------------------------------------------------


def decide_condition(condition: Condition, evidence: Evidence) -> DecidedCondition:
    """Decide one condition on the cautious bounds.

    Example:
        >>> seen = Reading("pass@1", "t", 0.5, 0.4, 0.6, 32, 64, "half")
        >>> asked = Condition(reading="pass@1", at_least=0.3)
        >>> decide_condition(asked, Evidence(task="t", readings=(seen,))).words
        'pass@1 is 0.50 [0.40, 0.60], at least 0.3'
    """
    found = [evidence.get(name) for name in condition.names]
    readings = tuple(r for r in found if r is not None)
    if len(readings) < len(found):
        return DecidedCondition(
            condition, ConditionVerdict.UNREAD, f"{condition.reading} was not measured"
        )
    value, low, high = _bounds(readings)
    threshold, upwards = condition.threshold, condition.at_least is not None
    if upwards:
        holds, fails, likely = low >= threshold, high < threshold, value >= threshold
    else:
        holds, fails, likely = high <= threshold, low > threshold, value <= threshold
    state = (
        ConditionVerdict.HOLDS
        if holds
        else ConditionVerdict.FAILS
        if fails
        else ConditionVerdict.OPEN
    )
    side = "at least" if upwards else "at most"
    tail = {
        ConditionVerdict.HOLDS: side,
        ConditionVerdict.FAILS: f"not {side}",
        ConditionVerdict.OPEN: f"perhaps {side}",
    }
    name = " minus ".join(condition.names)
    words = f"{name} is {value:.2f} [{low:.2f}, {high:.2f}], {tail[state]} {threshold:g}"
    return DecidedCondition(
        condition,
        state,
        words,
        likely=likely,
        more=_more(value, low, high, threshold) if state is ConditionVerdict.OPEN else 0.0,
        units=min(r.units for r in readings),
        readings=readings,
    )


def _more(value: float, low: float, high: float, threshold: float) -> float:
    """How many times as many units until the bound on the threshold's side no longer reaches it.

    Half-widths shrink with the square root of the number of units.
    """
    if value == threshold or not math.isfinite(value):
        return math.inf
    half = value - low if value > threshold else high - value
    return (half / (value - threshold)) ** 2


def all_of(decided: Iterable[DecidedCondition]) -> ConditionVerdict:
    """All must hold; one that fails settles it; one that was not looked at leaves it unread."""
    states = [j.verdict for j in decided]
    for state in (ConditionVerdict.FAILS, ConditionVerdict.UNREAD, ConditionVerdict.OPEN):
        if state in states:
            return state
    return ConditionVerdict.HOLDS


def _bounds(readings: Sequence[Reading]) -> tuple[float, float, float]:
    """(value, low, high) of a reading, or of the first minus the second."""
    first = readings[0]
    if len(readings) == 1:
        return first.value, first.low, first.high
    second = readings[1]
    return first.value - second.value, first.low - second.high, first.high - second.low


def _finding(rule: Rule, decided: Sequence[DecidedCondition]) -> Finding:
    readings = {r.name: r for j in decided for r in j.readings}
    return Finding(
        rule=rule.id,
        bottleneck=rule.bottleneck,
        words=rule.words,
        because=tuple(j.words for j in decided),
        decided_by=tuple(readings.values()),
        overturned_by=rule.overturned_by,
        citation=rule.citation,
    )


def _open(rule: Rule, decided: Sequence[DecidedCondition]) -> OpenRule:
    straddling = [j for j in decided if j.verdict is ConditionVerdict.OPEN]
    worst = max(straddling, key=lambda j: j.more)
    probe = " and ".join(worst.condition.names)
    if math.isinf(worst.more) or worst.more * worst.units > 1e6:
        decide = f"no number of prompts will: {probe} lies on {worst.condition.threshold:g}"
    else:
        needed = math.ceil(worst.more * worst.units)
        decide = f"{probe} on about {needed} prompts instead of {worst.units}"
    return OpenRule(
        rule=rule.id,
        bottleneck=rule.bottleneck,
        because=tuple(j.words for j in straddling),
        decide=decide,
        more=worst.more,
        likely=all(j.likely for j in decided),
    )
