"""One sentence that says what a run did, made from measured numbers only.

A change is only claimed when the interval of its part excludes zero and the part is material. The
numbers behind it are pass@1 before and after, with the interval of the latter.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.measure.attribution import MATERIAL
from posttrain.report.view import Change, Estimate, RunView, task_of

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


def headline(view: RunView) -> Headline:
    """The sentence for a run: gains first, then what stayed, then losses."""
    if not view.policies or not view.tasks:
        return Headline(
            opening="Nothing was measured in this run, so nothing can be said about behaviour",
            clauses=(),
            closing=".",
        )
    many = len(view.stages)
    stages = "One stage" if many == 1 else f"{many} stages"
    if len(view.policies) == 1:
        opening = f"Only {view.policies[0].name} was measured:"
    else:
        opening = f"{stages if many else 'Training'} after {view.base_model}:"
    order = {"gain": 0, "same": 1, "open": 2, "loss": 3}
    clauses = sorted((_clause(view, t) for t in view.tasks), key=lambda c: order[c.tone])
    hidden = len(clauses) - MAX_CLAUSES
    closing = f"; {hidden} more below." if hidden > 0 else "."
    return Headline(opening=opening, clauses=tuple(clauses[:MAX_CLAUSES]), closing=closing)


def _clause(view: RunView, task: str) -> Clause:
    first, last = task_of(view.policies[0], task), task_of(view.policies[-1], task)
    before = first.pass_at_1 if first else Estimate(value=None)
    after = last.pass_at_1 if last else Estimate(value=None)
    if len(view.policies) == 1:
        return Clause(task=task, words="scored", numbers=after.words, tone="same")
    numbers = f"{_short(before)} → {after.words}"
    overall = view.between(None)
    changes = overall.changes if overall else ()
    change = next((c for c in changes if c.task == task), None)
    if change is None:
        words, tone = _by_pass_at_1(before, after)
    else:
        words, tone = _by_parts(change)
    return Clause(task=task, words=words, numbers=numbers, tone=tone)


def _short(estimate: Estimate) -> str:
    return "not measured" if estimate.value is None else f"{estimate.value:.2f}"


def _by_parts(change: Change) -> tuple[str, str]:
    gains = (("became reachable", change.reachable), ("sharpened", change.sharpened))
    losses = (("was partly lost", change.lost), ("weakened", change.weakened))
    gain, gained = max(gains, key=lambda g: _size(g[1]))
    loss, lost = max(losses, key=lambda g: _size(g[1]))
    if _size(gained) == 0 and _size(lost) == 0:
        if (change.undetermined.value or 0.0) >= MOSTLY:
            return "stayed undetermined", "open"
        return ("was kept" if change.kept.is_positive else "showed no clear change"), "same"
    if _size(gained) >= _size(lost):
        extra = f", though {lost.words} {_noun(loss)}" if _size(lost) > 0 else ""
        return gain + extra, "gain"
    extra = f", though {gained.words} {gain}" if _size(gained) > 0 else ""
    return loss + extra, "loss"


def _noun(loss: str) -> str:
    return "was lost" if loss == "was partly lost" else loss


def _size(estimate: Estimate) -> float:
    """A part's size if it is certain and large enough to mention, else 0."""
    value = estimate.value or 0.0
    return value if estimate.is_positive and value >= MATERIAL else 0.0


def _by_pass_at_1(before: Estimate, after: Estimate) -> tuple[str, str]:
    if before.interval is None or after.interval is None:
        return "has no interval to judge by", "open"
    if after.interval[0] > before.interval[1]:
        return "improved", "gain"
    if after.interval[1] < before.interval[0]:
        return "fell", "loss"
    return "showed no clear change", "same"


def _join(clauses: list[str]) -> str:
    if len(clauses) < 2:
        return "".join(clauses)
    return "; ".join(clauses[:-1]) + "; and " + clauses[-1]
