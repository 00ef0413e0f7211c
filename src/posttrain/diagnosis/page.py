"""From a diagnosis to one self-contained page: the picture first, then the words, then the numbers.

Diagnosis ──bars and curves──▶ card.html.j2 (autoescape) ──▶ diagnosis.html
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from posttrain.diagnosis.card import (
    Bottleneck,
    Diagnosis,
    Evidence,
    Prescription,
    TaskDiagnosis,
)
from posttrain.measure.reading import Reading
from posttrain.measure.registry import plain_words
from posttrain.pages.svg import duration, figure, label, line, path, polyline, rect
from posttrain.pages.template import Filter, fill

STARTS = (("pass@1", 0.0), ("continue@0.25", 0.25), ("continue@0.5", 0.5), ("continue@0.75", 0.75))
"""Success from the question alone, and from a part of a right answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One task set: its diagnosis, with the drawings beside it."""

    task: TaskDiagnosis
    bar: Markup | None
    curve: Markup | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """One task set in the picture at the top: its bar, and what holds it back."""

    task: str
    strip: Markup | None
    bottleneck: Bottleneck
    shown: bool  # False: the likeliest only


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One prescription, and when its turn comes."""

    when: str
    prescription: Prescription


def render_card(found: Diagnosis) -> str:
    """The page as HTML text. Equal diagnoses give equal pages; every string is escaped."""
    groups: dict[tuple[Bottleneck, bool], list[str]] = {}
    for task in found.tasks:
        groups.setdefault((task.acted_on, task.leaning is None), []).append(task.task)
    return fill(
        "posttrain.diagnosis",
        "card.html.j2",
        filters=FILTERS,
        found=found,
        name=Path(found.model).name or found.model,
        groups=tuple((kind, shown, names) for (kind, shown), names in groups.items()),
        glances=tuple(
            Glance(
                task=t.task,
                strip=strip(t.evidence, ident=f"strip-{i}"),
                bottleneck=t.acted_on,
                shown=t.leaning is None,
            )
            for i, t in enumerate(found.tasks)
        ),
        panels=tuple(
            Panel(
                task=task,
                bar=reach_bar(task.evidence, ident=f"bar-{i}"),
                curve=start_curve(task.evidence, ident=f"start-{i}"),
            )
            for i, task in enumerate(found.tasks)
        ),
        remedies=tuple(_remedies(found)),
    )


def _remedies(found: Diagnosis) -> list[Remedy]:
    order = []
    for prescription in found.prescriptions:
        later = "Later: diagnose again before"
        when = "Next" if prescription is found.next else later if prescription.recipe else "Not yet"
        order.append(Remedy(when=when, prescription=prescription))
    return sorted(order, key=lambda r: r.when != "Next")


