"""The run folder: the path of every file, who may write it, and how it is read.

    OUT/
      lock                          names the process that writes the folder now (files.py)
      recipe.json                   the resolved recipe
      ledger.jsonl                  the hash-chained record of events (ledger.py)
      ledger.jsonl.torn-<k>         an unfinished last line of a killed process
      measurements/<policy>.json    one file per measured policy
      stages/<name>-<id>/
        stage.json                  the stage's identity, and what it is the hash of
        metrics.jsonl               one line per step, cut back to the checkpoint on resume
        shards/000025.*.parquet     trajectories and their uses since the previous checkpoint
        checkpoint/                 learner.pt, progress.json, state of parts: the commit point
        model/                      the export, written once, after the last step
        done.json                   the stage is finished
      treat.json                    the decisions of a treatment so far (diagnosis/treat.py)
      diagnoses/<k>.json            its diagnosis after k rounds, and its page <k>.html
      report.html                   the report

    .<name>.<random>.partial        a file that is being written; .<name>.partial and .<name>.old
                                    are folders that are (files.py)

Any process may read, also during the run: a :class:`RunFolder` writes only the pages, which are
rendered from the other files and can be rendered again. All else is written through a
:class:`RunWriter`, which exists only while its process holds the lock. A write replaces the old
version atomically; ledger and metrics are only appended to. No other module has these names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError, DataError, RunError, nearest
from posttrain.core.files import atomic_folder, folder_lock, recover_folder, write_atomic
from posttrain.core.proofs import Proof
from posttrain.measure.measurement import Measurement
from posttrain.recipe import Recipe, load_recipe
from posttrain.run.ledger import Ledger, Record, read

Treatment = TypeVar("Treatment", bound=Config)

RECIPE, LEDGER, REPORT, TREATMENT = "recipe.json", "ledger.jsonl", "report.html", "treat.json"
MEASUREMENTS, STAGES, DIAGNOSES = "measurements", "stages", "diagnoses"
STAGE, METRICS, RESULT, PROGRESS = "stage.json", "metrics.jsonl", "done.json", "progress.json"
SHARDS, CHECKPOINT, MODEL = "shards", "checkpoint", "model"


class StageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The first file in a stage's folder: the stage's identity and inputs."""

    name: str
    identity: str
    init: str  # "base", an earlier stage's name, or "path:..."
    inputs: Mapping[str, object]  # what the identity is the hash of, as plain data


class StageProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The step of a checkpoint, and the ledger rows that belong to it."""

    step: int
    seconds: float  # run time so far, over all processes
    rows: list[tuple[str, dict[str, object]]]  # (ledger kind, body)
    after: int  # records in the ledger before these rows


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


def read_measurement(path: Path) -> Measurement:
    """Read a measurement file, in a run folder or elsewhere.

    Raises:
        DataError: the file is no measurement, or is damaged.
    """
    try:
        return Measurement.from_json(path.read_text(encoding="utf-8"))
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a measurement: {error}",
            expected="a file that `posttrain probe --out` wrote, or RUN:POLICY",
        ) from None


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

    def shard_files(self, step: int) -> tuple[Path, Path]:
        """The files of (trajectories, uses) that belong to the checkpoint at ``step``."""
        folder = self.path / SHARDS
        return folder / f"{step:06d}.trajectories.parquet", folder / f"{step:06d}.uses.parquet"

    def trajectory_files(self) -> list[Path]:
        """Every file of trajectories, in the order of steps."""
        return sorted((self.path / SHARDS).glob("*.trajectories.parquet"))

    def use_files(self) -> list[Path]:
        """Every file of uses, in the order of steps."""
        return sorted((self.path / SHARDS).glob("*.uses.parquet"))

    def shards_after(self, step: int) -> list[Path]:
        """Shards of checkpoints after ``step``."""
        found = (self.path / SHARDS).glob("*.parquet")
        return [p for p in found if int(p.name.partition(".")[0]) > step]

    def record(self) -> StageRecord | None:
        """The stage's identity and inputs; None when there is no stage.

        Raises:
            RunError: the file is damaged.
        """
        if not self.record_file.is_file():
            return None
        try:
            return msgspec.json.decode(self.record_file.read_bytes(), type=StageRecord)
        except msgspec.MsgspecError as error:
            raise RunError(
                f"{self.record_file} is damaged: {error}",
                expected="the file that the stage wrote when it began",
                fix=f"delete {self.path} to start this stage again",
            ) from None

    def progress(self) -> StageProgress | None:
        """The progress of the last checkpoint; None when there is none yet.

        Raises:
            RunError: the checkpoint is damaged.
        """
        path = self.checkpoint / PROGRESS
        if not path.is_file():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=StageProgress)
        except msgspec.MsgspecError as error:
            raise RunError(
                f"{path} is damaged: {error}",
                expected="the file that the last commit wrote",
                fix=f"delete {path.parent} to start this stage again",
            ) from None

    def result(self) -> StageResult | None:
        """The result of a finished stage; None before.

        Raises:
            RunError: the file is damaged, or the stage is finished and its model was removed.
        """
        if not self.result_file.is_file():
            return None
        again = f"delete {self.result_file} to export again from the last checkpoint"
        if not self.model.is_dir():
            raise RunError(
                f"{self.path} is finished, and its model folder is gone",
                expected=f"{self.model}",
                fix=f"put it back, or {again}",
            )
        try:
            return msgspec.json.decode(self.result_file.read_bytes(), type=StageResult)
        except msgspec.MsgspecError as error:
            raise RunError(f"{self.result_file} is damaged: {error}", fix=again) from None

    def metrics(self) -> list[Mapping[str, float]]:
        """The metrics of every step, in order, without an unfinished last line."""
        return [json.loads(line) for line in self.metric_lines()]

    def metric_lines(self) -> list[str]:
        """The complete lines of the metrics file."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.endswith("}")]  # a killed write leaves half a line


