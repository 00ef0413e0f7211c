"""The report page: what it says, what it never lets through, and what it does when parts miss."""

from __future__ import annotations

import ast
import base64
import copy
import dataclasses
import hashlib
import math
import re
import subprocess
import sys
import typing
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from markupsafe import Markup
from report_fixture import attribution, curve_of, interval, profile_of, run_report

import posttrain.report
from posttrain import Opd
from posttrain.core.proofs import Proof
from posttrain.core.provenance import Kind, Producer
from posttrain.core.trajectory import Trajectory
from posttrain.measure.attribution import Attribution, ChangeKind, PolicyChange
from posttrain.measure.bootstrap import Interval
from posttrain.measure.passk import Curve
from posttrain.measure.profile import Profile
from posttrain.measure.reading import Reading
from posttrain.measure.retained import Retained
from posttrain.measure.support import Label
from posttrain.pages.svg import tag
from posttrain.pages.template import Section
from posttrain.parts.sources.dataset import Dataset
from posttrain.recipe import Recipe, Stage
from posttrain.report.change import change_chart
from posttrain.report.charts import (
    curve,
    pass_at_k,
    series,
    support_map,
    thinned,
    time_bar,
    token_bar,
)
from posttrain.report.headline import headline
from posttrain.report.render import render
from posttrain.report.view import PolicyReport, RunReport, Sample, StageReport
from posttrain.report.waterfall import waterfall
from posttrain.run.history import GateRecord, StageHistory
from posttrain.run.ledger import Record, Verified
from posttrain.run.store import ProducerTokens, UseRole

SVG = re.compile(r"<svg\b.*?</svg>", re.DOTALL)
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></svg><a b='")


