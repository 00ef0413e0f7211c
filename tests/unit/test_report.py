"""The report page: what it says, what it never lets through, and what it does when parts miss."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup
from report_fixture import run_view

import posttrain.report
from posttrain.core.errors import DataError
from posttrain.core.provenance import Kind
from posttrain.report.change import change_chart
from posttrain.report.charts import curve, pass_at_k, support_map, thinned, time_bar, token_bar
from posttrain.report.headline import headline
from posttrain.report.render import render
from posttrain.report.svg import tag
from posttrain.report.view import (
    Change,
    Comparison,
    CurvePoint,
    Estimate,
    FoundView,
    Piece,
    PolicyTask,
    PolicyView,
    PromptSupport,
    RoundView,
    RunView,
    Seal,
    Series,
    Support,
    SupportMap,
    TimePart,
    Totals,
    TreatmentView,
)
from posttrain.report.waterfall import waterfall

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


def rewritten(value, words):
    """The same tree of dataclasses with ``words`` applied to every string in it."""
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        return words(value)
    if isinstance(value, tuple):
        return tuple(rewritten(v, words) for v in value)
    if dataclasses.is_dataclass(value):
        changes = {
            f.name: rewritten(getattr(value, f.name), words) for f in dataclasses.fields(value)
        }
        return replace(value, **changes)
    return value


def walk(value, kind):
    """All instances of a class in the tree, itself included."""
    if isinstance(value, kind):
        yield value
    if isinstance(value, tuple):
        for v in value:
            yield from walk(v, kind)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from walk(getattr(value, f.name), kind)


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
def view() -> RunView:
    return run_view()


@pytest.fixture(scope="module")
def page(view: RunView) -> str:
    return render(view)


def bare(**parts) -> RunView:
    """A run in which nothing was measured."""
    values = {
        "name": "bare",
        "created": "today",
        "base_model": "b",
        "machine": "cpu",
        "totals": Totals(wall_seconds=0, tokens_generated=0, tokens_trained=0),
        "ledger": Seal(head="00ff"),
        "recipe_digest": "ab12",
    }
    return RunView(**{**values, **parts})


def estimate(value: float | None, margin: float | None = 0.05) -> Estimate:
    if value is None or margin is None:
        return Estimate(value=value)
    return Estimate(value=value, low=max(value - margin, 0.0), high=min(value + margin, 1.0))


def change(task: str = "t", **parts: Estimate) -> Change:
    names = ("reachable", "sharpened", "kept", "weakened", "lost", "undetermined")
    return Change(**{"task": task, **dict.fromkeys(names, estimate(0.0)), **parts})


def policy(name: str, **rates: Estimate) -> PolicyView:
    tasks = tuple(
        PolicyTask(task=t, num_prompts=4, num_samples=8, pass_at_1=r) for t, r in rates.items()
    )
    return PolicyView(name=name, tasks=tasks)


# --- nothing of the user's gets through ------------------------------------------------------


@pytest.mark.parametrize("attack", HOSTILE)
def test_no_string_of_a_run_becomes_markup(view: RunView, page: str, attack: str) -> None:
    attacked = render(rewritten(view, lambda s: attack))
    assert attack not in attacked
    before, after = Reader(page), Reader(attacked)
    assert after.tags.count("script") == before.tags.count("script") == 1
    assert "img" not in after.tags
    assert not [a for a, _ in after.attributes if a.startswith("on")]
    assert set(after.tags) == set(before.tags)
    check_drawings(attacked)


def test_every_string_of_a_run_is_shown_and_escaped(view: RunView) -> None:
    # Equal strings get equal marks, so that stages still meet their comparisons.
    marks: dict[str, str] = {}
    marked = rewritten(view, lambda s: marks.setdefault(s, f"<m{len(marks)}>&'\""))
    shown = render(marked)
    text = Reader(shown).text
    spelt = {p.text for p in walk(view, Piece) if p.tokens}  # shown through its tokens
    for original, mark in marks.items():
        assert mark not in shown
        assert mark in text or original in spelt, original


def test_characters_that_xml_cannot_hold_are_dropped(view: RunView) -> None:
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


def test_all_numbers_of_a_run_are_on_its_page(view: RunView, page: str) -> None:
    text = Reader(page).text
    for e in walk((view.policies, view.comparisons, view.retention), Estimate):
        if e.value is not None:
            assert f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" in text
    counts = [view.totals.tokens_generated, view.totals.tokens_trained]
    counts += [n for a in view.accounts for n in (a.trained, a.discarded, a.trained + a.discarded)]
    counts += [sum(a.trained for a in view.accounts), sum(a.discarded for a in view.accounts)]
    counts += [t.tokens for s in view.stages for t in s.tokens] + [s.steps for s in view.stages]
    for n in counts:
        assert re.search(rf"(?<![\d,]){n:,}(?![\d,])", text), n
    for series in walk(view, Series):
        for _, value in (series.points[0], series.points[-1]):
            assert f"{value:.3g}" in text
    for words in ("7 min 4 s", "reward 1.00", "reward 0.00", "seed 7", "32 × 64", "3 min 32 s"):
        assert words in text


def test_each_estimate_of_pass_at_k_stands_in_the_row_of_its_policy(
    view: RunView, page: str
) -> None:
    section = page[page.index('id="passk"') : page.index('id="support"')]
    panels = section.split("<figure")[1:]
    measured = view.policies[1].tasks[3]
    rows = [r for r in panels[3].split("<tr>") if '<th scope="row">expand</th>' in r]
    assert len(rows) == 1
    cells = re.findall("<td>(.*?)</td>", rows[0])
    rates = [measured.pass_at_1, *(p.rate for p in measured.curve if p.k != 1)]
    assert cells == ["32 × 64", *(f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rates)]


def test_headline_claims_only_what_excludes_zero() -> None:
    run = bare(
        base_model="lab-base",
        policies=(
            policy("base", reverse=estimate(0.0), sums=estimate(0.9), chains=estimate(0.4)),
            policy("last", reverse=estimate(0.81, 0.07), sums=estimate(0.92), chains=estimate(0.2)),
        ),
        comparisons=(
            Comparison(
                before="base",
                after="last",
                changes=(
                    change("reverse", reachable=estimate(0.8), lost=estimate(0.04)),
                    change("sums", sharpened=estimate(0.05), kept=estimate(0.9)),
                    change("chains", lost=estimate(0.3), sharpened=estimate(0.1)),
                ),
            ),
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
    told = {c.task: c.words for c in headline(bare(policies=ends)).clauses}
    assert told == {
        "up": "improved",
        "same": "showed no clear change",
        "bare": "has no interval to judge by",
    }


def test_headline_says_undetermined_when_most_is() -> None:
    ends = (policy("a", t=estimate(0.1)), policy("b", t=estimate(0.2)))
    parts = (change(undetermined=estimate(0.7)),)
    run = bare(policies=ends, comparisons=(Comparison(before="a", after="b", changes=parts),))
    assert headline(run).clauses[0].words == "stayed undetermined"


def test_a_broken_ledger_is_shouted() -> None:
    assert "does not verify" not in render(bare(ledger=Seal(head="00ff", verified=True)))
    assert "does not verify" not in render(bare(ledger=Seal(head="00ff")))
    assert "does not verify" in render(bare(ledger=Seal(head="00ff", verified=False)))


# --- what the drawings show ------------------------------------------------------------------


def boxes(svg: str, class_: str) -> list[tuple[float, float]]:
    """(x, width) of the rectangles of a class that are not keys of a legend."""
    found = [e for e in ET.fromstring(svg).iter() if e.get("class") == class_]
    return [(float(e.get("x")), float(e.get("width"))) for e in found if e.get("rx") is None]


@pytest.mark.parametrize("narrow", [False, True])
def test_change_bars_diverge_from_zero_in_one_scale(narrow: bool) -> None:
    parts = change(
        reachable=estimate(0.4),
        sharpened=estimate(0.2),
        weakened=estimate(0.1),
        lost=estimate(0.05),
        kept=estimate(0.25),
    )
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
    parts = change(
        before=estimate(0.3),
        reachable=estimate(0.4),
        sharpened=estimate(0.1),
        weakened=estimate(0.05),
        lost=estimate(0.2),
        undetermined=Estimate(value=-0.05, low=-0.1, high=0.02),
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
    assert waterfall(change(), before="a", after="b", ident="w") is None  # nothing to start from


def test_a_treatment_is_told_round_by_round(view: RunView) -> None:
    found = FoundView(
        task="sums",
        bottleneck="choice",
        shown=False,
        words="It prefers others.",
        because=("pass@64 is 0.9",),
        first=estimate(0.25),
        reach=estimate(0.75),
        tries=64,
    )
    done = RoundView(
        number=1,
        page="diagnoses/0.html",
        found=(found,),
        stage="1-reinforce",
        start="base",
        steps=41,
        tasks=("sums",),
        title="imitate the best",
        why="success is in reach",
        decision="sums rose by 0.3",
        helped=True,
        kept=True,
        looking=1111,
        sampled=2222,
        trained=3333,
    )
    last = replace(done, number=2, stage="", title="", decision="", helped=None, kept=None)
    told = TreatmentView(rounds=(done, last), budget=9999, spent=7777, ended="nothing is left")
    shown = render(replace(view, treatment=told))
    check_drawings(shown)
    text = Reader(shown).text
    for words in ("Round 1 imitate the best ✓ kept helped", "choice?", "Because pass@64 is 0.9",
                  "41 steps from base , for sums", "sums rose by 0.3", "7,777 of 9,999 tokens",
                  "1,111 looking, 2,222 sampled for training, 3,333 trained",
                  "Round 2 Nothing was done", "It ended: nothing is left."):  # fmt: skip
        assert words.replace(" ", "") in text.replace(" ", ""), words
    assert boxes_of_strip(shown, "sums") == [100, 75, 25]
    assert 'id="treatment"' not in render(view)


def boxes_of_strip(page: str, task: str) -> list[float]:
    """Widths of the bar of a round's finding, in percent."""
    (svg,) = [s for s in SVG.findall(page) if f">{task}: 25% right at the first try" in s][:1]
    return [float(w) for w in re.findall(r'<rect[^>]* width="([^"]*)"', svg)]


