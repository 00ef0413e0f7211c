"""The page of a diagnosis: everything is on it, nothing is loaded, and nothing is believed."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from posttrain.cli.pages import write_cards
from posttrain.diagnosis.card import (
    Bottleneck,
    Choice,
    Cost,
    Diagnosis,
    Evidence,
    Finding,
    OpenRule,
    Prescription,
    TaskDiagnosis,
)
from posttrain.diagnosis.page import number, reach_bar, render_card, start_curve
from posttrain.measure.reading import Reading
from posttrain.run.folder import RunFolder

EVIL = "<script>alert(1)</script>"


def reading(name, value, *, low=None, high=None, task="sums"):
    low = value if low is None else low
    high = value if high is None else high
    return Reading(name, task, value, low, high, 32, 64, f"{name} in words")


def evidence(*readings, task="sums"):
    return Evidence(task=task, readings=readings, missing=("no teacher was given",))


def task(bottleneck=Bottleneck.CHOICE, **changes):
    seen = evidence(
        reading("pass@1", 0.1, low=0.05, high=0.2),
        reading("pass@64", 0.9, low=0.8, high=0.97),
        reading("continue@0.5", 0.7, low=0.6, high=0.8),
    )
    finding = Finding(
        rule="not-chosen",
        bottleneck=bottleneck,
        words="It could, and does not.",
        because=("pass@64 is 0.90",),
        decided_by=seen.readings[:1],
        overturned_by="pass@64 close to pass@1",
        citation="2504.13837",
    )
    options = {
        "task": "sums",
        "bottleneck": bottleneck,
        "headline": "In reach, not chosen.",
        "evidence": seen,
        "findings": (finding,),
    }
    return TaskDiagnosis(**{**options, **changes})


def diagnosis(*tasks, **changes):
    remedy = Prescription(
        tasks=("sums",),
        bottleneck=Bottleneck.CHOICE,
        treatment="practise",
        title="practise on its own answers",
        choices=(Choice(what="group size", setting="16", why="half the groups differ"),),
        recipe="name: next\n",
        gate="pass@1 on sums: at least 0.05 gained",
    )
    options = {
        "model": "models/small",
        "digest": "00ff" * 16,
        "rules": "r",
        "seed": 7,
        "confidence": 0.95,
        "tasks": tasks or (task(),),
        "cost": Cost(rollouts=4096, sampled_tokens=9000, scored_tokens=0, seconds=12),
        "prescriptions": (remedy,),
        "notes": ("the verifier is steady",),
    }
    return Diagnosis(**{**options, **changes})


class Strict(HTMLParser):
    """Checks that every element is closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_that_was_found_is_on_the_page():
    page = render_card(diagnosis())
    for words in (
        "What holds small back",
        "In reach, not chosen.",
        "pass@64 is 0.90",
        "pass@64 close to pass@1",
        "2504.13837",
        "group size",
        "half the groups differ",
        "at least 0.05 gained",
        "name: next",
        "continue@0.5 in words",
        "no teacher was given",
        "the verifier is steady",
        "4,096",
    ):
        assert words in page, words
    parser = Strict()
    parser.feed(page)
    assert not parser.open


@pytest.mark.parametrize("bottleneck", Bottleneck)
def test_every_bottleneck_says_what_it_means(bottleneck):
    page = render_card(diagnosis(task(bottleneck)))
    assert bottleneck.meaning.replace("'", "&#39;") in page
    assert f'bottleneck {bottleneck}"' in page


def test_what_is_open_names_what_would_decide():
    rule = OpenRule(
        rule="not-chosen",
        bottleneck=Bottleneck.CHOICE,
        because=("pass@64 is 0.5 [0.4, 0.6]",),
        decide="pass@64 on 40 more prompts",
        more=2.0,
        likely=True,
    )
    page = render_card(
        diagnosis(
            task(Bottleneck.UNDETERMINED, findings=(), open=(rule,), leaning=Bottleneck.CHOICE)
        )
    )
    assert "likeliest: choice" in page
    assert f"not decided. Likeliest: {Bottleneck.CHOICE.meaning}" in page
    assert "choice?</span>" in page, "the picture does not claim it either"
    assert "pass@64 on 40 more prompts" in page


def test_no_text_becomes_markup_and_nothing_is_loaded():
    evil = task(task=EVIL, headline=EVIL, evidence=evidence(reading("pass@1", 0.5, task=EVIL)))
    page = render_card(diagnosis(evil, model=f"models/{EVIL}", notes=(EVIL,)))
    assert EVIL not in page
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!#)', page)


def test_the_bar_shows_both_borders_and_their_intervals():
    drawing = str(reach_bar(task().evidence, ident="b"))
    assert "10% right at the first try" in drawing
    assert "90% right within 64 tries" in drawing
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="30"', drawing)]
    assert widths == [640, 576, 64]
    assert drawing.count("whisker") == 2
    assert "M32.0" in drawing, "the low end of pass@1"


def test_a_drawing_needs_its_readings():
    assert reach_bar(evidence(), ident="b") is None
    assert start_curve(evidence(reading("pass@1", 0.5)), ident="c") is None


def test_nothing_to_treat():
    page = render_card(diagnosis(task(Bottleneck.SATURATION), prescriptions=()))
    assert "Nothing to treat" in page


def test_the_order_of_remedies():
    found = diagnosis()
    waits = replace(found.prescriptions[0], title="later", recipe="name: later\n")
    lacks = replace(found.prescriptions[0], title="first find data", recipe=None, obtain="demos")
    page = render_card(replace(found, prescriptions=(lacks, found.prescriptions[0], waits)))
    assert "Not yet: first find data" in page
    assert "Needed first: demos" in page
    assert "Next: practise on its own answers" in page
    assert "Later: diagnose again before: later" in page


def test_the_picture_comes_first_and_has_a_bar_for_every_task_set():
    page = render_card(diagnosis(task(), task(task="chains")))
    top, _, _ = page.partition('class="lede"')
    widths = re.findall(r'width="([\d.]+)" height="1"', top)
    assert [float(w) for w in widths] == [100, 90, 10] * 2
    assert "sums: 10% right at the first try, 90% within 64 tries" in top


def test_reasons_do_not_use_names_of_readings():
    finding = replace(task().findings[0], because=("efficiency_gap is 0.80, at least 0.15",))
    page = render_card(diagnosis(task(findings=(finding,))))
    assert "success within all tries minus pass@1 is 0.80, at least 0.15" in page


def test_numbers_that_are_not_finite():
    assert [number(x) for x in (float("inf"), float("-inf"), -0.5)] == ["∞", "−∞", "-0.500"]


def test_a_treatment_has_a_page_for_every_diagnosis(tmp_path):
    with RunFolder(tmp_path).lock() as folder:
        for seed in (0, 2, 10):
            folder.write_diagnosis(seed, diagnosis(seed=seed).to_json())
    written = write_cards(tmp_path)
    assert [p.name for p in written] == ["0.html", "2.html", "10.html"]
    assert written[2].read_text() == render_card(diagnosis(seed=10))
