"""The waterfall: how a task set's pass@1 got from one policy's to a later one's, step by step.

1 ┤              ┌────┐                    ┌───┐
  │       ┌────┐─┘    └─┐────┐             │   │
  │ ┌───┐ │    │        └────┘─────────────│   │
0 ┴─┴───┴─┴────┴───────────────────────────┴───┴
  before  newly  sharpened  weakened  lost  undetermined  after
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from posttrain.measure.attribution import Attribution, ChangeKind
from posttrain.measure.bootstrap import Interval, interval_words
from posttrain.pages.svg import compact, figure, label, line, rect, tag
from posttrain.report.change import CLASSES
from posttrain.report.numbers import amount, bounds_of, value_of

LEFT, RIGHT, TOP, BOTTOM = 28.0, 440.0, 26.0, 186.0
LOWEST, HIGHEST = -0.02, 1.0  # of the axis; a part can be slightly below zero by noise
COLUMN = (RIGHT - LEFT) / 7
BAR = 34.0


@dataclass(frozen=True, slots=True)
class Step:
    """One column: which way the part goes, and what stands below it, one line per entry."""

    part: ChangeKind
    sign: int
    words: tuple[str, ...]


STEPS = (
    Step(ChangeKind.NEWLY_REACHABLE, 1, ("newly", "reachable")),
    Step(ChangeKind.SHARPENED, 1, ("sharpened",)),
    Step(ChangeKind.WEAKENED, -1, ("weakened",)),
    Step(ChangeKind.LOST, -1, ("lost",)),
    Step(ChangeKind.UNDETERMINED, 1, ("undeter-", "mined")),
)
"""The parts between before and after, in the order they are drawn; together the difference."""


def waterfall(change: Attribution, *, before: str, after: str, ident: str) -> Markup | None:
    """One task set's waterfall; None when pass@1 on either side is not known.

    A whisker is the interval of its own part, seen from where that part starts.
    """
    level = value_of(change.before)
    if level is None or value_of(change.after) is None:
        return None
    parts = list(_axis())
    parts += _end(0, change.before, "before")
    for i, step in enumerate(STEPS, 1):
        interval = change.parts[step.part]
        end = level + step.sign * amount(interval)
        parts.append(_joint(i, level))
        parts += _step(i, step, interval, level, end)
        level = end
    parts.append(_joint(6, level))
    parts += _end(6, change.after, "after")
    told = ", ".join(f"{s.part} {interval_words(change.parts[s.part])}" for s in STEPS)
    return figure(
        *parts,
        ident=ident,
        width=RIGHT + 2,
        height=BOTTOM + 34,
        title=f"{change.task}: pass@1 from {before} to {after}",
        desc=f"before {interval_words(change.before)}, {told}, "
        f"after {interval_words(change.after)}",
    )


def _y(rate: float) -> float:
    shown = min(max(rate, LOWEST), HIGHEST + 0.02)
    return BOTTOM - shown * (BOTTOM - TOP)


def _middle(column: int) -> float:
    return LEFT + COLUMN * (column + 0.5)


def _axis() -> Sequence[Markup]:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(LEFT, _y(tick), RIGHT, _y(tick), "axis" if tick == 0 else "grid"))
        parts.append(label(LEFT - 5, _y(tick) + 3.5, compact(tick), "tick", anchor="end"))
    return parts


def _joint(column: int, level: float) -> Markup:
    """The thin line that carries a level over to the next column."""
    start = _middle(column - 1) + BAR / 2
    return line(start, _y(level), _middle(column) - BAR / 2, _y(level), "joint")


def _named(column: int, words: Sequence[str], class_: str) -> list[Markup]:
    x = _middle(column)
    return [label(x, BOTTOM + 14 + 12 * i, w, class_, anchor="middle") for i, w in enumerate(words)]


def _end(column: int, rate: Interval, name: str) -> list[Markup]:
    """The bar of a policy, from zero."""
    x, value = _middle(column), amount(rate)
    top = _y(value)
    hint = tag("title", f"{name} {interval_words(rate)}")
    parts = [rect(x - BAR / 2, top, BAR, BOTTOM - top, f"total {name}", hint)]
    high = value
    if bounds := bounds_of(rate):
        parts += _whisker(x, *bounds)
        high = bounds[1]
    parts.append(label(x, _y(high) - 6, f"{value:.2f}", "strong s", anchor="middle"))
    return parts + _named(column, (name,), "strong s")


def _step(column: int, step: Step, part: Interval, start: float, end: float) -> list[Markup]:
    """A floating bar; one that is nothing is only the line of its level."""
    x, value = _middle(column), value_of(part)
    high, low = max(start, end), min(start, end)
    class_ = f"part {CLASSES[step.part]}"
    hint = tag("title", f"{' '.join(step.words)} {interval_words(part)}")
    parts = [rect(x - BAR / 2, _y(high), BAR, max(_y(low) - _y(high), 1.5), class_, hint)]
    if interval := bounds_of(part):
        bounds = [start + step.sign * e for e in interval]
        parts += _whisker(x, min(bounds), max(bounds), faint=abs(end - start) < 0.005)
        high, low = max(high, *bounds), min(low, *bounds)
    said = "?" if value is None else _signed(end - start)
    above = _y(high) - 6
    # Without room above, the number stands below.
    y = above if above > 10 else _y(low) + 13
    parts.append(label(x, y, said, "ink s", anchor="middle"))
    return parts + _named(column, step.words, "tick tight")


def _signed(amount: float) -> str:
    """An amount with its sign; what rounds to nothing has none.

    Example:
        >>> _signed(0.481), _signed(-0.02), _signed(-0.001)
        ('+0.48', '−0.02', '0')
    """
    if abs(amount) < 0.005:
        return "0"
    return f"{'+' if amount > 0 else '−'}{abs(amount):.2f}"


def _whisker(x: float, low: float, high: float, *, faint: bool = False) -> list[Markup]:
    class_, y0, y1 = "whisker faint" if faint else "whisker", _y(low), _y(high)
    caps = (line(x - 3, y, x + 3, y, class_) for y in (y0, y1))
    strokes = [line(x, y0, x, y1, class_), *caps]
    return strokes if faint else [line(x, y0, x, y1, "halo"), *strokes]
