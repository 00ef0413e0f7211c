"""The charts of a report, as inline SVG: pass@k, support map, curves of a stage, stacked bars.

Each function is pure: values in, one escaped drawing out. ``ident`` must be unique on the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from markupsafe import Markup

from posttrain.core.clock import GROUPS
from posttrain.core.provenance import Kind
from posttrain.measure.bootstrap import Interval, interval_words
from posttrain.measure.passk import Curve
from posttrain.measure.support import Label
from posttrain.pages.svg import (
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
from posttrain.report.numbers import bounds_of, known, value_of
from posttrain.run.history import Metrics

SHOWN = ("loss", "reward", "entropy", "kl", "grad_norm", "zero_variance", "accuracy")
"""Metrics worth a curve; a term's own carry its name and a slash before these."""

GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
"""The group of each name of the clock."""

MAX_POINTS = 400
"""A longer series is drawn by the lowest and the highest value of each run of steps."""

NUM_CELLS_WITH_TITLE = 64
"""Up to this many prompts, every cell of a support map names its prompt."""

Place = Callable[[int, float], tuple[float, float]]
"""(k, rate) to (x, y) in a drawing."""


# --- pass@k ----------------------------------------------------------------------------------


def pass_at_k(task: str, policies: Sequence[tuple[str, Curve | None]], *, ident: str) -> Markup:
    """pass@k of every policy on one task set, k on a log2 axis. First and last are emphasised.

    Args:
        task: the task set.
        policies: (name, curve) in the order of the stages; None where it was not measured.
        ident: of the drawing.
    """
    curves = [
        (i, name, {k: curve.at(k) for k in curve.ks})
        for i, (name, curve) in enumerate(policies)
        if curve is not None
    ]
    ks = sorted({k for _, _, curve in curves for k in curve})
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
        points = [(k, rate, v) for k, rate in curve.items() if (v := value_of(rate)) is not None]
        if points:
            spots = [at(k, v) for k, _, v in points]
            rates = [(k, rate) for k, rate, _ in points]
            parts += _band_and_line(rates, spots, class_, name, at=at)
            ends.append((spots[-1][1], name, class_))
    for y, (_, name, class_) in zip(
        spread([e[0] for e in ends], gap=14, low=top + 2, high=bottom), ends, strict=True
    ):
        parts.append(line(right + 8, y, right + 20, y, f"curve {class_}"))
        parts.append(label(right + 25, y + 4, fit(name, 92, 11.5), f"line-label {class_}"))
    if not ends:
        parts.append(label(left + 12, 100, "no pass@k curve was measured", "note"))
    told = "; ".join(
        f"{name}: " + ", ".join(f"pass@{k} {interval_words(i)}" for k, i in curve.items())
        for _, name, curve in curves
    )
    return figure(
        *parts, ident=ident, width=400, height=228, title=f"pass@k on {task}", desc=told or "empty"
    )


def _band_and_line(
    rates: Sequence[tuple[int, Interval]],
    spots: Sequence[tuple[float, float]],
    class_: str,
    name: str,
    *,
    at: Place,
) -> list[Markup]:
    parts = []
    bounded = [(k, bounds) for k, rate in rates if (bounds := bounds_of(rate))]
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
    for (k, rate), (x, y) in zip(rates, spots, strict=True):
        hint = tag("title", f"{name}: pass@{k} {interval_words(rate)}")
        parts.append(tag("circle", hint, cx=x, cy=y, r=2.6, class_=f"dot {class_}"))
    return parts


# --- the support map -------------------------------------------------------------------------


