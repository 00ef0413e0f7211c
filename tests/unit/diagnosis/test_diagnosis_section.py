"""A treatment as a section of its run's report, round by round."""

import json
import re
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest
from measurements import measured, policy

from posttrain.core import config
from posttrain.core.errors import DataError
from posttrain.diagnosis.card import (
    Bottleneck,
    Choice,
    Cost,
    Diagnosis,
    Evidence,
    Finding,
    Prescription,
    TaskDiagnosis,
)
from posttrain.diagnosis.rounds import Round, TreatmentLog
from posttrain.diagnosis.section import looks, treatment_section
from posttrain.measure.reading import Reading
from posttrain.recipe import Stage
from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder
from posttrain.run.stage_folder import StageRecord

EVIL = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """The text of a section, every element closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open = "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"


def card(tokens: int, *, headline: str = "It prefers others.") -> str:
    readings = tuple(
        Reading(f"pass@{k}", "aim", v, v, v, 20, 64, "made up") for k, v in ((1, 0.2), (64, 0.8))
    )
    task = TaskDiagnosis(
        task="aim",
        bottleneck=Bottleneck.CHOICE,
        headline=headline,
        evidence=Evidence(task="aim", readings=readings),
        findings=(
            Finding(
                rule="not-chosen",
                bottleneck=Bottleneck.CHOICE,
                words="It could, and does not.",
                because=("efficiency_gap is 0.60", "pass@64 is 0.80"),
                decided_by=(),
                overturned_by="more samples",
                citation="2504.13837",
            ),
        ),
    )
    todo = Prescription(
        tasks=("aim",),
        bottleneck=Bottleneck.CHOICE,
        treatment="reinforce",
        title="imitate the best",
        choices=(Choice(what="provenance", setting="raft", why="success is in reach"),),
    )
    cost = Cost(rollouts=1, sampled_tokens=tokens, scored_tokens=0, seconds=0)
    return Diagnosis(
        model="m",
        digest="d",
        rules="r",
        seed=0,
        confidence=0.95,
        tasks=(task,),
        cost=cost,
        prescriptions=(todo,),
    ).to_json()


@pytest.fixture
def out(tmp_path):
    """One stage that was kept, and a last look after which nothing was done."""
    stage = config.convert(
        {"name": "1-x", "method": {"name": "raft", "tasks": ["aim"]}, "budget": {"steps": 40}},
        Stage,
        origin="test",
    )
    done = Round(
        number=1,
        treatment="reinforce",
        tasks=("aim",),
        bottleneck=Bottleneck.CHOICE,
        stage=msgspec.structs.replace(stage, init="base"),
        kept=True,
        helped=True,
        words="it rose",
    )
    write_chart(tmp_path, rounds=(done,), ended="nothing is left to treat")
    for folder in ("diagnoses", "measurements", "stages/1-x-abc"):
        (tmp_path / folder).mkdir(parents=True)
    for number, tokens in enumerate((100, 30)):
        (tmp_path / f"diagnoses/{number}.json").write_text(card(tokens))
    flat = policy(measured(np.ones((5, 4)), "aim", lengths=np.full((5, 4), 2)))
    for name in ("base", "1-x"):
        (tmp_path / f"measurements/{name}.json").write_text(flat.to_json())
    record = StageRecord(name="1-x", identity="abc", init="base", inputs={})
    (tmp_path / "stages/1-x-abc/stage.json").write_bytes(msgspec.json.encode(record))
    lines = [json.dumps({"step": i, "tokens": 7}) for i in range(3)]
    (tmp_path / "stages/1-x-abc/metrics.jsonl").write_text("\n".join(lines))
    return entered(tmp_path)


def entered(out):
    """The folder, with every file as it is now in its ledger."""
    with RunFolder(out).lock() as run:
        run.accept_files(audit(run))
    return out


def write_chart(folder, **parts) -> None:
    chart = TreatmentLog(ground="g", budget=900, **parts)
    (folder / "treat.json").write_bytes(msgspec.json.encode(chart))


def rounds_of(folder) -> tuple[Round, ...]:
    return msgspec.json.decode((folder / "treat.json").read_bytes(), type=TreatmentLog).rounds


def test_every_look_has_its_round_its_reason_and_its_cost(out):
    first, last = looks(RunFolder(out))
    assert (first.title, first.why, first.round.stage.init) == (
        "imitate the best",
        "success is in reach",
        "base",
    )
    cost = first.cost
    assert (cost.looking, cost.sampled, cost.trained) == (100 + 40, 0, 21)  # 20 answers of 2
    assert (last.round, last.title, last.why) == (None, "", "")
    assert (last.cost.looking, last.cost.trained) == (30, 0)


def test_a_treatment_is_reported_round_by_round(out):
    section = treatment_section(RunFolder(out))
    assert (section.ident, section.title) == ("treatment", "Treatment")
    assert section.html.startswith('<section id="treatment">')
    text = Reader(section.html).text
    spent = 100 + 30 + 2 * 40 + 21
    for words in ("Round 1 imitate the best ✓ kept helped", "choice",
                  "Because success within all tries minus pass@1 is 0.60; pass@64 is 0.80.",
                  "40 steps from base , for aim", "Why so: success is in reach", "it rose",
                  f"{spent} of 900 tokens",
                  "140 looking, 0 sampled for training, 21 trained",
                  "Round 2 Nothing was done", "It ended: nothing is left to treat."):  # fmt: skip
        assert words.replace(" ", "") in text.replace(" ", ""), words
    strip, _ = re.findall(r"<svg xmlns.*?</svg>", section.html, re.DOTALL)
    assert [float(w) for w in re.findall(r'<rect[^>]* width="([^"]*)"', strip)] == [100, 80, 20]


def test_a_round_that_is_not_judged_yet_claims_nothing(out):
    (done,) = rounds_of(out)
    open_ = msgspec.structs.replace(done, kept=None, helped=None, words="")
    write_chart(out, rounds=(open_,))
    text = Reader(treatment_section(RunFolder(entered(out))).html).text
    assert "not judged yet" in text
    assert "helped" not in text
    assert "It has not ended" in text


def test_no_text_of_a_treatment_becomes_markup(out):
    (done,) = rounds_of(out)
    evil = msgspec.structs.replace(done, treatment=EVIL, words=EVIL, tasks=(EVIL,))
    write_chart(out, rounds=(evil,), ended=EVIL)
    (out / "diagnoses/1.json").write_text(card(30, headline=EVIL))
    html = treatment_section(RunFolder(entered(out))).html
    assert EVIL not in html
    assert html.count("&lt;script&gt;") == 5  # title, tasks, decision, headline, end


def test_a_run_without_a_treatment_has_no_such_section(tmp_path):
    assert treatment_section(RunFolder(tmp_path)) is None
    assert looks(RunFolder(tmp_path)) == ()
    (tmp_path / "treat.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        treatment_section(RunFolder(entered(tmp_path)))
