"""A run folder read back: what every stage did, where the run ended, and no torch needed for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from measurements import measured, policy

import posttrain
from posttrain.core import config
from posttrain.core.errors import LedgerBroken
from posttrain.core.proofs import Proof, Subject
from posttrain.core.provenance import Kind, Producer, Regime, Role, Span
from posttrain.core.trajectory import Trajectory
from posttrain.lab.tour import BASE
from posttrain.measure.attribution import MeasuredRole
from posttrain.recipe import Recipe
from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder
from posttrain.run.history import RunHistory, read_history
from posttrain.run.ledger import Ledger, RecordKind
from posttrain.run.records import Records
from posttrain.run.store import Use, UseRole, write_trajectories, write_uses

RATES = {"base": 0.0, "learn": 0.9, "spoil": 0.3}
GATES = [
    {"task": "aim", "at_least": 0.1, "otherwise": "warn"},
    {"task": "aim", "at_least": 0.5, "otherwise": "roll_back"},
]
MIX = {
    "name": "chord",
    "tasks": ["aim"],
    "max_new_tokens": 4,
    "data": {"path": "demos.jsonl", "name": "demos"},
}


def stage(name: str, method: dict, **options) -> dict:
    return {"name": name, "method": method, "budget": {"steps": 2}, **options}


@pytest.fixture
def out(tmp_path) -> Path:
    """Two stages on one task set; the second lost most of it and was rolled back."""
    folder = tmp_path / "out"
    sft = {"name": "sft", "data": {"path": "demos.jsonl", "name": "demos"}}
    grpo = {"name": "grpo", "tasks": ["aim"], "max_new_tokens": 4}
    tasks = {"aim": {"type": "jsonl", "path": "t.jsonl", "reward": "r.py:score", "held_out": 20}}
    plain = {
        "name": "made",
        "model": "base-model",
        "tasks": tasks,
        "measure": {"samples": 64},
        "stages": [stage("learn", sft), stage("spoil", grpo, gates=GATES)],
    }
    recipe = config.convert(plain, Recipe, origin="test")
    (folder / "measurements").mkdir(parents=True)
    (folder / "recipe.json").write_bytes(msgspec.json.encode(recipe))
    for i, (name, rate) in enumerate(RATES.items()):
        scores = np.random.default_rng(i).random((20, 64)) < rate
        (folder / f"measurements/{name}.json").write_text(
            policy(measured(scores, "aim"), name=name).to_json()
        )
    ledger = Ledger.open(folder / "ledger.jsonl")
    ledger.append(RecordKind.RUN, {"libraries": {"posttrain": "0.1.0"}})
    for gate, passed in zip(recipe.stages[1].gates, (True, False), strict=True):
        for words in ("decided once", f"passed: {passed}"):  # the last one counts
            body = {"stage": "spoil", "gate": config.plain(gate), "passed": passed, "words": words}
            ledger.append(RecordKind.GATE, body)
    for name, init in (("learn", "base"), ("spoil", "learn")):
        write_stage(folder / "stages" / f"{name}-{'0' * 8}", name, init)
    return entered(folder)


def entered(out: Path) -> Path:
    """The folder, with every file as it is now in its ledger."""
    with RunFolder(out).lock() as run:
        run.accept_files(audit(run))
    return out


def write_stage(folder: Path, name: str, init: str) -> None:
    """What a finished stage leaves: two steps, one answer that was trained on, and a tokenizer."""
    (folder / "shards").mkdir(parents=True)
    about = {"name": name, "init": init, "inputs": {}, "identity": "0" * 64}
    (folder / "stage.json").write_text(json.dumps(about))
    rows = [{"step": i, "loss": 1.0 - i, "seconds/forward": 1.5, "tokens": 7} for i in range(2)]
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2, "lo']))  # cut off
    (folder / "done.json").write_text(json.dumps({"steps": 2, "seconds": 4.5, "digest": "d"}))
    (folder / "model").mkdir()
    shutil.copy(BASE / "tokenizer.json", folder / "model")
    author = Producer(kind=Kind.LEARNER, name="made/run")
    asked = Span(length=1, role=Role.USER, producer=Producer(kind=Kind.ENVIRONMENT, name="aim"))
    answer = Span(length=2, role=Role.ASSISTANT, producer=author, versions=(0, 0),
                  logprobs=np.array([-0.1, -2.0], np.float32))  # fmt: skip
    tokens = np.array([5, 6, 7], np.int32)
    trajectory = Trajectory(task="aim/1", tokens=tokens, prompt_length=1, spans=(asked, answer))
    write_trajectories(folder / "shards/000002.trajectories.parquet", [trajectory])
    used = Use(trajectory=trajectory.id, task="aim/1", kind=author.kind, producer=author.name,
               stage=name, step=0, role=UseRole.TRAIN, reward=1.0, prompt_tokens=1,
               completion_tokens=2, first_version=0, last_version=0)  # fmt: skip
    write_uses(folder / "shards/000002.uses.parquet", [used])


def test_a_stage_says_what_it_was_and_what_it_took(out):
    run = read_history(out)
    learn, spoil = (run.record(s) for s in run.stages)
    assert (learn.name, learn.method, learn.source) == ("learn", "sft", "demos (external)")
    assert (learn.regime, spoil.regime) == (Regime.OFF, Regime.ON)
    assert len(learn.metrics) == 2, "a line that a kill cut off is none"
    assert (learn.seconds, learn.seconds_by_work) == (4.5, {"forward": 3.0})
    assert [(t.kind, t.completion_tokens, t.role) for t in learn.tokens] == [
        (Kind.LEARNER, 2, UseRole.TRAIN)
    ]
    (out / "stages/learn-00000000/done.json").unlink()
    assert run.record(run.stages[0]).seconds == 3.0, "so far: what its steps took"


def test_the_last_decision_of_each_gate_counts(out):
    run = read_history(out)
    assert not run.record(run.stages[0]).gates
    kept, missed = run.record(run.stages[1]).gates
    assert (kept.passed, kept.gate.otherwise, kept.words) == (True, "warn", "passed: True")
    assert (missed.passed, missed.gate.otherwise) == (False, "roll_back")


def test_a_stage_that_was_rolled_back_is_not_what_the_run_came_to(out):
    run = read_history(out)
    assert run.final == "learn"
    assert [(c.before, c.after) for c in run.changes] == [("base", "learn"), ("learn", "spoil")]
    whole = run.whole()
    assert (whole.before, whole.after) == ("base", "learn")
    assert run.roles(run.stages[0]) == (("aim", MeasuredRole.EXPANSION),)
    assert run.roles(run.stages[1]) == (("aim", MeasuredRole.ATTRITION),)
    assert run.retained() == (), "one stage is left: nothing came after it"


def test_without_the_gate_the_loss_is_kept_account_of(out):
    run = read_history(out)
    bare = RunHistory(run.folder, run.recipe, run.measurements, run.stages, records=())
    assert bare.final == "spoil"
    (kept,) = bare.retained()
    assert kept.learned == "learn"
    assert kept.backward.high < -0.4


def test_nothing_measured_is_nothing_claimed(out):
    for file in (out / "measurements").iterdir():
        file.unlink()
    run = read_history(entered(out))
    assert (run.final, run.changes, run.whole(), run.retained()) == ("base", (), None, ())
    assert run.roles(run.stages[0]) == ()


def test_a_stage_on_a_mix_is_called_mixed(out):
    plain = json.loads((out / "recipe.json").read_bytes())
    plain["stages"][0]["method"] = MIX
    recipe = config.convert(plain, Recipe, origin="test")
    (out / "recipe.json").write_bytes(msgspec.json.encode(recipe))
    run = read_history(entered(out))
    assert run.record(run.stages[0]).regime is Regime.MIXED


def test_a_broken_ledger_is_not_read(out):
    ledger = out / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("decided once", "decided twice"))
    with pytest.raises(LedgerBroken):
        read_history(out)


def test_reading_a_run_and_rendering_its_report_loads_no_torch(out):
    """With texts of tokens, and with what a treatment has to say."""
    (out / "treat.json").write_text(json.dumps({"ground": "g", "budget": 9}))
    for file in out.glob("stages/*/metrics.jsonl"):  # spent tokens are counted off whole lines
        file.write_text(file.read_text().rpartition("\n")[0])
    entered(out)
    code = (
        "import sys; from pathlib import Path; "
        "from posttrain.cli.pages import write_run_report; "
        f"write_run_report(Path({str(out)!r})); "
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(posttrain.__file__).parents[1],
        check=True,
    )
    loaded = set(ran.stdout.split())
    assert "pyarrow" in loaded
    assert not loaded & {"torch", "transformers", "peft", "ray", "vllm"}
    page = (out / "report.html").read_text()
    assert 'id="treatment"' in page
    assert "log-prob -2.00" in page


def test_every_proof_of_one_name_is_kept_and_told_once(tmp_path):
    """An export of adapters has two. A process that dies in between makes both again."""
    recipe = config.convert({"name": "made", "model": "base-model"}, Recipe, origin="test")
    whole, adapter = (
        Proof(subject=Subject.EXPORT, of="learn", words=words, figures={"seconds": i})
        for i, words in enumerate(("all of it", "the adapter"))
    )
    for _ in range(2):
        with RunFolder(tmp_path).lock() as run:
            records = Records(run.ledger, recipe)
            for proof in (whole, adapter):
                records.proof(proof)
            run.write_recipe(recipe)
    found = [p for p in read_history(tmp_path).proofs if p.subject is Subject.EXPORT]
    assert [p.words for p in found] == ["all of it", "the adapter"]
    kinds = [r.kind for r in read_history(tmp_path).records]
    assert kinds.count(RecordKind.PROOF) == 2
    assert kinds.count(RecordKind.RUN) == 1, "nothing new, no row"
