"""The change chart: what happened to a task set between two policies, in five parts.

lost │ weakened ┃ sharpened │ newly reachable        kept ░ undetermined      retention ─●─
     ◂ less     0      more ▸
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from posttrain.measure.attribution import Attribution, ChangeKind
from posttrain.measure.bootstrap import Interval, interval_words
from posttrain.pages.svg import compact, figure, fit, label, line, rect, tag
from posttrain.report.numbers import amount, bounds_of, value_of

CLASSES = {
    ChangeKind.NEWLY_REACHABLE: "new",
    ChangeKind.SHARPENED: "sharp",
    ChangeKind.KEPT: "kept",
    ChangeKind.WEAKENED: "weak",
    ChangeKind.LOST: "lost",
    ChangeKind.UNDETERMINED: "undetermined",
}
"""What the style sheet calls the parts."""

LOSSES, GAINS = (
    (ChangeKind.WEAKENED, ChangeKind.LOST),
    (ChangeKind.SHARPENED, ChangeKind.NEWLY_REACHABLE),
)
"""From the zero line outwards."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Where things are in a change chart: the zero line, and units per share."""

    zero: float
    scale: float
    narrow: bool


def change_chart(
    changes: Sequence[Attribution], *, ident: str, title: str, unit: str, narrow: bool = False
) -> Markup:
    """Diverging stacked bars per task set: losses to the left of zero, gains to the right.

    Whiskers are the intervals of the part whose end they sit on. Kept and undetermined parts and
    retention stand apart, since they are neither gain nor loss.
    """
    extents = [0.25]
    for c in changes:
        for inner, outer in (LOSSES, GAINS):
            start, first = amount(c.parts[inner]), bounds_of(c.parts[inner])
            second = bounds_of(c.parts[outer])
            extents.append((first[1] if first else 0.0) or start)
            extents.append(start + ((second[1] if second else 0.0) or amount(c.parts[outer])))
    reach = min(max(extents), 2.0)
    half = 168.0 if narrow else 210.0
    frame = Frame(180.0 if narrow else 336.0, half / reach, narrow)
    row_height, top = (184.0, 30.0) if narrow else (84.0, 34.0)
    height = top + row_height * max(len(changes), 1)
    parts = _change_axis(frame, reach, top, top + row_height * len(changes))
    for i, c in enumerate(changes):
        parts.append(_change_row(c, frame, reach, top + row_height * i))
    told = "; ".join(
        f"{c.task}: "
        + ", ".join(f"{p} {interval_words(c.parts[p])}" for p in ChangeKind)
        + f", retention {interval_words(c.retention)}"
        for c in changes
    )
    return figure(
        *parts,
        ident=ident,
        width=360 if narrow else 960,
        height=height,
        title=title,
        desc=f"{unit}. {told}",
        class_="chart tall" if narrow else "chart",
    )


def _ticks(reach: float) -> list[float]:
    step = next((s for s in (0.1, 0.25, 0.5) if reach / s <= 3), 1.0)
    return [i * step for i in range(1, int(reach / step + 1e-9) + 1)]


def _change_axis(frame: Frame, reach: float, top: float, bottom: float) -> list[Markup]:
    parts = []
    for tick in _ticks(reach):
        for x in (frame.zero - tick * frame.scale, frame.zero + tick * frame.scale):
            if abs(x - frame.zero) > 72:  # room for the words beside the line
                parts.append(label(x, top - 13, compact(tick), "tick", anchor="middle"))
    if not frame.narrow:
        parts.append(line(frame.zero, top - 22, frame.zero, bottom - 4, "axis"))
        parts.append(label(590, top - 13, "stayed", "tick"))
        parts.append(label(822, top - 13, "retention", "tick"))
    parts.append(label(frame.zero - 8, top - 13, "◂ less", "tick", anchor="end"))
    parts.append(label(frame.zero + 8, top - 13, "more ▸", "tick"))
    return parts


def _change_row(change: Attribution, frame: Frame, reach: float, y: float) -> Markup:
    bar = y + (26 if frame.narrow else 12)
    name = fit(change.task, 350 if frame.narrow else 124, 14)
    spot = (2.0, y + 17) if frame.narrow else (2.0, bar + 16)
    parts = [label(*spot, name, "strong")]
    for tick in _ticks(reach):
        for x in (frame.zero - tick * frame.scale, frame.zero + tick * frame.scale):
            parts.append(line(x, bar - 5, x, bar + 25, "grid"))
    parts.append(line(frame.zero, bar - 5, frame.zero, bar + 27, "axis"))
    for sign, pair in ((-1, LOSSES), (1, GAINS)):
        parts += _side(change, pair, frame, bar, sign)
    if frame.narrow:
        parts += _listed(change, bar + 40)
    else:
        parts += _stayed(change, 590.0, 184.0, bar)
        parts.append(_retention(change.retention, 822.0, 130.0, bar))
    return tag("g", *parts)