def test_nothing_has_no_sign() -> None:
    assert Estimate(value=-0.001, low=-0.004, high=0.1).words == "0.00 [0.00, 0.10]"


def test_pass_at_k_is_drawn_on_a_log2_axis_with_equal_steps_per_doubling() -> None:
    curve_ = tuple(CurvePoint(k=k, rate=estimate(r)) for k, r in ((1, 0.0), (8, 0.5), (64, 1.0)))
    task = PolicyTask(
        task="t", num_prompts=4, num_samples=64, pass_at_1=estimate(0.0), curve=curve_
    )
    svg = pass_at_k("t", [PolicyView(name="p", tasks=(task,))], ident="p")
    dots = [e for e in ET.fromstring(svg).iter() if e.tag.endswith("circle")]
    xs, ys = ([float(d.get(a)) for d in dots] for a in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2])
    assert ys[0] > ys[2]


def test_first_policy_is_drawn_as_before_and_last_as_after_even_when_some_did_not_measure() -> None:
    point = (CurvePoint(k=1, rate=estimate(0.5)), CurvePoint(k=2, rate=estimate(0.6)))
    task = PolicyTask(task="t", num_prompts=4, num_samples=8, pass_at_1=estimate(0.5), curve=point)
    measured = (
        PolicyView(name="base", tasks=()),
        PolicyView(name="middle", tasks=(task,)),
        PolicyView(name="final", tasks=(task,)),
    )
    svg = pass_at_k("t", measured, ident="p")
    names = {e.text: e.get("class") for e in ET.fromstring(svg).iter() if e.tag.endswith("text")}
    assert names["final"] == "line-label after"
    assert names["middle"] == "line-label mid m0"
    assert "base" not in names


