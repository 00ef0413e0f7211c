"""What a crash between any two writes of a commit leaves behind, and what resuming makes of it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from posttrain.core.errors import RunError
from posttrain.parts.legality import Admission
from posttrain.run.journal import Journal
from posttrain.run.ledger import Ledger, read, verify
from posttrain.run.stage_folder import StageFolder, StageRecord, StageWriter
from posttrain.run.store import read_uses
from posttrain.testing import as_group, example_trajectory


@dataclass
class FakeLearner:
    """Its weights are one number."""

    weight: int = 0

    def save(self, folder: Path) -> None:
        (folder / "learner.pt").write_text(str(self.weight))

    def load(self, folder: Path) -> None:
        self.weight = int((folder / "learner.pt").read_text())


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def die_before(ledger: Ledger, left: int) -> Ledger:
    """The ledger of a process that dies before its n-th append from now."""
    append = ledger.append

    def counted(kind, body):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return append(kind, body)

    ledger.append = counted
    return ledger


def journal(out, *, cut=None, ledger=None):
    real = ledger or Ledger.open(out / "ledger.jsonl")
    return Journal(
        StageWriter(out / "stages" / "s-1", real if cut is None else die_before(real, cut)),
        stage="s",
        identity="1" * 64,
        facts={"objective": ({"type": "cross_entropy"},), "policy_in": "base"},
    )


def writer_of(out):
    return StageWriter(out / "stages" / "s-1", Ledger.open(out / "ledger.jsonl"))


def take(book, learner, steps):
    """Each step trains on one trajectory of its own."""
    for step in steps:
        learner.weight += 1
        group = as_group(example_trajectory(prompt=(1, 2, step + 3)))
        book.record(step, Admission(kept=(group,), stale=()), {"loss": step / 8})


def kinds(out):
    return [(str(r.kind), r.body.get("steps")) for r in read(out / "ledger.jsonl")]


FIRST = [("shard", None), ("update", [0, 2]), ("saved", None)]
WHOLE = [*FIRST, ("shard", None), ("update", [2, 4]), ("saved", None)]


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_rows_cut_off_are_appended_once(tmp_path, cut):
    learner = FakeLearner()
    book = journal(tmp_path)
    assert book.resume(learner) == 0
    take(book, learner, range(2))
    book.commit(2, learner)
    book = journal(tmp_path, cut=cut)
    assert book.resume(learner) == 2
    take(book, learner, range(2, 4))
    with pytest.raises(Killed):
        book.commit(4, learner)
    assert kinds(tmp_path) == WHOLE[: 3 + cut]

    for _ in range(3):
        again = FakeLearner()
        assert journal(tmp_path).resume(again) == 4
        assert again.weight == 4
        assert kinds(tmp_path) == WHOLE
    verify(tmp_path / "ledger.jsonl")


def test_a_stage_started_again_records_its_work_again(tmp_path):
    """Equal rows of an earlier life of the folder are no reason to leave out those of this one."""
    for _ in range(2):
        shutil.rmtree(tmp_path / "stages", ignore_errors=True)
        learner = FakeLearner()
        book = journal(tmp_path)
        book.resume(learner)
        take(book, learner, range(2))
        book.commit(2, learner)
    assert kinds(tmp_path) == FIRST * 2
    # And the same, with the rows of the second life cut off.
    shutil.rmtree(tmp_path / "stages")
    learner = FakeLearner()
    book = journal(tmp_path, cut=0)
    book.resume(learner)
    take(book, learner, range(2))
    with pytest.raises(Killed):
        book.commit(2, learner)
    assert journal(tmp_path).resume(learner) == 2
    assert kinds(tmp_path) == FIRST * 3


def test_steps_after_the_checkpoint_are_forgotten(tmp_path):
    learner = FakeLearner()
    book = journal(tmp_path)
    book.resume(learner)
    take(book, learner, range(2))
    book.commit(2, learner)
    take(book, learner, range(2, 5))
    metrics = tmp_path / "stages" / "s-1" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    again = FakeLearner()
    book = journal(tmp_path)
    assert book.resume(again) == 2
    assert [json.loads(x) for x in metrics.read_text().splitlines()] == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 0.125},
    ]
    take(book, again, range(2, 4))
    book.commit(4, again)
    assert kinds(tmp_path) == WHOLE


def test_shards_without_a_checkpoint_do_not_count(tmp_path, monkeypatch):
    """A commit at step 3 dies before its checkpoint; the next process commits at 2 and 4."""
    learner = FakeLearner()
    book = journal(tmp_path)
    book.resume(learner)
    take(book, learner, range(3))

    def die(folder):
        raise Killed

    monkeypatch.setattr(learner, "save", die)
    with pytest.raises(Killed):
        book.commit(3, learner)
    shards = tmp_path / "stages" / "s-1" / "shards"
    assert [p.name for p in shards.glob("*.uses.*")] == ["000003.uses.parquet"]

    learner = FakeLearner()
    book = journal(tmp_path)
    assert book.resume(learner) == 0
    for start in (0, 2):
        take(book, learner, range(start, start + 2))
        book.commit(start + 2, learner)
    files = sorted(shards.glob("*.uses.parquet"))
    assert [p.name for p in files] == ["000002.uses.parquet", "000004.uses.parquet"]
    assert [u.step for p in files for u in read_uses(p)] == [0, 1, 2, 3]
    assert kinds(tmp_path) == WHOLE


def test_a_commit_between_its_two_renames(tmp_path):
    """Both versions lie beside the checkpoint's place: the new one is whole, and is taken."""
    learner = FakeLearner()
    book = journal(tmp_path)
    book.resume(learner)
    folder = tmp_path / "stages" / "s-1"
    take(book, learner, range(2))
    book.commit(2, learner)
    shutil.copytree(folder / "checkpoint", tmp_path / "first")
    take(book, learner, range(2, 4))
    book.commit(4, learner)
    (folder / "checkpoint").rename(folder / ".checkpoint.partial")
    (tmp_path / "first").rename(folder / ".checkpoint.old")
    assert writer_of(tmp_path).has_started()
    assert journal(tmp_path).resume(learner) == 4
    assert kinds(tmp_path) == WHOLE