def _listed(change: Attribution, y: float) -> list[Markup]:
    """The numbers below a narrow bar, one line each."""
    parts = []
    rows = [(str(p), f"part {CLASSES[p]}", change.parts[p]) for p in ChangeKind]
    for i, (words, class_, interval) in enumerate([*rows, ("retention", "", change.retention)]):
        at = y + 16 * i
        if class_:
            parts.append(rect(2, at - 8.5, 9, 9, class_, rx=1.5))
        parts.append(label(18, at, words, "ink s"))
        parts.append(label(350, at, interval_words(interval), "ink s", anchor="end"))
    return parts


def _side(
    change: Attribution, pair: Sequence[ChangeKind], frame: Frame, bar: float, sign: int
) -> list[Markup]:
    """One direction of a row: two stacked parts, their whiskers, and their labels."""
    parts, start = [], 0.0
    for lane, part in enumerate(pair):
        interval, class_ = change.parts[part], CLASSES[part]
        words = f"{part} {interval_words(interval)}"
        value = max(amount(interval), 0.0)
        x0 = frame.zero + sign * start * frame.scale
        x1 = frame.zero + sign * (start + value) * frame.scale
        if value > 0:
            hint = tag("title", words)
            parts.append(rect(min(x0, x1), bar, abs(x1 - x0), 22, f"part {class_}", hint))
        bounds = bounds_of(interval)
        if bounds and bounds[1] > 0:
            ends = [frame.zero + sign * (start + e) * frame.scale for e in bounds]
            parts += _whisker(ends[0], ends[1], bar + 7 + 8 * lane, faint=value == 0)
        if not frame.narrow:
            parts += _side_label(words, class_, frame.zero, bar, lane, sign)
        start += value
    return parts


def _side_label(
    text: str, class_: str, zero: float, bar: float, lane: int, sign: int
) -> list[Markup]:
    x, row = zero + sign * 8, bar + 37 + 15 * lane
    key = rect(x - 8 if sign < 0 else x, row - 8, 8, 8, f"part {class_}", rx=1.5)
    anchor = "end" if sign < 0 else "start"
    return [key, label(x + sign * 13, row, text, "note s num", anchor=anchor)]


def _whisker(x0: float, x1: float, y: float, *, faint: bool = False) -> list[Markup]:
    """An interval. A faint one belongs to a part of size zero, which has no bar of its own."""
    class_ = "whisker faint" if faint else "whisker"
    strokes = [line(x0, y, x1, y, class_), *(line(x, y - 3, x, y + 3, class_) for x in (x0, x1))]
    return strokes if faint else [line(x0, y, x1, y, "halo"), *strokes]


def _stayed(change: Attribution, x: float, width: float, y: float) -> list[Markup]:
    kept, open_ = change.parts[ChangeKind.KEPT], change.parts[ChangeKind.UNDETERMINED]
    kept_words, open_words = (
        f"{p} {interval_words(change.parts[p])}" for p in (ChangeKind.KEPT, ChangeKind.UNDETERMINED)
    )
    scale = width / max(1.0, amount(kept) + amount(open_))
    first = scale * max(amount(kept), 0.0)
    parts = [
        rect(x, y, width, 22, "track", rx=2),
        rect(x, y, first, 22, "part kept", tag("title", kept_words)),
        rect(
            x + first,
            y,
            scale * max(amount(open_), 0.0),
            22,
            "part undetermined",
            tag("title", open_words),
        ),
    ]
    if bounds := bounds_of(kept):
        parts += _whisker(x + scale * bounds[0], x + scale * bounds[1], y + 11)
    parts.append(rect(x, y + 29, 8, 8, "part kept", rx=1.5))
    parts.append(label(x + 13, y + 37, kept_words, "note s num"))
    parts.append(rect(x, y + 44, 8, 8, "part undetermined", rx=1.5))
    parts.append(label(x + 13, y + 52, open_words, "note s num"))
    return parts


def _retention(share: Interval | None, x: float, width: float, y: float) -> Markup:
    words = interval_words(share)
    parts = [tag("title", f"retention {words}"), line(x, y + 11, x + width, y + 11, "grid")]
    parts += [line(x + width * f, y + 6, x + width * f, y + 16, "grid") for f in (0.0, 1.0)]
    if bounds := bounds_of(share):
        low, high = (x + width * min(max(e, 0.0), 1.0) for e in bounds)
        parts += _whisker(low, high, y + 11)
    if (value := value_of(share)) is not None:
        at = x + width * min(max(value, 0.0), 1.0)
        parts.append(tag("circle", cx=at, cy=y + 11, r=5, class_="dot after"))
    parts.append(label(x, y + 37, words, "ink s num"))
    return tag("g", *parts)