def test_support_map_has_one_cell_per_prompt_and_policy() -> None:
    i, o, u = Support.IN, Support.OUT, Support.UNDETERMINED
    labels = ((o, i), (i, i), (u, i), (o, o))
    rows = tuple(PromptSupport(prompt=f"q{n}", labels=row) for n, row in enumerate(labels))
    svg = support_map(SupportMap(task="t", policies=("a", "b"), prompts=rows), ident="s")
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
    rows = tuple(
        PromptSupport(prompt=f"q{n}", labels=(Support.IN if n < 750 else Support.OUT,))
        for n in range(1000)
    )
    svg = support_map(SupportMap(task="t", policies=("a",), prompts=rows), ident="s")
    cells = [e for e in ET.fromstring(svg).iter() if (e.get("class") or "").startswith("cell")]
    widths = [float(c.get("width")) for c in cells]
    assert len(cells) == 2
    assert widths[0] / widths[1] == pytest.approx(3.0, rel=0.01)


def test_support_labels_must_cover_the_policies() -> None:
    row = PromptSupport(prompt="q", labels=(Support.IN,))
    with pytest.raises(DataError, match="1 support labels"):
        SupportMap(task="t", policies=("a", "b"), prompts=(row,))


def test_token_bar_is_proportional_and_hatches_what_was_discarded() -> None:
    counts = [(Kind.LEARNER, "l", 300, False), (Kind.HUMAN, "h", 100, True)]
    svg = token_bar(counts, ident="b", title="t", most=800)
    assert boxes(svg, "kind learner")[0] == (0.0, 375.0 - 1.5)
    assert boxes(svg, "kind human")[0] == boxes(svg, "discarded")[0] == (375.0, 125.0 - 1.5)


