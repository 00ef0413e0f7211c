"""Drawing primitives: escaped SVG elements, text that fits its box, and number words.

Every string passes through :func:`tag`, which escapes it. Colours are CSS classes, so that one
drawing serves the light and the dark page.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from markupsafe import Markup, escape

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
WIDE_CHARACTER, NARROW_CHARACTER = 1.0, 0.6  # of the font size, a wide sans serif's average


def clean(text: str) -> str:
    """Text without the characters that XML cannot hold.

    Example:
        >>> clean("a\\x00b")
        'ab'
    """
    return NOT_XML.sub("", text)


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """One element. Plain strings are escaped, Markup is not; attributes are escaped always.

    ``stroke_width`` becomes ``stroke-width`` and ``class_`` becomes ``class``; None is left out.

    Raises:
        ValueError: a coordinate is not finite.

    Example:
        >>> tag("text", "<b>", x=1.504, class_="note")
        Markup('<text x="1.5" class="note">&lt;b&gt;</text>')
    """
    parts = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _attribute(value))
        for key, value in attributes.items()
        if value is not None
    ]
    body = Markup("").join(escape(c if isinstance(c, Markup) else clean(c)) for c in children)
    start = Markup("").join(parts)
    if not body:
        return Markup("<{}{}/>").format(Markup(name), start)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), start, body)


def _attribute(value: str | float) -> str:
    if isinstance(value, str):
        return clean(value)
    if not math.isfinite(value):
        raise ValueError(f"a coordinate of {value} in a drawing")
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def figure(
    *children: str,
    ident: str,
    width: float,
    height: float,
    title: str,
    desc: str,
    class_: str = "chart",
    stretch: bool = False,
) -> Markup:
    """A whole drawing, with a name and a description for those who cannot see it.

    ``stretch`` lets CSS choose width and height apart, for drawings without text.
    """
    return tag(
        "svg",
        tag("title", title, id=f"{ident}-t"),
        tag("desc", desc, id=f"{ident}-d"),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_attribute(width)} {_attribute(height)}",
        preserveAspectRatio="none" if stretch else None,
        role="img",
        aria_labelledby=f"{ident}-t {ident}-d",
        class_=class_,
    )


def rect(
    x: float, y: float, width: float, height: float, class_: str, *children: str, rx: float = 0
) -> Markup:
    """A rectangle; a negative width or height is drawn as zero."""
    return tag(
        "rect",
        *children,
        x=x,
        y=y,
        width=max(width, 0.0),
        height=max(height, 0.0),
        rx=rx or None,
        class_=class_,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight stroke."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def label(x: float, y: float, text: str, class_: str = "note", *, anchor: str = "start") -> Markup:
    """Text on its baseline."""
    shown = None if anchor == "start" else anchor
    return tag("text", text or " ", x=x, y=y, class_=class_, text_anchor=shown)


def path(d: str, class_: str, *, marker: str | None = None) -> Markup:
    """A path; ``marker`` is the id of an arrow head in the page's definitions."""
    end = f"url(#{marker})" if marker else None
    return tag("path", d=d, class_=class_, marker_end=end)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Straight segments through points."""
    return path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_)


def width_of(text: str, size: float) -> float:
    """Estimated width of text at a font size, in the same unit.

    Example:
        >>> round(width_of("abcd", 10), 1), width_of("漢字", 10)
        (24.0, 20.0)
    """
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return size * (wide * WIDE_CHARACTER + (len(text) - wide) * NARROW_CHARACTER)


def fit(text: str, width: float, size: float) -> str:
    """Text cut with an ellipsis where it would not fit.

    Example:
        >>> fit("consolidate", 200, 10), fit("consolidate", 40, 10)
        ('consolidate', 'conso…')
    """
    text = " ".join(clean(text).split())
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, width: float, size: float, *, max_lines: int) -> list[str]:
    """Text in at most ``max_lines`` lines that fit; the last one is cut with an ellipsis.

    Words break after a hyphen, a slash or a colon where they would not fit a line.

    Example:
        >>> wrap("one two three", 50, 10, max_lines=2)
        ['one two', 'three']
        >>> wrap("the org/model-base", 60, 10, max_lines=3)
        ['the org/', 'model-base']
    """
    pieces = re.findall(r"\S*?[-/:_](?=\S)|\S+\s*", " ".join(clean(text).split()))
    lines = [""]
    while pieces and (len(lines) < max_lines or _fits(lines[-1] + pieces[0], width, size)):
        if _fits(lines[-1] + pieces[0], width, size) or not lines[-1]:
            lines[-1] += pieces.pop(0)
        else:
            lines.append("")
    lines[-1] += "".join(pieces)
    return [fit(row, width, size) for row in lines]


def _fits(text: str, width: float, size: float) -> bool:
    return width_of(text.rstrip(), size) <= width


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least ``gap`` apart where the room allows, in order.

    Example:
        >>> spread([10, 11, 50], gap=10, low=0, high=100)
        [10, 20, 50]
        >>> spread([98, 99], gap=10, low=0, high=100)
        [90, 100]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        floor = placed[-1] + gap if placed else low
        placed.append(max(wanted[i], floor))
    ceiling = high
    for j in range(len(placed) - 1, -1, -1):
        placed[j] = min(placed[j], ceiling)
        ceiling = placed[j] - gap
    at = dict(zip(order, placed, strict=True))
    return [at[i] for i in range(len(wanted))]


def compact(value: float) -> str:
    """A short number for an axis or a label, three significant digits.

    Example:
        >>> compact(0.8123), compact(1234567), compact(3e-5), compact(-2), compact(0)
        ('0.812', '1.23M', '3e-05', '-2', '0')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(42), duration(150), duration(7260), duration(float("nan"))
        ('42 s', '2 min 30 s', '2 h 1 min', 'unknown')
    """
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 or not seconds else f"{seconds:.2f} s"
    big, small, units = (
        (whole // 60, whole % 60, ("min", "s"))
        if whole < 3600
        else (whole // 3600, whole % 3600 // 60, ("h", "min"))
    )
    return f"{big} {units[0]} {small} {units[1]}" if small else f"{big} {units[0]}"