def test_what_counts_as_started(tmp_path):
    folder = tmp_path / "stages" / "s-1"
    learner = FakeLearner()
    book = journal(tmp_path)
    book.resume(learner)
    take(book, learner, range(1))
    assert not writer_of(tmp_path).has_started(), "metrics alone are no work that is kept"
    book.commit(1, learner)
    assert writer_of(tmp_path).has_started()
    (folder / "checkpoint").rename(folder / "model")
    assert writer_of(tmp_path).has_started(), "a finished stage whose checkpoint was cleaned away"


@pytest.mark.parametrize(
    ("name", "reader", "fix"),
    [
        ("checkpoint/progress.json", StageFolder.progress, "run --restart STAGE"),
        ("stage.json", StageFolder.record, "run --restart STAGE"),
        ("done.json", StageFolder.result, "run --restart STAGE"),
    ],
)
def test_damaged_files_say_what_to_do(tmp_path, name, reader, fix):
    assert reader(StageFolder(tmp_path)) is None
    (tmp_path / "model").mkdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"half')
    with pytest.raises(RunError, match=f"(?s){name}.*is damaged.*{fix}"):
        reader(StageFolder(tmp_path))


def test_a_finished_stage_without_its_model(tmp_path):
    (tmp_path / "done.json").write_text('{"steps": 1, "seconds": 0.0, "digest": "x"}')
    with pytest.raises(RunError, match="its model folder is gone"):
        StageFolder(tmp_path).result()
    (tmp_path / "model").mkdir()
    assert StageFolder(tmp_path).result().steps == 1


def test_a_stage_record_is_read_as_it_was_written(tmp_path):
    record = StageRecord(name="s", identity="1", init="base", inputs={"a": 1})
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    StageWriter(tmp_path, ledger).write_record(record)
    assert json.loads((tmp_path / "stage.json").read_text()) == {
        "name": "s",
        "identity": "1",
        "init": "base",
        "inputs": {"a": 1},
    }
    assert StageFolder(tmp_path).record() == record
