"""The charts of a report, as inline SVG: pass@k, support map, curves of a stage, stacked bars.

Each function is pure: values in, one escaped drawing out. ``ident`` must be unique on the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from markupsafe import Markup

from posttrain.core.provenance import Kind
from posttrain.report.svg import (
    compact,
    duration,
    figure,
    fit,
    label,
    line,
    path,
    polyline,
    rect,
    spread,
    tag,
)
from posttrain.report.view import (
    CurvePoint,
    PolicyView,
    Series,
    Support,
    SupportMap,
    TimePart,
    known,
    task_of,
)

MAX_POINTS = 400
"""A longer series is drawn by the lowest and the highest value of each run of steps."""

NUM_CELLS_WITH_TITLE = 64
"""Up to this many prompts, every cell of a support map names its prompt."""

Place = Callable[[int, float], tuple[float, float]]
"""(k, rate) to (x, y) in a drawing."""


# --- pass@k ----------------------------------------------------------------------------------


def pass_at_k(task: str, policies: Sequence[PolicyView], *, ident: str) -> Markup:
    """pass@k of every policy on one task set, k on a log2 axis. First and last are emphasised."""
    curves = [(i, p.name, measured.curve) for i, p in enumerate(policies)
              if (measured := task_of(p, task)) is not None]  # fmt: skip
    ks = sorted({point.k for _, _, curve in curves for point in curve if point.k >= 1})
    left, right, top, bottom = 30.0, 282.0, 12.0, 192.0
    first, last = math.log2(ks[0] if ks else 1), math.log2(ks[-1] if ks else 1)

    def at(k: int, rate: float) -> tuple[float, float]:
        share = (math.log2(k) - first) / (last - first) if last > first else 0.5
        return left + share * (right - left), bottom - min(max(rate, 0.0), 1.0) * (bottom - top)

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = at(ks[0] if ks else 1, tick)[1]
        parts.append(line(left, y, right, y, "axis" if tick == 0 else "grid"))
        parts.append(label(left - 5, y + 3.5, compact(tick), "tick", anchor="end"))
    every = max(1, math.ceil(len(ks) / 7))
    for k in ks[::every]:
        parts.append(label(at(k, 0)[0], bottom + 15, str(k), "tick", anchor="middle"))
    parts.append(label(right, bottom + 30, "k samples (log₂)", "tick", anchor="end"))
    ends: list[tuple[float, str, str]] = []
    final = len(policies) - 1
    # The middle ones first, so that before and after lie on top of them.
    for i, name, curve in sorted(curves, key=lambda c: (c[0] in (0, final), c[0])):
        class_ = "before" if i == 0 else "after" if i == final else f"mid m{(i - 1) % 4}"
        points = [(p, v) for p in curve if p.k >= 1 and (v := p.rate.value) is not None]
        if points:
            spots = [at(p.k, v) for p, v in points]
            parts += _band_and_line([p for p, _ in points], spots, class_, name, at=at)
            ends.append((spots[-1][1], name, class_))
    for y, (_, name, class_) in zip(
        spread([e[0] for e in ends], gap=14, low=top + 2, high=bottom), ends, strict=True
    ):
        parts.append(line(right + 8, y, right + 20, y, f"curve {class_}"))
        parts.append(label(right + 25, y + 4, fit(name, 92, 11.5), f"line-label {class_}"))
    if not ends:
        parts.append(label(left + 12, 100, "no pass@k curve was measured", "note"))
    told = "; ".join(f"{name}: " + ", ".join(f"pass@{p.k} {p.rate.words}" for p in curve)
                     for _, name, curve in curves)  # fmt: skip
    return figure(
        *parts, ident=ident, width=400, height=228, title=f"pass@k on {task}", desc=told or "empty"
    )


def _band_and_line(
    points: Sequence[CurvePoint],
    spots: Sequence[tuple[float, float]],
    class_: str,
    name: str,
    *,
    at: Place,
) -> list[Markup]:
    parts = []
    bounded = [(p.k, p.rate.interval) for p in points if p.rate.interval]
    if len(bounded) > 1:
        lower = [at(k, i[0]) for k, i in bounded]
        upper = [at(k, i[1]) for k, i in bounded]
        around = [*lower, *reversed(upper)]
        shape = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in around) + "Z"
        parts.append(path(shape, f"band {class_}"))
    elif bounded:
        k, (low, high) = bounded[0]
        parts.append(line(*at(k, low), *at(k, high), "whisker"))
    parts.append(polyline(spots, f"curve {class_}"))
    for p, (x, y) in zip(points, spots, strict=True):
        hint = tag("title", f"{name}: pass@{p.k} {p.rate.words}")
        parts.append(tag("circle", hint, cx=x, cy=y, r=2.6, class_=f"dot {class_}"))
    return parts


def reach_strip(task: str, first: float, many: float, *, tries: int, ident: str) -> Markup:
    """Right at the first try, right within ``tries``, and the rest, as wide as there is room."""
    reach = max(many, first)
    return figure(
        rect(0, 0, 100, 1, "track"),
        rect(0, 0, reach * 100, 1, "sharp"),
        rect(0, 0, first * 100, 1, "new"),
        ident=ident,
        width=100,
        height=1,
        title=f"{task}: {first:.0%} right at the first try, {reach:.0%} within {tries} tries",
        desc="Dark: right at the first try. Light: right within more tries. Rest: never seen.",
        class_="bar",
        stretch=True,
    )


# --- the support map -------------------------------------------------------------------------


def support_map(support: SupportMap, *, ident: str) -> Markup:
    """Prompts (columns) by policies (rows). A full cell is in, a thin one out, hatched open.

    Prompts are sorted by their labels, so that one column shows one prompt's whole story and
    equal stories stand together.
    """
    order = {Support.IN: 0, Support.UNDETERMINED: 1, Support.OUT: 2}
    prompts = sorted(support.prompts, key=lambda p: [order[s] for s in p.labels])
    left, right, row_height, top = 92.0, 370.0, 24.0, 6.0
    step = min((right - left) / max(len(prompts), 1), 24.0)
    titled = len(prompts) <= NUM_CELLS_WITH_TITLE
    parts = []
    for row, name in enumerate(support.policies):
        y = top + row * row_height
        parts.append(label(left - 8, y + 14, fit(name, left - 10, 11.5), "ink s", anchor="end"))
        x = left
        labels = [(p.prompt, p.labels[row]) for p in prompts]
        runs = (
            [(status, 1, prompt) for prompt, status in labels]
            if titled
            else [(s, len(list(run)), "") for s, run in groupby(status for _, status in labels)]
        )
        for status, length, prompt in runs:
            gap = min(1.2, step * 0.2)
            hint = (tag("title", f"{prompt}: {status.value} for {name}"),) if titled else ()
            parts.append(_cell(status, x, y, length * step - gap, hint))
            x += length * step
        num_in = sum(status is Support.IN for _, status in labels)
        parts.append(label(right + 8, y + 14, str(num_in), "ink s num"))
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{sum(p.labels[row] is s for p in prompts)} {s.value}" for s in Support)
        for row, name in enumerate(support.policies)
    )
    return figure(
        *parts,
        ident=ident,
        width=400,
        height=top + row_height * max(len(support.policies), 1) + 2,
        title=f"Support of {support.task}: {len(prompts)} prompts by policy",
        desc=told or "empty",
    )


def _cell(status: Support, x: float, y: float, width: float, hint: Sequence[Markup]) -> Markup:
    if status is Support.IN:
        return rect(x, y, width, 20, "cell in", *hint, rx=1)
    if status is Support.OUT:
        return rect(x, y + 8.5, width, 3, "cell out", *hint, rx=1)
    return rect(x, y + 4, width, 12, "cell undetermined", *hint, rx=1)


# --- a stage ---------------------------------------------------------------------------------


def curve(series: Series, *, ident: str, stage: str) -> Markup:
    """One series over the steps of a stage, with its first and last value. Gaps break the line."""
    points = [(step, v) for step, value in series.points if (v := known(value)) is not None]
    left, right, top, bottom = 2.0, 236.0, 26.0, 88.0
    parts = [label(left, 13, fit(series.name, 276, 12), "strong s")]
    if not points:
        parts.append(label(left, 60, "no values", "note s"))
        told = "no values"
    else:
        low, high = min(v for _, v in points), max(v for _, v in points)
        first, last = points[0][0], points[-1][0]

        def at(step: int, value: float) -> tuple[float, float]:
            across = (step - first) / (last - first) if last > first else 0.5
            up = (value - low) / (high - low) if high > low else 0.5
            return left + across * (right - left), bottom - up * (bottom - top)

        spots = [at(*p) for p in points]
        parts += [line(left, bottom + 4, right, bottom + 4, "axis")]
        if low < 0 < high:
            parts.append(line(left, at(first, 0)[1], right, at(first, 0)[1], "grid"))
        parts.append(polyline([at(*p) for p in thinned(points)], "curve after thin"))
        parts.append(tag("circle", cx=spots[-1][0], cy=spots[-1][1], r=3, class_="dot after"))
        start, end = compact(points[0][1]), compact(points[-1][1])
        parts.append(label(right + 8, spots[-1][1] + 4, end, "strong s num"))
        parts.append(label(left, bottom + 18, f"from {start}, step {first}", "tick"))
        parts.append(label(right, bottom + 18, f"step {last}", "tick", anchor="end"))
        told = f"from {start} at step {first} to {end} at step {last}, " + (
            f"lowest {compact(low)}, highest {compact(high)}"
        )
    return figure(
        *parts, ident=ident, width=292, height=112, title=f"{series.name} of {stage}", desc=told
    )


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``MAX_POINTS`` of the points, extremes and both ends included, in their order.

    Example:
        >>> [len(thinned([(i, 0.0) for i in range(n)])) for n in (9, 9999)]
        [9, 398]
    """
    if len(points) <= MAX_POINTS:
        return list(points)
    num_runs = MAX_POINTS // 2 - 1
    kept = {0, len(points) - 1}
    for run in range(num_runs):
        span = range(run * len(points) // num_runs, (run + 1) * len(points) // num_runs)
        kept |= {
            min(span, key=lambda i: points[i][1]),
            max(reversed(span), key=lambda i: points[i][1]),
        }
    return [points[i] for i in sorted(kept)]


def token_bar(
    counts: Sequence[tuple[Kind, str, int, bool]], *, ident: str, title: str, most: int = 0
) -> Markup:
    """One stacked bar of tokens: (kind, words, tokens, discarded). Discarded parts are hatched.

    ``most`` sets the scale, so that bars of several stages can be compared.
    """
    total = sum(c[2] for c in counts)
    scale = 1000 / max(total, most, 1)
    parts, x = [rect(0, 0, 1000, 26, "track", rx=3)], 0.0
    for kind, words, tokens, discarded in counts:
        width, told = tokens * scale, f"{words}: {tokens:,} tokens"
        hint = tag("title", f"{told}, discarded" if discarded else told)
        parts.append(rect(x, 0, width - 1.5, 26, f"kind {kind.value}", hint))
        if discarded:
            parts.append(rect(x, 0, width - 1.5, 26, "discarded", hint))
        x += width
    told = ", ".join(f"{w} {n:,}{' discarded' if d else ''}" for _, w, n, d in counts)
    return figure(
        *parts, ident=ident, width=1000, height=26, title=title, desc=told or "no tokens",
        class_="bar",
        stretch=True,
    )  # fmt: skip


def time_bar(parts: Sequence[TimePart], *, ident: str, title: str, most: float = 0) -> Markup:
    """One stacked bar of seconds, coloured by group.

    ``most`` sets the scale, so that bars of several stages can be compared.
    """
    total = sum(p.seconds for p in parts)
    scale = 1000 / max(total, most, 1e-9)
    drawn, x = [rect(0, 0, 1000, 26, "track", rx=3)], 0.0
    for part in parts:
        width = part.seconds * scale
        words = f"{part.name}: {duration(part.seconds)}, {part.seconds / total:.0%}"
        class_ = f"time {part.group.replace(' ', '-')}"
        drawn.append(rect(x, 0, width - 1.5, 26, class_, tag("title", words)))
        x += width
    told = ", ".join(f"{p.name} {duration(p.seconds)}" for p in parts)
    return figure(
        *drawn, ident=ident, width=1000, height=26, title=title, desc=told or "no times",
        class_="bar",
        stretch=True,
    )  # fmt: skip