class Reader(HTMLParser):
    """Collects the text, the tags and the attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._hidden = 0
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._hidden += tag in ("style", "script")
        if tag in ("td", "th", "dt", "dd", "li", "p", "div", "text", "title", "desc"):
            self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data


def fields_of(value) -> dict[str, typing.Any]:
    """Fields and their types of a dataclass or a struct; nothing for any other value."""
    if isinstance(value, msgspec.Struct):
        return {f.name: f.type for f in msgspec.structs.fields(value)}
    if dataclasses.is_dataclass(value):
        return {f.name: f.type for f in dataclasses.fields(value)}
    return {}


def rewritten(value, words):
    """The same tree with ``words`` applied to every string that somebody could have chosen.

    Nothing is validated: what a page is given is not trusted to have been. Names of our own are
    left alone: enums, literals, and keys of mappings that hold other things than strings.
    """
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        return words(value)
    if isinstance(value, tuple):
        return tuple(rewritten(v, words) for v in value)
    if isinstance(value, Mapping):
        texts = all(type(v) is str for v in value.values())
        return {words(k) if texts else k: rewritten(v, words) for k, v in value.items()}
    made = copy.copy(value) if (fields := fields_of(value)) else value
    for name, kind in fields.items():
        if "Literal" in str(kind):
            continue
        new = rewritten(getattr(value, name), words)
        if isinstance(value, msgspec.Struct):
            msgspec.structs.force_setattr(made, name, new)
        else:
            object.__setattr__(made, name, new)
    return made


def walk(value, kind):
    """All instances of a class in the tree, itself included."""
    if isinstance(value, kind):
        yield value
    if isinstance(value, tuple | Mapping):
        for v in value.values() if isinstance(value, Mapping) else value:
            yield from walk(v, kind)
    else:
        for name in fields_of(value):
            yield from walk(getattr(value, name), kind)


SHOWN = {
    RunReport: ("machine",),
    Proof: ("subject", "of", "words"),
    Recipe: ("name",),
    Record: ("time",),
    Verified: ("head",),
    PolicyReport: ("name",),
    Profile: ("task", "prompts"),
    PolicyChange: ("before", "after"),
    Attribution: ("task",),
    StageReport: ("roles",),
    Stage: ("name",),
    Dataset: ("name",),
    ProducerTokens: ("producer",),
    GateRecord: ("words",),
    Retained: ("task", "learned"),
    Sample: ("texts",),
    Trajectory: ("task",),
    Producer: ("name",),
}
"""Where the strings of a page come from."""


def shown_strings(report: RunReport) -> set[str]:
    """Every string of a run that its page has to show."""
    found = [
        text
        for kind, names in SHOWN.items()
        for value in walk(report, kind)
        for name in names
        for text in walk(getattr(value, name), str)
        if not isinstance(text, Enum)
    ]
    versions = report.began.body["libraries"]
    teachers = [t for s in report.stages for t in s.record.teachers]
    return {*found, *versions, *versions.values(), *teachers, report.recipe.model}


def intervals_of(report: RunReport) -> list[Interval | Reading]:
    """Every number with bounds that a page has to show."""
    found: list[Interval | Reading | None] = []
    for p in walk(report.policies, Profile):
        found += [*(p.curve.at(k) for k in p.curve.ks), p.kl_base, p.entropy, p.tokens]
    for a in walk(report, Attribution):
        found += [*a.parts.values(), a.before, a.after, a.retention]
    found += walk(report.retained, Reading)
    return [i for i in found if i is not None]


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in SVG.findall(page)]


def check_drawings(page: str) -> None:
    """Well-formed, named, uniquely identified, and finite in every coordinate."""
    found = drawings(page)
    assert found
    for root in found:
        for element in root.iter():
            for name, value in element.attrib.items():
                if name.split("}")[-1] in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "d",
                                           "width", "height", "viewBox", "points"):  # fmt: skip
                    assert not re.search("nan|inf|none", value, re.IGNORECASE), (name, value)
            assert float(element.get("width", "0")) >= 0
        if root.get("role") == "img":
            title, desc = root[0], root[1]
            assert title.tag.endswith("title")
            assert desc.tag.endswith("desc")
            assert title.text
            assert desc.text
            assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        else:
            assert root.get("aria-hidden") == "true"
    idents = re.findall(r'\bid="([^"]*)"', page)
    assert len(idents) == len(set(idents))


@pytest.fixture(scope="module")
def view() -> RunReport:
    return run_report()


@pytest.fixture(scope="module")
def page(view: RunReport) -> str:
    return render(view)


def bare(**parts) -> RunReport:
    """A run in which nothing was measured."""
    values = {
        "recipe": Recipe(name="bare", model="b"),
        "machine": "cpu",
        "ledger": Verified(num_records=0, head="00ff", kinds={}),
    }
    return RunReport(**{**values, **parts})


def estimate(value: float, margin: float | None = 0.05) -> Interval:
    if margin is None:
        return interval(value)
    return interval(value, max(value - margin, 0.0), min(value + margin, 1.0))


NEW, SHARP, KEPT = ChangeKind.NEWLY_REACHABLE, ChangeKind.SHARPENED, ChangeKind.KEPT
WEAK, LOST, OPEN = ChangeKind.WEAKENED, ChangeKind.LOST, ChangeKind.UNDETERMINED


def change(
    parts: dict[ChangeKind, Interval] | None = None, *, task: str = "t", **ends
) -> Attribution:
    """A change; a part that is not given is about zero."""
    return attribution(task, {**dict.fromkeys(ChangeKind, estimate(0.0)), **(parts or {})}, **ends)


def compared(*changes: Attribution) -> PolicyChange:
    return PolicyChange(before="base", after="last", tasks=changes, support=())


def policy(name: str, **rates: Interval) -> PolicyReport:
    tasks = tuple(profile_of(t, curve_of(t, {1: rate})) for t, rate in rates.items())
    return PolicyReport(name=name, tasks=tasks)


def with_stages(view: RunReport, of) -> RunReport:
    """The run with every stage's record replaced."""
    stages = tuple(replace(s, record=of(s.record)) for s in view.stages)
    return replace(view, stages=stages)


def taught(record: StageHistory, *teachers: str) -> StageHistory:
    """The stage as if it had learned from these teachers."""
    method = Opd(tasks=("sums",), teachers={f"task-{i}": t for i, t in enumerate(teachers)})
    return replace(record, planned=replace(record.planned, composition=method.compose()))


def named(stage: StageReport, name: str) -> StageReport:
    planned = stage.record.planned
    spec = msgspec.structs.replace(planned.spec, name=name)
    record = replace(stage.record, planned=replace(planned, spec=spec))
    return replace(stage, record=record)


# --- nothing of the user's gets through ------------------------------------------------------