@dataclass(frozen=True, slots=True)
class StageWriter(StageFolder):
    """A stage's folder, writable: for the process with the lock only. See :class:`RunWriter`."""

    def has_started(self) -> bool:
        """True when the stage has a checkpoint or a model."""
        self.recover_checkpoint()
        recover_folder(self.model)
        return any(p.exists() for p in (self.checkpoint, self.model, self.result_file))

    def recover_checkpoint(self) -> None:
        """Finish or undo a commit that a kill interrupted."""
        recover_folder(self.checkpoint)

    def write_record(self, record: StageRecord) -> None:
        """Write the stage's identity and inputs."""
        write_atomic(self.record_file, msgspec.json.format(msgspec.json.encode(record)))

    @contextmanager
    def next_checkpoint(self, progress: StageProgress) -> Iterator[Path]:
        """A folder to save into. It replaces the last checkpoint when the block succeeds."""
        with atomic_folder(self.checkpoint) as partial:
            yield partial
            write_atomic(partial / PROGRESS, msgspec.json.encode(progress))

    def write_metric_lines(self, lines: list[str]) -> None:
        """Replace all metrics by these lines."""
        write_atomic(self.metrics_file, "".join(line + "\n" for line in lines))

    def export(self, write: Callable[[Path], Sequence[Proof]]) -> Sequence[Proof]:
        """Let ``write`` fill the model folder, unless an earlier process exported it: the folder
        is complete or absent, and its name has the stage's identity. Returns its proofs."""
        recover_folder(self.model)
        if self.model.is_dir():
            return ()
        with atomic_folder(self.model) as partial:
            return write(partial)

    def write_result(self, result: StageResult) -> None:
        """Mark the stage as finished."""
        write_atomic(self.result_file, msgspec.json.encode(result))

    def remove(self) -> None:
        """Delete the folder and its content."""
        shutil.rmtree(self.path)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder, finished or not, read-only but for the pages. :meth:`lock` opens it to write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with RunFolder(Path(out)).lock() as writer:
        ...         _ = writer.open_ledger()
        ...     RunFolder(Path(out)).records(), RunFolder(Path(out)).measured()
        ([], [])
    """

    path: Path

    # --- reading -----------------------------------------------------------------------------

    @property
    def is_run(self) -> bool:
        """True when the folder holds a run: its recipe is there."""
        return self.recipe_file.is_file()

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def ledger_file(self) -> Path:
        """The hash-chained record."""
        return self.path / LEDGER

    @property
    def report_file(self) -> Path:
        """The page about the run."""
        return self.path / REPORT

    @property
    def treatment_file(self) -> Path:
        """The decisions of a treatment so far; missing in other runs."""
        return self.path / TREATMENT

    def recipe(self) -> Recipe:
        """The resolved recipe of the run.

        Raises:
            ConfigError: this is not a run folder, or its recipe is invalid.
        """
        if not self.is_run:
            raise ConfigError(
                f"{self.path} is not a run folder",
                expected=f"a folder that `posttrain run` or `tour` wrote, with {RECIPE} in it",
                fix="check the path: it is what --out said, or out/<recipe name>",
            )
        return load_recipe(self.recipe_file)

    def records(self) -> list[Record]:
        """Every record of the ledger, its chain checked.

        Raises:
            LedgerBroken: the chain is broken; the message has the line.
        """
        return read(self.ledger_file)

    def measurement_file(self, policy: str) -> Path:
        """Path of a policy's measurement, which may not exist yet."""
        return self.path / MEASUREMENTS / f"{policy}.json"

    def measured(self) -> list[str]:
        """Names of the measured policies, sorted."""
        return sorted(p.stem for p in (self.path / MEASUREMENTS).glob("*.json"))

    def measurement(self, policy: str) -> Measurement:
        """The measurement of a policy.

        Raises:
            ConfigError: it was not measured.
            DataError: the file is damaged.
        """
        path = self.measurement_file(policy)
        if not path.is_file():
            raise ConfigError(
                f"{self.path} has no measured policy {policy!r}",
                fix=nearest(policy, self.measured()),
            )
        return read_measurement(path)

    def stage(self, name: str, identity: str) -> StageFolder:
        """The folder of a stage, which may not exist yet."""
        return StageFolder(self.path / STAGES / stage_folder_name(name, identity))

    def stages(self, name: str | None = None) -> list[StageFolder]:
        """The started stages: those of one name, which differ in identity, or all.

        Raises:
            RunError: a stage's record file is damaged.
        """
        found = sorted((self.path / STAGES).glob("*" if name is None else f"{name}-*"))
        # The pattern also finds `sft-long` for `sft`.
        return [
            stage
            for stage in map(StageFolder, found)
            if (record := stage.record()) is not None and name in (None, record.name)
        ]

    def models(self, name: str) -> list[Path]:
        """The exported models of the stages of that name."""
        return [stage.model for stage in self.stages(name) if stage.model.is_dir()]

    def treatment(self, kind: type[Treatment]) -> Treatment | None:
        """The decisions of a treatment so far; None in other runs.

        Raises:
            DataError: the file is damaged.
        """
        path = self.treatment_file
        if not path.is_file():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except msgspec.MsgspecError as error:
            raise DataError(
                f"{path} is damaged: {error}", fix=f"start again in another folder: {self.path}-2"
            ) from None

    def diagnoses(self) -> list[int]:
        """Numbers of the diagnoses of a treatment, in order: the rounds before each."""
        return sorted(int(p.stem) for p in (self.path / DIAGNOSES).glob("*.json"))

    def diagnosis_file(self, number: int) -> Path:
        """The diagnosis after ``number`` rounds, as JSON."""
        return self.path / DIAGNOSES / f"{number}.json"

    def diagnosis_page(self, number: int) -> Path:
        """The diagnosis after ``number`` rounds, as a page."""
        return self.path / DIAGNOSES / f"{number}.html"

    # --- pages: rendered from the other files, by any process at any time -----------------------

    def write_report(self, page: str) -> Path:
        """Replace the report by this page; returns its path."""
        write_atomic(self.report_file, page)
        return self.report_file

    def write_diagnosis_page(self, number: int, page: str) -> Path:
        """Write the page of a diagnosis; returns its path."""
        path = self.diagnosis_page(number)
        write_atomic(path, page)
        return path

    # --- writing -----------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[RunWriter]:
        """Lock the folder for this process, to write to it. It is created if missing.

        Raises:
            RunLocked: another process holds it.
            RunError: the file system has no locks.
        """
        with folder_lock(self.path):
            yield RunWriter(self.path)


