"""The folder of one stage: its files, who may write them, and how they are read.

    <name>-<id>/
      stage.json                  the stage's identity, and what it is the hash of
      metrics.jsonl               one line per step, cut back to the checkpoint on resume
      shards/000025.*.parquet     trajectories and their uses since the previous checkpoint
      checkpoint/                 learner.pt, progress.json, state of parts: the commit point
      model/                      the export, written once, after the last step
      done.json                   the stage is finished

Every file has its row in the ledger (recorded.py). The rows of a commit follow its files, since a
checkpoint must not be announced before it is whole; until they are appended, ``progress.json``
holds them, sealed by a digest of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from posttrain.core import config
from posttrain.core.errors import RunError
from posttrain.core.files import atomic_folder, recover_folder, write_atomic
from posttrain.run.ledger import GENESIS, Ledger, Record, RecordKind
from posttrain.run.recorded import (
    FileEntry,
    RecordedFiles,
    announce,
    entry_at,
    entry_of,
    files_below,
    plain_files,
    write_recorded,
)

STAGE, METRICS, RESULT, PROGRESS = "stage.json", "metrics.jsonl", "done.json", "progress.json"
SHARDS, CHECKPOINT, MODEL = "shards", "checkpoint", "model"

_SHARD = re.compile(r"(\d{6,})\.(trajectories|uses)\.parquet")
_AGAIN = "set the stage aside and start it again (run --restart STAGE), or choose another --out"

Row = tuple[str, dict[str, object]]
"""A row of the ledger that is still to be appended: kind and body."""


class StageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first file in a stage's folder: the stage's identity and inputs."""

    name: str
    identity: str
    init: str  # "base", an earlier stage's name, or "path:..."
    inputs: Mapping[str, object]  # what the identity is the hash of, as plain data
    versions: Mapping[str, str] = {}  # of the libraries that its numbers come from


class StageProgress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The step of a checkpoint, and the ledger rows that belong to it."""

    step: int
    seconds: float  # run time so far, over all processes
    rows: list[Row]
    after: int  # records in the ledger before these rows
    head: str = GENESIS  # digest of the last of them
    seal: str = ""  # digest of all the rest

    def sealed(self) -> StageProgress:
        """The same with its seal."""
        return msgspec.structs.replace(self, seal=config.digest(self._content()))

    @property
    def holds(self) -> bool:
        """True when the rest is what the seal was made of."""
        return self.seal == config.digest(self._content())

    def _content(self) -> object:
        return msgspec.to_builtins(msgspec.structs.replace(self, seal=""))


class StageResult(msgspec.Struct, frozen=True, kw_only=True):
    """The last file in a stage's folder: the stage is finished."""

    steps: int
    seconds: float
    digest: str  # of the exported model folder


def stage_folder_name(name: str, identity: str) -> str:
    """Name of a stage's folder in a run.

    Example:
        >>> stage_folder_name("sft", "0f3a9c2e77d1")
        'sft-0f3a9c2e'
    """
    return f"{name}-{identity[:8]}"


