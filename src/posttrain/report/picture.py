"""The pipeline as a picture: base model, stages in order, teachers as dashed arrows.

    [base] ──▶ [1 expand] ──▶ [2 reshape] ──▶ …          one row, or one column on a narrow screen
         ╰╌╌╌╌╌ teacher ╌╌╌╌╌╌╌╌▲

A box says who wrote the training tokens, the method, what was intended and what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from posttrain.core.provenance import Regime
from posttrain.measure.attribution import MeasuredRole
from posttrain.pages.svg import compact, duration, figure, fit, label, path, rect, tag, wrap
from posttrain.report.view import RunReport, StageReport

MAX_ROLES = 6
REGIME_CLASS = {Regime.OFF: "off", Regime.ON: "on", Regime.MIXED: "mixed"}


@dataclass(frozen=True, slots=True)
class Box:
    """A placed rectangle."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """Horizontal middle."""
        return self.x + self.width / 2


def pipeline(report: RunReport, *, ident: str, vertical: bool = False) -> Markup:
    """All stages in order. ``vertical`` is the one-column drawing for narrow screens."""
    num_roles = max([min(len(s.roles), MAX_ROLES) for s in report.stages], default=0)
    more = any(len(s.roles) > MAX_ROLES for s in report.stages)
    height = 190.0 + 18 * max(num_roles + more, 1)
    base, boxes, size = _layout(report, height, vertical)
    parts = [_base(report, base)]
    previous = base
    for stage, box in zip(report.stages, boxes, strict=True):
        parts.append(_arrow(previous, box, vertical))
        parts.append(_stage(stage, box, number=boxes.index(box) + 1))
        previous = box
    parts += _teachers(report, base, boxes, vertical)
    captions = [_caption(i, s) for i, s in enumerate(report.stages, 1)]
    return figure(
        *parts,
        ident=ident,
        width=size[0],
        height=size[1],
        title=f"Pipeline of {report.recipe.name}",
        desc=f"From {report.base_model}: " + ("; ".join(captions) or "no stages") + ".",
        class_="chart tall" if vertical else "chart pipeline",
    )


def _caption(number: int, stage: StageReport) -> str:
    record, intends = stage.record, stage.record.planned.spec.intends
    roles = ", ".join(f"{task} {role}" for task, role in stage.roles) or "not measured"
    taught = f", taught by {', '.join(record.teachers)}" if record.teachers else ""
    intended = f", intended as {intends}" if intends else ""
    return (
        f"stage {number} {record.name}, {record.method}, {record.regime}{taught}{intended}, "
        f"measured: {roles}"
    )


def _layout(
    report: RunReport, height: float, vertical: bool
) -> tuple[Box, list[Box], tuple[float, float]]:
    taught = any(s.record.teachers for s in report.stages)
    num = len(report.stages)
    if vertical:
        width = 320.0 if taught else 352.0
        base = Box(4, 4, width, 56)
        gap = 48.0 if taught else 32.0
        boxes = [Box(4, 60 + gap + i * (height + gap), width, height) for i in range(num)]
        bottom = boxes[-1].y + height if boxes else base.y + base.height
        return base, boxes, (360, bottom + 4)
    top = 74.0 if taught else 6.0
    gap, base_width = 26.0, 104.0
    width = min(300.0, max(204.0, (1040 - base_width) / max(num, 1) - gap))
    base = Box(2, top + height / 2 - 42, base_width, 84)
    boxes = [Box(2 + base_width + gap + i * (width + gap), top, width, height) for i in range(num)]
    right = (boxes[-1].x + width if boxes else base.x + base_width) + 4
    return base, boxes, (max(right, 1040), top + height + 6)


def _base(report: RunReport, box: Box) -> Markup:
    lines = wrap(report.base_model, box.width - 18, 11.5, max_lines=3)
    rows = [label(box.x + 10, box.y + 20, "BASE MODEL", "eyebrow")]
    rows += [label(box.x + 10, box.y + 38 + 15 * i, row, "strong s") for i, row in enumerate(lines)]
    frame = rect(box.x, box.y, box.width, box.height, "box base", rx=8)
    return tag("g", tag("title", report.base_model), frame, *rows)


def _arrow(before: Box, after: Box, vertical: bool) -> Markup:
    if vertical:
        down = f"M{before.middle:.1f} {before.y + before.height:.1f}V{after.y - 3:.1f}"
        return path(down, "arrow", marker="head")
    y = before.y + before.height / 2
    return path(f"M{before.x + before.width:.1f} {y:.1f}H{after.x - 3:.1f}", "arrow", marker="head")


def _stage(stage: StageReport, box: Box, *, number: int) -> Markup:
    x, y, inner = box.x + 12, box.y, box.width - 24
    record, spec = stage.record, stage.record.planned.spec
    regime = REGIME_CLASS[record.regime]
    written = wrap(record.source, inner, 11.5, max_lines=2)
    num_tokens = sum(t.completion_tokens for t in record.tokens)
    spent = f"{len(record.metrics):,} steps · {duration(record.seconds)}"
    method = f"{record.method} · {spec.method.interface}"
    parts = [
        tag("title", f"{record.name}: {record.method}, {record.regime}, {record.source}"),
        rect(box.x, y, box.width, box.height, f"box {regime}", rx=8),
        rect(box.x, y, 5, box.height, f"strip {regime}", rx=2.5),
        label(x, y + 20, record.regime.upper(), f"eyebrow {regime}"),
        label(x, y + 41, fit(f"{number}  {record.name}", inner, 15.5), "strong l"),
        label(x, y + 58, fit(method, inner, 11.5), "ink s"),
        *[label(x, y + 75 + 14 * i, row, "note s") for i, row in enumerate(written)],
        label(x, y + 110, "intended", "note s"),
        label(x + 60, y + 110, fit(spec.intends or "not stated", inner - 60, 11.5), "ink s italic"),
        label(x, y + 128, "measured", "note s"),
        *_roles(stage, x, y + 147, inner),
        label(x, y + box.height - 24, fit(spent, inner, 11), "note s"),
        label(x, y + box.height - 10, f"{compact(num_tokens)} tokens", "note s"),
    ]
    return tag("g", *parts)


def _roles(stage: StageReport, x: float, y: float, inner: float) -> list[Markup]:
    """One row per task set: its mark, the measured role, and the task set at the right edge."""
    if not stage.roles:
        return [label(x + 60, y - 19, "not measured", "ink s italic")]
    rows: list[Markup] = []
    for i, (task, role) in enumerate(stage.roles[:MAX_ROLES]):
        row = y + 18 * i
        words = f"{role} ✓" if role == stage.record.planned.spec.intends else str(role)
        name = fit(task, max(inner - 22 - 6.6 * len(words), 24), 11.5)
        rows.append(
            tag(
                "g",
                tag("title", f"{task}: {words}"),
                role_glyph(role, x + 6, row - 4),
                label(x + 18, row, words, f"strong s {role}"),
                label(x + inner, row, name, "ink s", anchor="end"),
            )
        )
    hidden = len(stage.roles) - MAX_ROLES
    if hidden > 0:
        rows.append(label(x + 18, y + 18 * MAX_ROLES, f"and {hidden} more", "note s"))
    return rows


def role_glyph(role: MeasuredRole, x: float, y: float) -> Markup:
    """A small mark of its own shape for every role, so that colour is not needed to read it."""
    shapes = {
        MeasuredRole.EXPANSION: f"M{x - 5} {y}H{x + 5}M{x} {y - 5}V{y + 5}",
        MeasuredRole.RESHAPING: f"M{x - 5} {y + 4}L{x} {y - 4}L{x + 5} {y + 4}",
        MeasuredRole.CONSOLIDATION: f"M{x - 5} {y - 2.5}H{x + 5}M{x - 5} {y + 2.5}H{x + 5}",
        MeasuredRole.ATTRITION: f"M{x - 5} {y}H{x + 5}",
        MeasuredRole.UNDETERMINED: f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    }
    return path(shapes[role], f"glyph {role}")


def _teachers(report: RunReport, base: Box, boxes: list[Box], vertical: bool) -> list[Markup]:
    """Dashed arrows: from an earlier box, or from outside for a policy the picture has not."""
    places = {"base": base} | {s.record.name: b for s, b in zip(report.stages, boxes, strict=True)}
    parts: list[Markup] = []
    for stage, box in zip(report.stages, boxes, strict=True):
        name, teachers = stage.record.name, stage.record.teachers
        outside = [t for t in teachers if t not in places]
        for i, teacher in enumerate(t for t in teachers if t in places):
            draw = _arc_right if vertical else _arc_above
            parts.append(draw(places[teacher], box, nudge=i, words=f"{teacher} teaches {name}"))
        if outside:
            room = box.width * (0.45 if vertical or len(outside) < len(teachers) else 0.85)
            parts.append(_outsider(outside, box, vertical, room=room))
    return parts


def _arc_above(teacher: Box, box: Box, *, nudge: int, words: str) -> Markup:
    start, end = teacher.middle + 14, box.middle - 30 - 16 * nudge
    if teacher is box:
        start = box.middle + 30
    high = box.y - 34 - 9 * min(nudge, 3)
    shape = f"M{start:.1f} {teacher.y:.1f}V{high + 10:.1f}Q{start:.1f} {high:.1f} "
    side = 10 if end > start else -10
    shape += f"{start + side:.1f} {high:.1f}H{end - side:.1f}Q{end:.1f} {high:.1f} {end:.1f} "
    shape += f"{high + 10:.1f}V{box.y - 4:.1f}"
    parts = [tag("title", words), path(shape, "teach", marker="head-t")]
    if nudge == 0:
        parts.append(label(end + 8, box.y - 14, "teaches", "note s teacher-ink"))
    return tag("g", *parts)


def _arc_right(teacher: Box, box: Box, *, nudge: int, words: str) -> Markup:
    edge = box.x + box.width
    out = edge + 14 + 7 * min(nudge, 2)
    start, end = teacher.y + teacher.height * 0.6, box.y + 26 + 12 * nudge
    shape = f"M{edge:.1f} {start:.1f}H{out - 8:.1f}Q{out:.1f} {start:.1f} {out:.1f} "
    bend = 8 if end > start else -8
    shape += f"{start + bend:.1f}V{end - bend:.1f}Q{out:.1f} {end:.1f} {out - 8:.1f} {end:.1f}"
    shape += f"H{edge + 4:.1f}"
    parts = [tag("title", words), path(shape, "teach", marker="head-t")]
    if nudge == 0:
        parts.append(label(edge - 8, box.y - 12, "teaches", "note s teacher-ink", anchor="end"))
    return tag("g", *parts)


def _outsider(names: list[str], box: Box, vertical: bool, *, room: float) -> Markup:
    words = f"teacher {', '.join(names)}"
    right = box.x + box.width
    shown = fit(words, room - 16, 11.5)
    height = 22.0
    y = box.y - (42 if vertical else 72)
    x = right - room
    shape = f"M{right - 24:.1f} {y + height:.1f}V{box.y - 3:.1f}"
    return tag(
        "g",
        tag("title", words),
        rect(x, y, room, height, "box outsider", rx=6),
        label(x + 8, y + 15, shown, "note s teacher-ink"),
        path(shape, "teach", marker="head-t"),
    )