def number(value: float) -> str:
    """A reading's number for a table.

    Example:
        >>> [number(x) for x in (0.123456, 41.5, 1234.0, float("inf"))]
        ['0.123', '41.5', '1,234', '∞']
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


FILTERS: dict[str, Filter] = {
    "duration": duration,
    "count": lambda n: f"{n:,}",
    "number": number,
    "plainly": plain_words,
}


def strip(evidence: Evidence, *, ident: str) -> Markup | None:
    """The bar of :func:`reach_bar` without words, as wide as there is room."""
    first = evidence.get("pass@1")
    if first is None:
        return None
    many = _widest(evidence) or first
    now, reach = first.value, max(many.value, first.value)
    within = f"{reach:.0%} within {_tries(many)} tries"
    return figure(
        rect(0, 0, 100, 1, "track"),
        rect(0, 0, reach * 100, 1, "sharp"),
        rect(0, 0, now * 100, 1, "new"),
        ident=ident,
        width=100,
        height=1,
        title=f"{evidence.task}: {now:.0%} right at the first try, {within}",
        desc="Dark: right at the first try. Light: right within more tries. Rest: never seen.",
        class_="bar",
        stretch=True,
    )


def reach_bar(evidence: Evidence, *, ident: str) -> Markup | None:
    """Right at the first try, right within k tries, and never seen, as parts of one bar.

    The strokes are the intervals of the two borders. None without pass@1.
    """
    first = evidence.get("pass@1")
    if first is None:
        return None
    many = _widest(evidence) or first
    width, top, height = 640.0, 10.0, 30.0
    one, reach = first.value * width, max(many.value, first.value) * width
    parts = [
        rect(0, top, width, height, "track", rx=4),
        rect(0, top, reach, height, "part sharp", rx=4),
        rect(0, top, one, height, "part new", rx=4),
        *_whisker(first, top + height * 0.68, width),
        *(_whisker(many, top + height * 0.32, width) if many is not first else ()),
        label(0, top + height + 16, f"{first.value:.0%} right at the first try", "ink"),
    ]
    words = f"{first.value:.0%} right at the first try"
    if many is not first:
        within = f"{many.value:.0%} right within {_tries(many)} tries"
        words += f"; {within}"
        parts.append(label(width, top + height + 16, within, "ink", anchor="end"))
    return figure(
        *parts,
        ident=ident,
        width=width,
        height=top + height + 20,
        title=f"{evidence.task}: {words}",
        desc="Dark: right at the first try. Light: right within more tries. Rest: never seen.",
    )


def _widest(evidence: Evidence) -> Reading | None:
    """pass@k at the largest k that was read."""
    tries = [r for r in evidence.readings if r.name.startswith("pass@") and r.name != "pass@1"]
    return max(tries, key=_tries, default=None)


def _tries(reading: Reading) -> int:
    return int(reading.name.partition("@")[2])


def _whisker(reading: Reading, y: float, width: float) -> tuple[Markup, ...]:
    low, high = reading.low * width, reading.high * width
    return (path(f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}V{y + 4}M{high:.1f} {y - 4}V{y + 4}",
                 "whisker"),)  # fmt: skip


def start_curve(evidence: Evidence, *, ident: str) -> Markup | None:
    """Success by how much of a right answer was given, with its band; None when not probed."""
    seen = [(at, r) for name, at in STARTS if (r := evidence.get(name)) is not None]
    if len(seen) < 2:
        return None
    left, right, top, bottom = 34.0, 244.0, 12.0, 112.0

    def place(at: float, rate: float) -> tuple[float, float]:
        return left + at / 0.75 * (right - left), bottom - rate * (bottom - top)

    lows = [place(at, r.low) for at, r in seen]
    highs = [place(at, r.high) for at, r in seen]
    middle = [place(at, r.value) for at, r in seen]
    outline = [*highs, *reversed(lows)]
    band = path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in outline) + "Z", "band after")
    ticks = [label(place(at, 0)[0], bottom + 16, words, "tick", anchor="middle")
             for at, words in ((0.0, "none"), (0.25, "¼"), (0.5, "½"), (0.75, "¾"))]  # fmt: skip
    rates = [label(left - 6, place(0, rate)[1] + 3.5, words, "tick", anchor="end")
             for rate, words in ((0.0, "0"), (0.5, "½"), (1.0, "1"))]  # fmt: skip
    grid = [line(left, place(0, rate)[1], right, place(0, rate)[1], "grid")
            for rate in (0.0, 0.5, 1.0)]  # fmt: skip
    said = ", ".join(f"{at:.0%}: {r.value:.2f}" for at, r in seen)
    return figure(
        *grid,
        band,
        polyline(middle, "curve after"),
        *_dots(middle),
        *ticks,
        *rates,
        label((left + right) / 2, bottom + 33, "share of a right answer given", anchor="middle"),
        ident=ident,
        width=256,
        height=bottom + 38,
        title=f"{evidence.task}: success when the answer is begun for the model",
        desc=said,
        class_="chart tall",
    )


def _dots(points: Sequence[tuple[float, float]]) -> list[Markup]:
    return [rect(x - 2.5, y - 2.5, 5, 5, "dot after", rx=2.5) for x, y in points]