def test_time_bar_is_proportional_and_says_shares() -> None:
    parts = (
        TimePart(group="sampling", name="decode", seconds=30.0),
        TimePart(group="the rest", name="idle", seconds=10.0),
    )
    svg = time_bar(parts, ident="b", title="t", most=80.0)
    assert boxes(svg, "time sampling")[0] == (0.0, 375.0 - 1.5)
    assert boxes(svg, "time the-rest")[0] == (375.0, 125.0 - 1.5)
    assert "decode: 30 s, 75%" in svg
    assert "no times" in time_bar((), ident="b", title="t")


def test_a_long_series_keeps_its_extremes_and_ends() -> None:
    points = [(i, 0.0) for i in range(10_000)]
    points[1234], points[8765] = (1234, 9.0), (8765, -7.0)
    thin = thinned(points)
    assert len(thin) <= 400
    assert {points[0], points[-1], (1234, 9.0), (8765, -7.0)} <= set(thin)
    assert thin == sorted(thin)


def test_a_series_leaves_out_values_that_are_not_numbers() -> None:
    series = Series(name="kl", points=((1, float("nan")), (2, 0.5), (3, float("inf")), (4, 0.75)))
    svg = curve(series, ident="k", stage="s")
    assert "from 0.5 at step 2 to 0.75 at step 4" in svg


# --- what is missing -------------------------------------------------------------------------

NOTHING = Estimate(value=None)
LONG = "a-very-long-name-" * 12


def blank_numbers(view: RunView) -> RunView:
    def blank(value):
        if isinstance(value, Estimate):
            return Estimate(value=value.value)
        if isinstance(value, tuple):
            return tuple(blank(v) for v in value)
        if dataclasses.is_dataclass(value):
            names = [f.name for f in dataclasses.fields(value)]
            return replace(value, **{n: blank(getattr(value, n)) for n in names})
        return value

    return blank(view)