@pytest.mark.parametrize("attack", HOSTILE)
def test_no_string_of_a_run_becomes_markup(view: RunReport, page: str, attack: str) -> None:
    attacked = render(rewritten(view, lambda s: attack))
    assert attack not in attacked
    before, after = Reader(page), Reader(attacked)
    assert after.tags.count("script") == before.tags.count("script") == 1
    assert "img" not in after.tags
    assert not [a for a, _ in after.attributes if a.startswith("on")]
    assert set(after.tags) == set(before.tags)
    check_drawings(attacked)


def test_every_string_of_a_run_is_shown_and_escaped(view: RunReport) -> None:
    # Equal strings get equal marks, so that stages still meet their comparisons.
    marks: dict[str, str] = {}
    marked = rewritten(view, lambda s: marks.setdefault(s, f"<m{len(marks)}>&'\""))
    shown = render(marked)
    text = Reader(shown).text
    assert not [mark for mark in marks.values() if mark in shown]
    expected = shown_strings(view)
    assert len(expected) > 150
    assert [s for s in expected if marks[s] not in text] == []


def test_characters_that_xml_cannot_hold_are_dropped(view: RunReport) -> None:
    dirty = render(rewritten(view, lambda s: f"\x00\x1b[31m{s}\ufffe"))
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", dirty)
    check_drawings(dirty)


def test_attributes_are_escaped_even_for_markup() -> None:
    made = tag("g", x='"><img onerror="1"', class_=Markup("<b>"))
    assert ET.fromstring(made).attrib == {"x": '"><img onerror="1"', "class": "<b>"}


def test_a_coordinate_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="nan"):
        tag("rect", x=float("nan"))


def test_the_page_loads_nothing(page: str) -> None:
    for name, value in Reader(page).attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith("#"), (name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)\)", page))
    addresses = re.sub(r'xmlns="http://www\.w3\.org/2000/svg"', "", page)
    assert not re.search(r"https?:|//\w+\.|@import|<link|<iframe|fetch\(|XMLHttp", addresses)


def test_the_policy_admits_exactly_the_script_of_the_page(page: str) -> None:
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


# --- what the page says ----------------------------------------------------------------------


def test_all_numbers_of_a_run_are_on_its_page(view: RunReport, page: str) -> None:
    text = Reader(page).text
    found = intervals_of(view)
    assert len(found) > 300
    for e in found:
        assert f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" in text
    tokens = [t for s in view.stages for t in s.record.tokens]
    trained = sum(t.completion_tokens for t in tokens if t.role is UseRole.TRAIN)
    live = (Kind.LEARNER, Kind.TEACHER)
    drawn = sum(t.completion_tokens for t in tokens if t.kind in live)
    counts = [trained, sum(t.completion_tokens for t in tokens) - trained]
    counts += [view.tokens_measured + drawn]
    counts += [t.completion_tokens for t in tokens] + [len(s.record.metrics) for s in view.stages]
    for n in counts:
        assert re.search(rf"(?<![\d,]){n:,}(?![\d,])", text), n
    for _, points in [x for s in view.stages for x in series(s.record.metrics)]:
        for _, value in (points[0], points[-1]):
            assert f"{value:.3g}" in text
    for words in ("7 min 4 s", "reward 1.00", "reward 0.00", "seed 7", "32 × 64", "3 min 32 s"):
        assert words in text


def test_each_estimate_of_pass_at_k_stands_in_the_row_of_its_policy(
    view: RunReport, page: str
) -> None:
    section = page[page.index('id="passk"') : page.index('id="support"')]
    panels = section.split("<figure")[1:]
    measured = view.policies[1].tasks[3]
    rows = [r for r in panels[3].split("<tr>") if '<th scope="row">expand</th>' in r]
    assert len(rows) == 1
    cells = re.findall("<td>(.*?)</td>", rows[0])
    rates = [measured.curve.at(k) for k in measured.curve.ks]
    assert cells == ["32 × 64", *(f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rates)]


