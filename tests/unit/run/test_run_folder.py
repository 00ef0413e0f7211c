"""A run's folder: one module knows its names, one process writes it, readers change nothing."""

import ast
from pathlib import Path

import numpy as np
import pytest
from measurements import measured, policy

import posttrain
from posttrain.core.errors import ConfigError, DataError, FileChanged, RunError, RunLocked
from posttrain.core.files import write_atomic
from posttrain.diagnosis.treat import TreatmentLog
from posttrain.run.folder import RunFolder
from posttrain.run.ledger import RecordKind
from posttrain.run.recorded import entry_at
from posttrain.run.stage_folder import StageProgress, StageRecord, StageResult

SRC = Path(posttrain.__file__).parent
ROOT = SRC.parents[1]
HOMES = (SRC / "run" / "folder.py", SRC / "run" / "stage_folder.py")
STRANGER = ROOT / "benchmarks" / "silent_failures" / "plant_environment.py"
"""Edits the files of a run as a stranger would, who knows their names alone."""
OWN = {
    *("recipe.json", "ledger.jsonl", "report.html", "treat.json"),
    *("measurements", "stages", "diagnoses"),
    *("stage.json", "metrics.jsonl", "progress.json", "done.json"),
}
"""Names that mean a place in a run folder wherever they are written."""

COMMON = {"shards", "checkpoint"}
"""Words that mean one where they are part of a path; and so does "model" after another part."""

PATHS = {"glob", "rglob", "joinpath", "with_name"}


