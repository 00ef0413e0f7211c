"""A treatment's folder shown round by round, and what later stages left of what was gained."""

import json

import msgspec
import numpy as np
from test_probes_measurement import measured, policy

from posttrain.cli.tables import retention_table
from posttrain.core import config
from posttrain.diagnosis.card import (
    Bottleneck,
    Choice,
    Cost,
    Diagnosis,
    Evidence,
    Prescription,
    TaskDiagnosis,
)
from posttrain.diagnosis.treat import Chart, Round
from posttrain.measure.attribution import attribute_changes
from posttrain.measure.reading import Reading
from posttrain.measure.spec import Measure
from posttrain.recipe import Stage
from posttrain.report.retained import own_stages, retained
from posttrain.report.rounds import treatment
from posttrain.run.folder import RunFolder, StageRecord, StageWriter

SPEC = Measure(samples=64)


def card(tokens: int) -> str:
    readings = tuple(
        Reading(f"pass@{k}", "aim", v, v, v, 20, 64, "made up") for k, v in ((1, 0.2), (64, 0.8))
    )
    task = TaskDiagnosis(
        task="aim",
        bottleneck=Bottleneck.CHOICE,
        headline="It prefers others.",
        evidence=Evidence(task="aim", readings=readings),
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


def test_the_rounds_of_a_treatment(tmp_path):
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
    chart = Chart(ground="g", budget=900, rounds=(done,), ended="nothing is left to treat")
    assert treatment(RunFolder(tmp_path)) is None
    (tmp_path / "treat.json").write_bytes(msgspec.json.encode(chart))
    for folder in ("diagnoses", "measurements", "stages/1-x-abc"):
        (tmp_path / folder).mkdir(parents=True)
    for number, tokens in enumerate((100, 30)):
        (tmp_path / f"diagnoses/{number}.json").write_text(card(tokens))
    flat = policy(measured(np.ones((5, 4)), "aim", lengths=np.full((5, 4), 2)))
    for name in ("base", "1-x"):
        (tmp_path / f"measurements/{name}.json").write_text(flat.to_json())
    lines = [json.dumps({"step": i, "tokens": 7}) for i in range(3)]
    (tmp_path / "stages/1-x-abc/metrics.jsonl").write_text("\n".join(lines))

    stage_record = StageRecord(name="1-x", identity="abc", init="base", inputs={})
    StageWriter(tmp_path / "stages/1-x-abc").write_record(stage_record)

    view = treatment(RunFolder(tmp_path))
    assert view is not None
    first, last = view.rounds
    assert (first.title, first.why, first.start) == (
        "imitate the best",
        "success is in reach",
        "base",
    )
    assert (first.looking, first.sampled, first.trained) == (100 + 40, 0, 21)  # 20 answers of 2
    assert (first.steps, first.decision, first.kept, first.helped) == (40, "it rose", True, True)
    assert (last.stage, last.looking, last.trained, last.kept) == ("", 30, 0, None)
    assert view.spent == 100 + 30 + 2 * 40 + 21
    (found,) = first.found
    assert (found.first.value, found.reach.value, found.tries) == (0.2, 0.8, 64)


def stages(**rates: tuple[float, ...]):
    """Twenty prompts a task set, each solved at the given rate by each policy of a chain."""
    return [
        policy(
            *(
                measured(np.random.default_rng([i, j]).random((20, 64)) < row[i], task)
                for j, (task, row) in enumerate(rates.items())
            ),
            name=f"p{i}",
        )
        for i in range(3)
    ]


def test_bringing_back_what_the_base_could_do_is_no_gain():
    chain = stages(restored=(0.9, 0.2, 0.9))
    changes = [
        attribute_changes(a, b, epsilon=SPEC.threshold)
        for a, b in ((chain[0], chain[1]), chain[1:])
    ]
    assert own_stages(chain, changes) == {"restored": 0}


def test_what_later_stages_left():
    chain = stages(learned=(0.0, 0.9, 0.5), known=(0.9, 0.9, 0.9), late=(0.0, 0.0, 0.8))
    changes = [
        attribute_changes(a, b, epsilon=SPEC.threshold)
        for a, b in ((chain[0], chain[1]), chain[1:])
    ]
    assert own_stages(chain, changes) == {"learned": 1, "known": 0, "late": 2}
    learned, known, late = retained(chain, changes, spec=SPEC)
    assert learned.backward.high < -0.3
    assert learned.forgetting.low > 0.3
    assert learned.handoff.value == 1  # weaker, and still in reach everywhere
    assert known.backward.low < 0 < known.backward.high
    assert known.handoff.value is None
    assert (late.forward.value, late.backward.value) == (0, None)  # nothing came after it
    assert not retained(chain[:2], changes[:1], spec=SPEC)
    assert "p1" in retention_table((learned,))