def test_headline_claims_only_what_excludes_zero() -> None:
    run = bare(
        recipe=Recipe(name="bare", model="lab-base"),
        policies=(
            policy("base", reverse=estimate(0.0), sums=estimate(0.9), chains=estimate(0.4)),
            policy("last", reverse=estimate(0.81, 0.07), sums=estimate(0.92), chains=estimate(0.2)),
        ),
        whole=compared(
            change({NEW: estimate(0.8), LOST: estimate(0.04)}, task="reverse"),
            change({SHARP: estimate(0.05), KEPT: estimate(0.9)}, task="sums"),
            change({LOST: estimate(0.3), SHARP: estimate(0.1)}, task="chains"),
        ),
    )
    assert headline(run).text == (
        "Training after lab-base: reverse became reachable (0.00 → 0.81 [0.74, 0.88]); "
        "sums was kept (0.90 → 0.92 [0.87, 0.97]); and "
        "chains was partly lost, though 0.10 [0.05, 0.15] sharpened (0.40 → 0.20 [0.15, 0.25])."
    )


def test_headline_without_comparison_judges_by_disjoint_intervals() -> None:
    ends = (
        policy("base", up=estimate(0.2), same=estimate(0.2), bare=estimate(0.2, None)),
        policy("last", up=estimate(0.4), same=estimate(0.28), bare=estimate(0.9, None)),
    )
    words = {c.task: c.words for c in headline(bare(policies=ends)).clauses}
    assert words == {
        "up": "improved",
        "same": "showed no clear change",
        "bare": "has no interval to judge by",
    }


def test_headline_says_undetermined_when_most_is() -> None:
    ends = (policy("a", t=estimate(0.1)), policy("b", t=estimate(0.2)))
    run = bare(policies=ends, whole=compared(change({OPEN: estimate(0.7)})))
    assert headline(run).clauses[0].words == "stayed undetermined"


def test_a_gain_without_an_interval_is_not_claimed() -> None:
    ends = (policy("a", t=estimate(0.1)), policy("b", t=estimate(0.6)))
    run = bare(policies=ends, whole=compared(change({NEW: estimate(0.5, None)})))
    assert headline(run).clauses[0].words == "showed no clear change"


def test_a_broken_ledger_is_shouted() -> None:
    assert "does not verify" not in render(bare())
    assert "does not verify" in render(bare(ledger=None))


def test_what_the_metrics_warn_of_is_said_once(view: RunReport, page: str) -> None:
    """Idle steps, and changes that the labels could not attribute."""
    text = Reader(page).text
    assert "reshape: 2 steps had nothing to learn from" in text
    unclear = [a for a in view.whole.tasks if a.undetermined_gain.value > 0.05]
    assert unclear
    for a in unclear:
        words = f"{a.task}: a change of {a.undetermined_gain.value:.2f} could not be attributed"
        assert text.count(words) == 1


def test_a_section_of_another_unit_stands_after_the_summary(view: RunReport, page: str) -> None:
    html = Markup('<section id="mine"><h2>Mine</h2></section>')
    shown = render(view, sections=[Section(ident="mine", title="My part", html=html)])
    assert '<a href="#what">Summary</a><a href="#mine">My part</a>' in shown
    assert shown.index('id="what"') < shown.index(html) < shown.index('id="pipeline"')
    link = '<a href="#mine">My part</a>'
    assert shown.replace(link, "").replace(f"{html}\n", "") == page


# --- what the drawings show ------------------------------------------------------------------


def boxes(svg: str, class_: str) -> list[tuple[float, float]]:
    """(x, width) of the rectangles of a class that are not keys of a legend."""
    found = [e for e in ET.fromstring(svg).iter() if e.get("class") == class_]
    return [(float(e.get("x")), float(e.get("width"))) for e in found if e.get("rx") is None]


@pytest.mark.parametrize("narrow", [False, True])
def test_change_bars_diverge_from_zero_in_one_scale(narrow: bool) -> None:
    sizes = {NEW: 0.4, SHARP: 0.2, WEAK: 0.1, LOST: 0.05, KEPT: 0.25}
    parts = change({part: estimate(size) for part, size in sizes.items()})
    svg = change_chart([parts], ident="c", title="t", unit="share", narrow=narrow)
    zero = 180.0 if narrow else 336.0
    (sharp,), (new,) = boxes(svg, "part sharp"), boxes(svg, "part new")
    (weak,), (lost,) = boxes(svg, "part weak"), boxes(svg, "part lost")
    unit = sharp[1] / 0.2
    assert sharp[0] == zero
    assert new == pytest.approx((zero + 0.2 * unit, 0.4 * unit), abs=0.02)
    assert weak == pytest.approx((zero - 0.1 * unit, 0.1 * unit), abs=0.02)
    assert lost == pytest.approx((zero - 0.15 * unit, 0.05 * unit), abs=0.02)