@dataclass(frozen=True, slots=True)
class StageFolder:
    """The folder of one stage, read-only."""

    path: Path

    @property
    def model(self) -> Path:
        """The exported model folder; complete or absent."""
        return self.path / MODEL

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint; complete or absent."""
        return self.path / CHECKPOINT

    @property
    def metrics_file(self) -> Path:
        """One JSON line per step."""
        return self.path / METRICS

    @property
    def record_file(self) -> Path:
        """The stage's identity and inputs."""
        return self.path / STAGE

    @property
    def result_file(self) -> Path:
        """Exists only when the stage is finished."""
        return self.path / RESULT

    @property
    def shards(self) -> Path:
        """The folder of trajectories and their uses."""
        return self.path / SHARDS

    @property
    def progress_file(self) -> Path:
        """The step of the last checkpoint, and its ledger rows."""
        return self.checkpoint / PROGRESS

    @property
    def holds_work(self) -> bool:
        """True when there is a checkpoint, a model or a result."""
        return any(p.exists() for p in (self.checkpoint, self.model, self.result_file))

    def shard_files(self, step: int) -> tuple[Path, Path]:
        """The files of (trajectories, uses) that belong to the checkpoint at ``step``."""
        folder = self.shards
        return folder / f"{step:06d}.trajectories.parquet", folder / f"{step:06d}.uses.parquet"

    def trajectory_files(self) -> list[Path]:
        """Every file of trajectories, in the order of steps."""
        return [p for p in self._shards() if ".trajectories." in p.name]

    def use_files(self) -> list[Path]:
        """Every file of uses, in the order of steps."""
        return [p for p in self._shards() if ".uses." in p.name]

    def shards_after(self, step: int) -> list[Path]:
        """Shards of checkpoints after ``step``."""
        return [p for p in self._shards() if int(p.name.partition(".")[0]) > step]

    def _shards(self) -> list[Path]:
        """Files that have a shard's name; others are none of the stage's."""
        found = self.shards.glob("*.parquet")
        return sorted(p for p in found if _SHARD.fullmatch(p.name))

    def is_leftover(self, path: Path) -> bool:
        """True for a file that a stage leaves before its next commit, which no row names yet."""
        if self.result_file.exists():
            return False
        progress = self._whole_progress()
        late = self.shards_after(progress.step if progress else 0)
        return path in late or (path == self.metrics_file and progress is None)

    def record(self) -> StageRecord | None:
        """The stage's identity and inputs; None when there is no stage.

        Raises:
            RunError: the file is damaged.
        """
        return _decoded(self.record_file, StageRecord)

    def whole_record(self) -> StageRecord | None:
        """The same; None as well when the file is damaged."""
        try:
            return self.record()
        except RunError:
            return None

    def progress(self) -> StageProgress | None:
        """The progress of the last checkpoint; None when there is none yet.

        Raises:
            RunError: the checkpoint is damaged.
        """
        return _decoded(self.progress_file, StageProgress)

    def result(self) -> StageResult | None:
        """The result of a finished stage; None before.

        Raises:
            RunError: the file is damaged, or the stage is finished and its model was removed.
        """
        if not self.result_file.is_file():
            return None
        if not self.model.is_dir():
            raise RunError(
                f"{self.path} is finished, and its model folder is gone",
                expected=f"{self.model}",
                fix=f"put it back; or {_AGAIN}",
            )
        return _decoded(self.result_file, StageResult)

    def pending(self, records: Sequence[Record], *, root: Path) -> list[Row]:
        """Rows of the last commit that a kill kept from the ledger; a changed commit has none.

        Args:
            records: of the ledger.
            root: the run folder.
        """
        progress = self._whole_progress()
        if progress is None or len(records) < progress.after:
            return []
        head = records[progress.after - 1].digest if progress.after else GENESIS
        *rows, (kind, saved) = progress.rows
        own = plain_files(root, {self.progress_file: entry_at(self.progress_file)})
        rows.append((kind, {**saved, "files": {**_files(saved), **own}}))
        done = records[progress.after :]
        pairs = zip(done, rows, strict=False)
        if head != progress.head or any((r.kind, r.body) != row for r, row in pairs):
            return []
        return rows[len(done) :]

    def _whole_progress(self) -> StageProgress | None:
        """The progress, if there is one and it is what the commit wrote."""
        try:
            progress = self.progress()
        except RunError:
            return None
        return progress if progress is not None and progress.holds else None

    def metrics(self) -> list[Mapping[str, float]]:
        """The metrics of every step, in order, without an unfinished last line.

        Raises:
            RunError: a line is no JSON object; the message has its number.
        """
        rows = list[Mapping[str, float]]()
        for number, line in enumerate(self.metric_lines(), start=1):
            try:
                rows.append(msgspec.json.decode(line, type=dict[str, float]))
            except msgspec.MsgspecError as error:
                raise RunError(
                    f"{self.metrics_file}, line {number} is damaged: {error}",
                    expected="one JSON object per step",
                    fix=f"put the file back; or {_AGAIN}",
                ) from None
        return rows

    def metric_lines(self) -> list[str]:
        """The complete lines of the metrics file."""
        if not self.metrics_file.is_file():
            return []
        text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
        return [x for x in text.splitlines() if x.endswith("}")]  # a killed write leaves half