def all_zero() -> RunView:
    zero = Estimate(value=0.0, low=0.0, high=0.0)
    flat = tuple(CurvePoint(k=k, rate=zero) for k in (1, 2, 4))
    task = PolicyTask(task="none", num_prompts=4, num_samples=4, pass_at_1=zero, curve=flat)
    parts = Change(task="none", reachable=zero, sharpened=zero, kept=zero, weakened=zero, lost=zero)
    return bare(
        policies=(PolicyView(name="a", tasks=(task,)), PolicyView(name="b", tasks=(task,))),
        comparisons=(Comparison(before="a", after="b", changes=(parts,)),),
    )


def one_prompt() -> RunView:
    task = PolicyTask(
        task="one",
        num_prompts=1,
        num_samples=1,
        pass_at_1=estimate(1.0),
        curve=(CurvePoint(k=1, rate=estimate(1.0)),),
    )
    rows = (PromptSupport(prompt="q", labels=(Support.UNDETERMINED,)),)
    return bare(
        policies=(PolicyView(name="a", tasks=(task,)),),
        support=(SupportMap(task="one", policies=("a",), prompts=rows),),
    )


VARIANTS = {
    "nothing": (lambda v: bare(), "Nothing was measured in this run"),
    "no stages": (lambda v: replace(v, stages=(), accounts=()), "This run has no stages"),
    "no rewards": (
        lambda v: replace(v, samples=tuple(replace(s, reward=None) for s in v.samples)),
        "no reward",
    ),
    "one policy": (
        lambda v: replace(v, policies=v.policies[:1], comparisons=(), support=()),
        "Only lab-base was measured:",
    ),
    "no curves": (
        lambda v: replace(v, stages=tuple(replace(s, series=()) for s in v.stages)),
        "No curve was recorded",
    ),
    "empty series": (
        lambda v: replace(
            v,
            stages=tuple(
                replace(s, series=(Series(name="nil", points=((1, float("nan")),)),))
                for s in v.stages
            ),
        ),
        "no values",
    ),
    "all zeros": (lambda v: all_zero(), "none showed no clear change (0.00 → 0.00 [0.00, 0.00])"),
    "one prompt": (lambda v: one_prompt(), "1 prompt"),
    "no intervals": (blank_numbers, "(no interval)"),
    "not a number": (
        lambda v: replace(
            v,
            comparisons=(
                Comparison(
                    before="a",
                    after="b",
                    changes=(change(lost=NOTHING, kept=Estimate(value=float("inf"))),),
                ),
            ),
            totals=replace(v.totals, wall_seconds=float("nan")),
        ),
        "kept not measured",
    ),
    "long names": (lambda v: rewritten(v, lambda s: LONG + s), LONG),
    "empty names": (lambda v: rewritten(v, lambda s: ""), "Stage by stage"),
    "outside teacher": (
        lambda v: replace(v, stages=tuple(replace(s, teachers=("hub/big",)) for s in v.stages)),
        "taught by hub/big",
    ),
    "nine stages": (
        lambda v: replace(
            v, stages=tuple(replace(v.stages[i % 4], name=f"s{i}") for i in range(9))
        ),
        "s8",
    ),
    "own teacher": (
        lambda v: replace(v, stages=tuple(replace(s, teachers=(s.name, "base")) for s in v.stages)),
        "reshape teaches reshape",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_page_with_missing_or_odd_parts_is_whole(view: RunView, name: str) -> None:
    make, words = VARIANTS[name]
    shown = render(make(view))
    check_drawings(shown)
    text = Reader(shown).text
    assert words in text
    assert not re.search(r"\b(nan|None|Undefined|inf)\b", text)
    assert Reader(shown).tags.count("section") == 11


def test_the_full_page_has_sound_drawings_and_is_the_same_twice(view: RunView, page: str) -> None:
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
    source = Path(posttrain.report.__file__).parents[2]
    code = "import posttrain.report, sys; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True
    )
    assert ran.stdout.strip() == "False"