def support_map(
    task: str,
    prompts: Sequence[str],
    policies: Sequence[tuple[str, Sequence[Label]]],
    *,
    ident: str,
) -> Markup:
    """Prompts (columns) by policies (rows). A full cell is in, a thin one out, hatched open.

    Prompts are sorted by their labels, so that one column shows one prompt's whole story and
    equal stories stand together.

    Args:
        task: the task set.
        prompts: [P] their keys.
        policies: (name, [P] labels) in the order of the stages.
        ident: of the drawing.
    """
    order = {Label.IN: 0, Label.UNDETERMINED: 1, Label.OUT: 2}
    stories = zip(*(labels for _, labels in policies), strict=True)
    columns = sorted(
        zip(prompts, stories, strict=True), key=lambda column: [order[s] for s in column[1]]
    )
    left, right, row_height, top = 92.0, 370.0, 24.0, 6.0
    step = min((right - left) / max(len(prompts), 1), 24.0)
    titled = len(prompts) <= NUM_CELLS_WITH_TITLE
    parts = []
    for row, (name, _) in enumerate(policies):
        y = top + row * row_height
        parts.append(label(left - 8, y + 14, fit(name, left - 10, 11.5), "ink s", anchor="end"))
        x = left
        cells = [(prompt, story[row]) for prompt, story in columns]
        runs = (
            [(status, 1, prompt) for prompt, status in cells]
            if titled
            else [(s, len(list(run)), "") for s, run in groupby(status for _, status in cells)]
        )
        for status, length, prompt in runs:
            gap = min(1.2, step * 0.2)
            hint = (tag("title", f"{prompt}: {status} for {name}"),) if titled else ()
            parts.append(_cell(status, x, y, length * step - gap, hint))
            x += length * step
        num_in = sum(status is Label.IN for _, status in cells)
        parts.append(label(right + 8, y + 14, str(num_in), "ink s num"))
    told = "; ".join(
        f"{name}: " + ", ".join(f"{sum(x is s for x in labels)} {s}" for s in Label)
        for name, labels in policies
    )
    return figure(
        *parts,
        ident=ident,
        width=400,
        height=top + row_height * max(len(policies), 1) + 2,
        title=f"Support of {task}: {len(prompts)} prompts by policy",
        desc=told or "empty",
    )


def _cell(status: Label, x: float, y: float, width: float, hint: Sequence[Markup]) -> Markup:
    if status is Label.IN:
        return rect(x, y, width, 20, "cell in", *hint, rx=1)
    if status is Label.OUT:
        return rect(x, y + 8.5, width, 3, "cell out", *hint, rx=1)
    return rect(x, y + 4, width, 12, "cell undetermined", *hint, rx=1)


# --- a stage ---------------------------------------------------------------------------------


def series(lines: Sequence[Metrics]) -> list[tuple[str, list[tuple[int, float]]]]:
    """(name, [(step, value)]) of every metric worth a curve, in the order of their appearance.

    Example:
        >>> series([{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0, "mine/kl": 0.1}])
        [('loss', [(0, 2.0), (1, 1.0)]), ('kl', [(1, 0.1)])]
    """
    found = list(dict.fromkeys(name for line in lines for name in line))
    shown = []
    for name in found:
        short = name.rpartition("/")[2]
        by_author = name.startswith("authors/") and short in found  # the same once more
        if short in SHOWN and not by_author:
            points = [(int(line["step"]), line[name]) for line in lines if name in line]
            shown.append((short.replace("_", " "), points))
    return shown


def curve(name: str, points: Sequence[tuple[int, float]], *, ident: str, stage: str) -> Markup:
    """One series over the steps of a stage, with its first and last value. Gaps break the line."""
    points = [(step, v) for step, value in points if (v := known(value)) is not None]
    left, right, top, bottom = 2.0, 236.0, 26.0, 88.0
    parts = [label(left, 13, fit(name, 276, 12), "strong s")]
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
    return figure(*parts, ident=ident, width=292, height=112, title=f"{name} of {stage}", desc=told)


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


def time_bar(seconds: Mapping[str, float], *, ident: str, title: str, most: float = 0) -> Markup:
    """One stacked bar of seconds by the clock's names, coloured by group.

    ``most`` sets the scale, so that bars of several stages can be compared.
    """
    total = sum(seconds.values())
    scale = 1000 / max(total, most, 1e-9)
    drawn, x = [rect(0, 0, 1000, 26, "track", rx=3)], 0.0
    for name, amount in seconds.items():
        width = amount * scale
        words = f"{name}: {duration(amount)}, {amount / total:.0%}"
        class_ = f"time {GROUP_OF[name].replace(' ', '-')}"
        drawn.append(rect(x, 0, width - 1.5, 26, class_, tag("title", words)))
        x += width
    told = ", ".join(f"{name} {duration(amount)}" for name, amount in seconds.items())
    return figure(
        *drawn, ident=ident, width=1000, height=26, title=title, desc=told or "no times",
        class_="bar",
        stretch=True,
    )  # fmt: skip