@dataclass(frozen=True, slots=True)
class StageWriter(StageFolder):
    """A stage's folder, writable: for the process with the lock only."""

    ledger: Ledger

    def has_started(self) -> bool:
        """True when the stage has a checkpoint or a model."""
        self.recover()
        return self.holds_work

    def recover(self) -> None:
        """Finish or undo what a kill interrupted: a swap of folders, the rows of a commit."""
        recover_folder(self.checkpoint)
        recover_folder(self.model)
        self.enter_commit()

    def enter_commit(self) -> None:
        """Append the rows of the last commit that the ledger does not hold."""
        for kind, body in self.pending(self.ledger.records, root=self.ledger.path.parent):
            self.ledger.append(RecordKind(kind), body)

    def write_record(self, record: StageRecord) -> None:
        """Write the stage's identity and inputs."""
        content = msgspec.json.format(msgspec.json.encode(record))
        write_recorded(self.ledger, self.record_file, content)

    @contextmanager
    def next_checkpoint(self, progress: StageProgress, *, metrics: FileEntry) -> Iterator[Path]:
        """A folder to save into. It replaces the last checkpoint when the block succeeds.

        The rows of ``progress``, and one for the files of the checkpoint and for the metrics so
        far, are then appended to the ledger.
        """
        with atomic_folder(self.checkpoint) as partial:
            yield partial
            files = {
                self.checkpoint / p.relative_to(partial): entry_at(p) for p in files_below(partial)
            }
            files[self.metrics_file] = metrics
            saved: dict[str, object] = {
                "stage": self.path.name,
                "step": progress.step,
                "files": plain_files(self.ledger.path.parent, files),
            }
            rows: list[Row] = [*progress.rows, (RecordKind.SAVED.value, saved)]
            whole = msgspec.structs.replace(progress, rows=rows).sealed()
            write_atomic(partial / PROGRESS, msgspec.json.encode(whole))
        self.enter_commit()

    def write_metrics(self, content: bytes) -> None:
        """Replace all metrics by these lines."""
        write_atomic(self.metrics_file, content)

    def export(self, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill the model folder, unless an earlier process exported it: the folder
        is complete and recorded, or absent.

        Raises:
            FileChanged: an earlier process exported it, and it is not what the ledger records.
        """
        recover_folder(self.model)
        if self.model.is_dir():
            known = RecordedFiles.of(self.ledger.path.parent, self.ledger.records)
            known.require(self.model)
            return
        with atomic_folder(self.model) as partial:
            write(partial)
            files = files_below(partial)
            announce(self.ledger, {self.model / p.relative_to(partial): entry_at(p) for p in files})

    def write_result(self, result: StageResult) -> None:
        """Mark the stage as finished. From now on its metrics grow no more."""
        content = msgspec.json.encode(result)
        whole = {self.metrics_file: entry_at(self.metrics_file)}
        announce(self.ledger, {self.result_file: entry_of(content), **whole})
        write_atomic(self.result_file, content)


def _files(body: Mapping[str, object]) -> Mapping[str, object]:
    files = body.get("files")
    return files if isinstance(files, Mapping) else {}


T = TypeVar("T", bound=msgspec.Struct)


def _decoded(path: Path, kind: type[T]) -> T | None:
    """A JSON file of the stage; None when there is none."""
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.MsgspecError as error:
        raise RunError(
            f"{path} is damaged: {error}",
            expected="the file that the stage wrote",
            fix=f"put it back; or {_AGAIN}",
        ) from None