def test_the_waterfall_starts_at_before_ends_at_after_and_leaves_no_gap() -> None:
    sizes = {NEW: 0.4, SHARP: 0.1, WEAK: 0.05, LOST: 0.2}
    parts = change(
        {part: estimate(size) for part, size in sizes.items()}
        | {OPEN: interval(-0.05, -0.1, 0.02)},
        before=estimate(0.3),
        after=estimate(0.5),
    )
    svg = waterfall(parts, before="a", after="b", ident="w")
    assert svg is not None
    rects = list(ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"))
    unit = float(rects[0].get("height")) / 0.3
    foot = float(rects[0].get("y")) + float(rects[0].get("height"))
    spans = [
        ((foot - float(r.get("y")) - float(r.get("height"))) / unit,
         (foot - float(r.get("y"))) / unit)
        for r in rects
    ]  # fmt: skip
    levels = [(0, 0.3), (0.3, 0.7), (0.7, 0.8), (0.75, 0.8), (0.55, 0.75), (0.5, 0.55), (0, 0.5)]
    assert [x for pair in spans for x in pair] == pytest.approx(
        [x for pair in levels for x in pair], abs=2e-3
    )
    text = [t.text for t in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [t for t in text if re.match("[+−]|0\\.[35]0", t)] == [
        "0.30", "+0.40", "+0.10", "−0.05", "−0.20", "−0.05", "0.50",
    ]  # fmt: skip
    nowhere = change(before=interval(math.nan))
    assert waterfall(nowhere, before="a", after="b", ident="w") is None


def test_pass_at_k_is_drawn_on_a_log2_axis_with_equal_steps_per_doubling() -> None:
    rates = {k: estimate(rate) for k, rate in ((1, 0.0), (8, 0.5), (64, 1.0))}
    svg = pass_at_k("t", [("p", curve_of("t", rates))], ident="p")
    dots = [e for e in ET.fromstring(svg).iter() if e.tag.endswith("circle")]
    xs, ys = ([float(d.get(a)) for d in dots] for a in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2])
    assert ys[0] > ys[2]


def test_first_policy_is_drawn_as_before_and_last_as_after_even_when_some_did_not_measure() -> None:
    seen = curve_of("t", {1: estimate(0.5), 2: estimate(0.6)})
    svg = pass_at_k("t", [("base", None), ("middle", seen), ("final", seen)], ident="p")
    names = {e.text: e.get("class") for e in ET.fromstring(svg).iter() if e.tag.endswith("text")}
    assert names["final"] == "line-label after"
    assert names["middle"] == "line-label mid m0"
    assert "base" not in names


def test_support_map_has_one_cell_per_prompt_and_policy() -> None:
    i, o, u = Label.IN, Label.OUT, Label.UNDETERMINED
    rows = [("a", (o, i, u, o)), ("b", (i, i, i, o))]
    svg = support_map("t", ("q0", "q1", "q2", "q3"), rows, ident="s")
    cells = [e for e in ET.fromstring(svg).iter() if (e.get("class") or "").startswith("cell")]
    assert [c.get("class") for c in cells].count("cell in") == 4
    assert [c.get("class") for c in cells].count("cell out") == 3
    assert [c.get("class") for c in cells].count("cell undetermined") == 1
    # Prompts with the same story stand together: in, undetermined, out (in later), out.
    assert [c[0].text for c in cells[:4]] == [
        "q1: in for a",
        "q2: undetermined for a",
        "q0: out for a",
        "q3: out for a",
    ]


def test_support_map_of_many_prompts_stays_small_and_keeps_its_proportions() -> None:
    labels = [Label.IN] * 750 + [Label.OUT] * 250
    svg = support_map("t", [f"q{n}" for n in range(1000)], [("a", labels)], ident="s")
    cells = [e for e in ET.fromstring(svg).iter() if (e.get("class") or "").startswith("cell")]
    widths = [float(c.get("width")) for c in cells]
    assert len(cells) == 2
    assert widths[0] / widths[1] == pytest.approx(3.0, rel=0.01)


def test_every_policy_has_a_label_for_every_prompt() -> None:
    with pytest.raises(ValueError, match="shorter"):
        support_map("t", ("q", "r"), [("a", [Label.IN])], ident="s")
    with pytest.raises(ValueError, match="shorter"):
        support_map("t", ("q",), [("a", [Label.IN]), ("b", [])], ident="s")


def test_token_bar_is_proportional_and_hatches_what_was_discarded() -> None:
    counts = [(Kind.LEARNER, "l", 300, False), (Kind.HUMAN, "h", 100, True)]
    svg = token_bar(counts, ident="b", title="t", most=800)
    assert boxes(svg, "kind learner")[0] == (0.0, 375.0 - 1.5)
    assert boxes(svg, "kind human")[0] == boxes(svg, "discarded")[0] == (375.0, 125.0 - 1.5)


def test_time_bar_is_proportional_and_says_shares() -> None:
    svg = time_bar({"decode": 30.0, "idle": 10.0}, ident="b", title="t", most=80.0)
    assert boxes(svg, "time sampling")[0] == (0.0, 375.0 - 1.5)
    assert boxes(svg, "time the-rest")[0] == (375.0, 125.0 - 1.5)
    assert "decode: 30 s, 75%" in svg
    assert "no times" in time_bar({}, ident="b", title="t")


def test_a_long_series_keeps_its_extremes_and_ends() -> None:
    points = [(i, 0.0) for i in range(10_000)]
    points[1234], points[8765] = (1234, 9.0), (8765, -7.0)
    thin = thinned(points)
    assert len(thin) <= 400
    assert {points[0], points[-1], (1234, 9.0), (8765, -7.0)} <= set(thin)
    assert thin == sorted(thin)


def test_a_series_leaves_out_values_that_are_not_numbers() -> None:
    points = [(1, math.nan), (2, 0.5), (3, math.inf), (4, 0.75)]
    svg = curve("kl", points, ident="k", stage="s")
    assert "from 0.5 at step 2 to 0.75 at step 4" in svg


# --- what is missing -------------------------------------------------------------------------

NOTHING = interval(math.nan)
LONG = "a-very-long-name-" * 12


def without_bounds(value):
    """The same tree, every interval without an end."""
    ends = {"low": -math.inf, "high": math.inf}
    if isinstance(value, Interval | Reading):
        return replace(value, **ends)
    if isinstance(value, Curve):
        return replace(value, **{k: (end,) * len(value.ks) for k, end in ends.items()})
    if isinstance(value, tuple):
        return tuple(without_bounds(v) for v in value)
    if isinstance(value, Mapping):
        return {k: without_bounds(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, StageHistory | Sample):
        names = [f.name for f in dataclasses.fields(value)]
        return replace(value, **{n: without_bounds(getattr(value, n)) for n in names})
    return value


def all_zero() -> RunReport:
    zero = interval(0.0, 0.0, 0.0)
    flat = profile_of("none", curve_of("none", dict.fromkeys((1, 2, 4), zero)))
    return bare(
        policies=(PolicyReport(name="a", tasks=(flat,)), PolicyReport(name="b", tasks=(flat,))),
        whole=compared(attribution("none", {})),
    )


def one_prompt() -> RunReport:
    curve = curve_of("one", {1: estimate(1.0)}, prompts=1, samples=1)
    task = profile_of("one", curve, [Label.UNDETERMINED])
    return bare(policies=(PolicyReport(name="a", tasks=(task,)),))


VARIANTS = {
    "nothing": (lambda v: bare(), "Nothing was measured in this run"),
    "no stages": (lambda v: replace(v, stages=()), "This run has no stages"),
    "no rewards": (
        lambda v: replace(
            v,
            stages=tuple(
                replace(s, samples=tuple(replace(x, reward=None) for x in s.samples))
                for s in v.stages
            ),
        ),
        "no reward",
    ),
    "one policy": (
        lambda v: replace(
            v,
            policies=v.policies[:1],
            whole=None,
            stages=tuple(replace(s, change=None, roles=()) for s in v.stages),
        ),
        "Only lab-base was measured:",
    ),
    "no curves": (
        lambda v: with_stages(v, lambda r: replace(r, metrics=())),
        "No curve was recorded",
    ),
    "empty series": (
        lambda v: with_stages(v, lambda r: replace(r, metrics=({"step": 1, "loss": math.nan},))),
        "no values",
    ),
    "all zeros": (lambda v: all_zero(), "none showed no clear change (0.00 → 0.00 [0.00, 0.00])"),
    "one prompt": (lambda v: one_prompt(), "1 prompt"),
    "no intervals": (without_bounds, "(no interval)"),
    "not a number": (
        lambda v: replace(
            with_stages(
                v, lambda r: replace(r, done=msgspec.structs.replace(r.done, seconds=math.nan))
            ),
            whole=compared(change({LOST: NOTHING, KEPT: interval(math.inf)})),
        ),
        "kept not measured",
    ),
    "unfinished": (lambda v: with_stages(v, lambda r: replace(r, done=None)), "3 min 31 s"),
    "long names": (lambda v: rewritten(v, lambda s: LONG + s), LONG),
    "empty names": (lambda v: rewritten(v, lambda s: ""), "Stage by stage"),
    "outside teacher": (
        lambda v: with_stages(v, lambda r: taught(r, "path:hub/big")),
        "taught by path:hub/big",
    ),
    "nine stages": (
        lambda v: replace(v, stages=tuple(named(v.stages[i % 4], f"s{i}") for i in range(9))),
        "s8",
    ),
    "own teacher": (
        lambda v: with_stages(v, lambda r: taught(r, r.name, "base")),
        "reshape teaches reshape",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_page_with_missing_or_odd_parts_is_whole(view: RunReport, name: str) -> None:
    make, words = VARIANTS[name]
    shown = render(make(view))
    check_drawings(shown)
    text = Reader(shown).text
    assert words in text
    assert not re.search(r"\b(nan|None|Undefined|inf)\b", text)
    assert Reader(shown).tags.count("section") == 11


def test_the_full_page_has_sound_drawings_and_is_the_same_twice(view: RunReport, page: str) -> None:
    check_drawings(page)
    assert render(view) == page


# --- readable by everybody -------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(page: str, theme: str) -> None:
    start = ":root {" if theme == "light" else ':root[data-theme="dark"] {'
    block = page[page.index(start) : page.index("}", page.index(start))]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    grounds = ("bg", "card")
    inks = ("ink", "ink-2", "ink-3", "accent", "off-ink", "on-ink", "mixed-ink", "good-ink",
            "bad-ink")  # fmt: skip
    pairs = [(ink, ground) for ink in inks for ground in grounds]
    pairs += [(ink, f"{k.value}-soft") for ink in ("ink", "ink-2") for k in Kind]
    pairs += [("off-ink", "external-soft"), ("on-ink", "learner-soft"), ("ink-2", "track")]
    pairs += [("good-ink", "good-soft"), ("bad-ink", "bad-soft"), ("mixed-ink", "teacher-soft")]
    pairs += [("ink-3", "track"), ("bg", "ink")]
    low = {p: round(c, 2) for p in pairs if (c := contrast(colour[p[0]], colour[p[1]])) < 4.5}
    assert not low


def test_both_dark_pages_have_the_same_colours(page: str) -> None:
    chosen = re.search(r':root\[data-theme="dark"\] \{(.*?)\}', page, re.DOTALL)
    preferred = re.search(r':root:not\(\[data-theme="light"\]\) \{(.*?)\}', page, re.DOTALL)
    assert chosen
    assert preferred
    assert chosen[1].split() == preferred[1].split()


def test_it_needs_no_torch() -> None:
    """Nor does reading a run folder: test_run_history.py."""
    source = Path(posttrain.report.__file__).parents[2]
    code = "import posttrain.report.load, sys; print({'torch', 'transformers'} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True
    )
    assert ran.stdout.strip() == "set()"


def units_in(folder: Path) -> set[str]:
    """Units of ours that are imported in a folder, inside functions and for types as well."""
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            found |= {n.split(".")[1] for n in names if n.startswith("posttrain.")}
    return found


def test_report_and_diagnosis_do_not_know_each_other_nor_pages_either_of_them() -> None:
    ours = Path(posttrain.report.__file__).parents[1]
    assert "diagnosis" not in units_in(ours / "report")
    assert "report" not in units_in(ours / "diagnosis")
    assert units_in(ours / "pages") <= {"pages"}