def spelt(source: str) -> list[str]:
    """Names of a run folder that a module spells, with their lines."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()  # docstrings, and keys of plain data such as ledger rows
    below: set[ast.AST] = set()  # parts of paths
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(node.value)
        elif isinstance(node, ast.Dict):
            skipped |= set(node.keys)
        elif isinstance(node, ast.Subscript):
            skipped.add(node.slice)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            below |= set(ast.walk(node.right))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PATHS:
            below |= {leaf for argument in node.args for leaf in ast.walk(argument)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        parts = set(node.value.split("/"))
        names = parts & OWN if node not in skipped else set()
        if node in below:
            names |= parts & (COMMON | {"model"} if len(parts) > 1 else COMMON)
        found += [f"line {node.lineno}: {name}" for name in sorted(names)]
    return found


@pytest.mark.parametrize("folder", ["src", "benchmarks", "recipes"])
def test_no_other_module_spells_the_names(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path not in {*HOMES, STRANGER}:
            assert not spelt(path.read_text()), path


def test_the_checker_sees_names_where_they_are():
    assert spelt((SRC / "run" / "folder.py").read_text())
    assert spelt('out / "measurements" / f"{name}.json"')
    assert spelt('out.glob("stages/*/model")')
    assert spelt('folder.glob(f"{name}-*/model")')
    assert spelt('path = "out/ledger.jsonl"')
    assert spelt('folder / "checkpoint"')
    assert not spelt('"""A drawing with stages/ in it."""')
    assert not spelt('row = {"stages": 3, "checkpoint": digest}')


# --- reading and writing ---------------------------------------------------------------------

RECORD = StageRecord(name="sft", identity="1" * 64, init="base", inputs={"a": [1, None]})
PROGRESS = StageProgress(step=2, seconds=0.5, rows=[("shard", {"rows": 2})], after=1)


def some_measurement():
    return policy(measured(np.ones((5, 4)), "aim", lengths=np.full((5, 4), 2)))


def filled(out: Path) -> RunFolder:
    """Every kind of file, through the writer."""
    with RunFolder(out).lock() as run:
        run.ledger.append(RecordKind.RUN, {"seed": 1})
        run.write_measurement("base", some_measurement())
        run.write_treatment(TreatmentLog(ground="g", budget=3))
        for number in (10, 9):
            run.write_diagnosis(number, "{}")
        stage = run.stage_writer(RECORD.name, RECORD.identity)
        stage.write_record(RECORD)
        stage.write_metrics(b'{"step": 0}\n{"step": 1}\n')
        for step in (2, 12):
            for file in stage.shard_files(step):
                write_atomic(file, b"")
        with stage.next_checkpoint(PROGRESS, metrics=entry_at(stage.metrics_file)) as folder:
            (folder / "learner.pt").write_text("weights")
        stage.export(lambda folder: write_atomic(folder / "config.json", "{}"))
        stage.write_result(StageResult(steps=2, seconds=0.5, digest="d"))
    return RunFolder(out)


def test_what_is_written_is_read_back(tmp_path):
    run = filled(tmp_path / "out")
    assert [r.body for r in run.records() if r.kind is RecordKind.RUN] == [{"seed": 1}]
    assert run.measured() == ["base"]
    assert run.measurement("base").to_json() == some_measurement().to_json()
    assert run.treatment(TreatmentLog) == TreatmentLog(ground="g", budget=3)
    assert run.diagnoses() == [9, 10]
    (stage,) = run.stages()
    assert stage == run.stage(RECORD.name, RECORD.identity)
    progress = stage.progress()
    assert (stage.record(), progress.step, progress.rows[0]) == (RECORD, 2, PROGRESS.rows[0])
    assert stage.result() == StageResult(steps=2, seconds=0.5, digest="d")
    assert stage.metrics() == [{"step": 0}, {"step": 1}]
    pairs = list(zip(stage.trajectory_files(), stage.use_files(), strict=True))
    assert pairs == [stage.shard_files(2), stage.shard_files(12)]
    assert set(stage.shards_after(2)) == set(stage.shard_files(12))
    assert run.models("sft") == [stage.model]


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_readers_change_nothing_and_need_no_lock(tmp_path):
    run = filled(tmp_path / "out")
    before = everything(tmp_path)
    with run.lock():
        signed = everything(tmp_path)
        run.records(), run.measured(), run.measurement("base"), run.treatment(TreatmentLog)
        run.diagnoses(), run.models("sft"), run.is_run
        for stage in run.stages():
            stage.record(), stage.progress(), stage.result(), stage.metrics()
            stage.trajectory_files(), stage.use_files(), stage.shards_after(0)
        assert everything(tmp_path) == signed
    after = everything(tmp_path)
    assert {k: v for k, v in after.items() if k != "out/lock"} == {
        k: v for k, v in before.items() if k != "out/lock"
    }


def test_one_writer_at_a_time(tmp_path):
    run = RunFolder(tmp_path)
    with run.lock():
        with pytest.raises(RunLocked), run.lock():
            pass
        assert run.write_report("<p>drawn beside the writer").is_file()
    with run.lock():
        pass


def test_only_pages_are_written_without_the_lock():
    changes = [n for n in dir(RunFolder) if n.split("_")[0] in ("write", "remove", "open")]
    assert changes == ["write_diagnosis_page", "write_report"]


def test_stages_whose_names_begin_alike(tmp_path):
    with RunFolder(tmp_path).lock() as run:
        for name in ("sft", "sft-long"):
            record = StageRecord(name=name, identity="2" * 64, init="base", inputs={})
            run.stage_writer(name, record.identity).write_record(record)
    for name in ("sft", "sft-long"):
        (stage,) = run.stages(name)
        assert stage.path.name == f"{name}-22222222"
    assert len(run.stages()) == 2
    assert run.models("sft") == []


def test_what_is_not_there_or_damaged_is_named(tmp_path):
    run = RunFolder(tmp_path / "out")
    assert (run.is_run, run.measured(), run.stages(), run.diagnoses()) == (False, [], [], [])
    assert run.treatment(TreatmentLog) is None
    with pytest.raises(ConfigError, match="is not a run folder"):
        run.recipe()
    run = filled(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"(?s)no measured policy 'bas'.*base"):
        run.measurement("bas")
    for content in (b"{", b"\xff"):
        run.measurement_file("base").write_bytes(content)
        with pytest.raises(FileChanged, match=r"base\.json holds . bytes, and had"):
            run.measurement("base")
        with pytest.raises(DataError, match=r"base\.json is not a measurement"):
            run.measurement("base", checked=False)
    run.treatment_file.write_text("{")
    with pytest.raises(FileChanged, match=r"treat\.json holds 1 bytes, and had"):
        run.treatment(TreatmentLog)
    (stage,) = run.stages()
    stage.record_file.write_text("{")
    with pytest.raises(RunError, match=r"stage\.json is damaged"):
        run.stages("sft")


def test_half_written_files_are_removed_by_the_writer(tmp_path):
    run = filled(tmp_path)
    (stage,) = run.stages()
    with run.lock():
        before = set(everything(tmp_path))
        for file in (run.recipe_file, run.measurement_file("a"), run.diagnosis_file(1),
                     stage.record_file, stage.shard_files(1)[0]):  # fmt: skip
            (file.parent / f".{file.name}.0badcafe.partial").write_text("half")
        assert set(everything(tmp_path)) > before
    with run.lock():
        assert set(everything(tmp_path)) == before