@dataclass(frozen=True, slots=True)
class RunWriter(RunFolder):
    """A run folder, writable: for the process with the lock only. See :meth:`RunFolder.lock`."""

    def open_ledger(self) -> Ledger:
        """The ledger, to append to.

        Raises:
            LedgerBroken: the chain is broken; the message has the line.
        """
        return Ledger.open(self.ledger_file)

    def stage_writer(self, name: str, identity: str) -> StageWriter:
        """The folder of a stage, writable. The first write creates it."""
        return StageWriter(self.stage(name, identity).path)

    def stage_writers(self, name: str) -> list[StageWriter]:
        """The started stages of one name, writable."""
        return [StageWriter(stage.path) for stage in self.stages(name)]

    def write_recipe(self, recipe: Recipe) -> None:
        """Replace the run's recipe."""
        write_atomic(self.recipe_file, msgspec.json.format(msgspec.json.encode(recipe)))

    def write_measurement(self, policy: str, measurement: Measurement) -> None:
        """Replace the policy's measurement."""
        write_atomic(self.measurement_file(policy), measurement.to_json())

    def write_treatment(self, record: Config) -> None:
        """Replace the treatment's record."""
        write_atomic(self.treatment_file, msgspec.json.format(msgspec.json.encode(record)))

    def write_diagnosis(self, number: int, content: str) -> None:
        """Write the diagnosis after ``number`` rounds, as JSON."""
        write_atomic(self.diagnosis_file(number), content)

    def remove_partials(self) -> None:
        """Remove the partial files of killed writes; their names end in random digits."""
        flat = (self.path, self.path / MEASUREMENTS, self.path / DIAGNOSES)
        for folder in (*flat, *(self.path / STAGES).glob("**")):
            for file in folder.glob(".*.partial"):
                if file.is_file():  # folders are left for recover_folder, which may need them
                    file.unlink()
