"""One sentence that says what a run did, made from measured numbers only.

A change is only claimed when the interval of its part excludes zero and the part is material. The
numbers behind it are pass@1 before and after, with the interval of the latter.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.measure.attribution import MATERIAL, Attribution, ChangeKind
from posttrain.measure.bootstrap import Interval, interval_words
from posttrain.report.numbers import amount, bounds_of, value_of
from posttrain.report.view import PolicyReport, RunReport

MAX_CLAUSES = 8
MOSTLY = 0.5
"""From this undetermined share on, a task set's change is called undetermined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """What happened to one task set. ``tone`` is gain, same, open or loss."""

    task: str
    words: str
    numbers: str
    tone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The sentence in pieces, for a page that sets the task names in bold."""

    opening: str
    clauses: tuple[Clause, ...]
    closing: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        told = [f"{c.task} {c.words} ({c.numbers})" for c in self.clauses]
        body = " " + _join(told) if told else ""
        return f"{self.opening}{body}{self.closing}"


def headline(report: RunReport) -> Headline:
    """The sentence for a run: gains first, then what stayed, then losses."""
    policies = report.policies
    if not policies or not report.tasks:
        return Headline(
            opening="Nothing was measured in this run, so nothing can be said about behaviour",
            clauses=(),
            closing=".",
        )
    many = len(report.stages)
    stages = "One stage" if many == 1 else f"{many} stages"
    if len(policies) == 1:
        opening = f"Only {policies[0].name} was measured:"
    else:
        opening = f"{stages if many else 'Training'} after {report.base_model}:"
    order = {"gain": 0, "same": 1, "open": 2, "loss": 3}
    clauses = sorted((_clause(report, t) for t in report.tasks), key=lambda c: order[c.tone])
    hidden = len(clauses) - MAX_CLAUSES
    closing = f"; {hidden} more below." if hidden > 0 else "."
    return Headline(opening=opening, clauses=tuple(clauses[:MAX_CLAUSES]), closing=closing)


def _clause(report: RunReport, task: str) -> Clause:
    before, after = (_pass_at_1(p, task) for p in (report.policies[0], report.policies[-1]))
    if len(report.policies) == 1:
        return Clause(task=task, words="scored", numbers=interval_words(after), tone="same")
    numbers = f"{_short(before)} → {interval_words(after)}"
    change = report.whole.task(task) if report.whole else None
    if change is None:
        words, tone = _by_pass_at_1(before, after)
    else:
        words, tone = _by_parts(change)
    return Clause(task=task, words=words, numbers=numbers, tone=tone)


def _pass_at_1(policy: PolicyReport, task: str) -> Interval | None:
    measured = policy.task(task)
    return None if measured is None else measured.curve.at(1)


def _short(interval: Interval | None) -> str:
    value = value_of(interval)
    return "not measured" if value is None else f"{value:.2f}"


def _by_parts(change: Attribution) -> tuple[str, str]:
    parts = change.parts
    gains = (
        ("became reachable", parts[ChangeKind.NEWLY_REACHABLE]),
        ("sharpened", parts[ChangeKind.SHARPENED]),
    )
    losses = (("was partly lost", parts[ChangeKind.LOST]), ("weakened", parts[ChangeKind.WEAKENED]))
    gain, gained = max(gains, key=lambda g: _size(g[1]))
    loss, lost = max(losses, key=lambda g: _size(g[1]))
    if _size(gained) == 0 and _size(lost) == 0:
        if amount(parts[ChangeKind.UNDETERMINED]) >= MOSTLY:
            return "stayed undetermined", "open"
        kept = parts[ChangeKind.KEPT].is_positive
        return ("was kept" if kept else "showed no clear change"), "same"
    if _size(gained) >= _size(lost):
        extra = f", though {interval_words(lost)} {_noun(loss)}" if _size(lost) > 0 else ""
        return gain + extra, "gain"
    extra = f", though {interval_words(gained)} {gain}" if _size(gained) > 0 else ""
    return loss + extra, "loss"


def _noun(loss: str) -> str:
    return "was lost" if loss == "was partly lost" else loss


def _size(part: Interval) -> float:
    """A part's size if it is certain and large enough to mention, else 0."""
    value = amount(part)
    return value if part.is_positive and value >= MATERIAL else 0.0


def _by_pass_at_1(before: Interval | None, after: Interval | None) -> tuple[str, str]:
    old, new = bounds_of(before), bounds_of(after)
    if old is None or new is None:
        return "has no interval to judge by", "open"
    if new[0] > old[1]:
        return "improved", "gain"
    if new[1] < old[0]:
        return "fell", "loss"
    return "showed no clear change", "same"


def _join(clauses: list[str]) -> str:
    if len(clauses) < 2:
        return "".join(clauses)
    return "; ".join(clauses[:-1]) + "; and " + clauses[-1]
