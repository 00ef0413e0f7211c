"""The run folder: the path of every file, who may write it, and how it is read.

    OUT/
      lock                          names the process that writes the folder now (files.py)
      recipe.json                   the resolved recipe
      ledger.jsonl                  the hash-chained record of events (ledger.py)
      ledger.jsonl.head             its last record, to notice a cut
      ledger.jsonl.torn-<k>         an unfinished last line of a killed process
      measurements/<policy>.json    one file per measured policy
      stages/<name>-<id>/           a stage (stage_folder.py)
      aside/<name>-<id>-<k>/        a stage that was set aside
      treat.json                    the decisions of a treatment so far (diagnosis/treat.py)
      diagnoses/<k>.json            its diagnosis after k rounds, and its page <k>.html
      report.html                   the report

    .<name>.<random>.partial        a file that is being written; .<name>.partial and .<name>.old
                                    are folders that are (files.py)

Any process may read, also during the run: a :class:`RunFolder` writes only the pages, which are
rendered from the other files and can be rendered again. All else is written through a
:class:`RunWriter`, which exists only while its process holds the lock. A write replaces the old
version atomically; ledger and metrics are only appended to. The ledger records every file but the
pages (recorded.py). No other module than this one and ``stage_folder.py`` has these names.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError, DataError, nearest
from posttrain.core.files import folder_lock, sync_folder, write_atomic, writing
from posttrain.core.guard import read_text, reading
from posttrain.measure.measurement import Measurement
from posttrain.recipe import Recipe, load_recipe
from posttrain.run.ledger import Ledger, Record, RecordKind, head_file, read
from posttrain.run.recorded import (
    Fault,
    RecordedFiles,
    announce,
    entry_at,
    files_below,
    plain_files,
    write_recorded,
)
from posttrain.run.stage_folder import StageFolder, StageWriter, stage_folder_name

Treatment = TypeVar("Treatment", bound=Config)

RECIPE, LEDGER, REPORT, TREATMENT = "recipe.json", "ledger.jsonl", "report.html", "treat.json"
MEASUREMENTS, STAGES, DIAGNOSES = "measurements", "stages", "diagnoses"
ASIDE, LOCK = "aside", "lock"
NOISE = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""Files that file managers leave."""
_READ = frozenset({STAGES, MEASUREMENTS, DIAGNOSES, RECIPE, TREATMENT})
"""Where a run reads what it wrote."""

MOST_MEASUREMENT = 1 << 30
"""Bytes of a file that is read as a measurement."""


def require_recorded(path: Path) -> None:
    """Compare a measurement or a model that lies in a run folder with the ledger of that run.

    Nothing is known of other files, nor of runs whose ledger records none.

    Raises:
        LedgerBroken: the ledger of the run is broken.
        FileChanged: it is not what the ledger records.
    """
    path = path.absolute()
    for at in path.parents:
        inside = path.relative_to(at).parts[0] in (MEASUREMENTS, STAGES)
        if inside and ((at / LEDGER).is_file() or head_file(at / LEDGER).is_file()):
            known = RunFolder(at).recorded()
            if known.entries:
                known.require(path)


def read_measurement(path: Path) -> Measurement:
    """Read a measurement file. One that lies in a run folder is checked against its ledger.

    Raises:
        DataError: the file is no measurement, or is damaged.
        FileChanged: it is not what the run's ledger records.
    """
    require_recorded(path)
    return _measurement_at(path)


def _measurement_at(path: Path) -> Measurement:
    kind = "a file that `posttrain probe --out` wrote, or RUN:POLICY"
    try:
        text = read_text(path, kind=kind, at_most=MOST_MEASUREMENT)
        with reading(path, kind=kind):
            return Measurement.from_json(text)
    except DataError as error:
        raise DataError(f"{path} is not a measurement: {error.found}", expected=kind) from None


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder, finished or not, read-only but for the pages. :meth:`lock` opens it to write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with RunFolder(Path(out)).lock() as writer:
        ...         writer.write_diagnosis(0, "{}")
        ...     [str(r.kind) for r in RunFolder(Path(out)).records()]
        ['file']
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

    def recipe(self, *, checked: bool = True) -> Recipe:
        """The resolved recipe of the run.

        Args:
            checked: against the ledger.

        Raises:
            ConfigError: this is not a run folder, or its recipe is invalid.
            FileChanged: it is not what the ledger records.
        """
        if not self.is_run:
            raise ConfigError(
                f"{self.path} is not a run folder",
                expected=f"a folder that `posttrain run` or `tour` wrote, with {RECIPE} in it",
                fix="check the path: it is what --out said, or out/<recipe name>",
            )
        if checked:
            self.recorded().require(self.recipe_file)
        return load_recipe(self.recipe_file)

    def records(self) -> list[Record]:
        """Every record of the ledger, its chain checked.

        Raises:
            LedgerBroken: the chain is broken; the message has the line.
        """
        return read(self.ledger_file)

    def recorded(self) -> RecordedFiles:
        """What the ledger, and a commit that a kill kept from it, say of the files.

        Raises:
            LedgerBroken: the chain is broken; the message has the line.
        """
        records = self.records()
        late = [r for s in self.stage_folders() for r in s.pending(records, root=self.path)]
        return RecordedFiles.of(self.path, records, late=late)

    def stage_folders(self) -> list[StageFolder]:
        """The folder of every stage, whatever its files are worth."""
        found = sorted((self.path / STAGES).glob("*"))
        return [StageFolder(p) for p in found if p.is_dir() and not p.name.startswith(".")]

    def unrecorded(self, known: RecordedFiles) -> list[Path]:
        """Files that a run would read and no row names, without those that need none.

        These are pages, what a stage leaves before its next commit, and the files of file managers.
        A file at a place that no run reads is the user's own: inputs, notes.
        """
        named = set(known.names)
        stages = {stage.path: stage for stage in self.stage_folders()}
        found = []
        for file in files_below(self.path):
            parts = file.relative_to(self.path).parts
            at = self.path.joinpath(*parts[:2])
            page = parts[0] == DIAGNOSES and file.suffix == ".html"
            left = at in stages and stages[at].is_leftover(file)
            if parts[0] in _READ and not (
                "/".join(parts) in named or file.name in NOISE or page or left
            ):
                found.append(file)
        return found

    def measurement_file(self, policy: str) -> Path:
        """Path of a policy's measurement, which may not exist yet."""
        return self.path / MEASUREMENTS / f"{policy}.json"

    def measured(self) -> list[str]:
        """Names of the measured policies, sorted."""
        return sorted(p.stem for p in (self.path / MEASUREMENTS).glob("*.json"))

    def measurement(self, policy: str, *, checked: bool = True) -> Measurement:
        """The measurement of a policy.

        Args:
            policy: its name.
            checked: against the ledger.

        Raises:
            ConfigError: it was not measured.
            DataError: the file is damaged.
            FileChanged: it is not what the ledger records.
        """
        path = self.measurement_file(policy)
        if not path.is_file():
            raise ConfigError(
                f"{self.path} has no measured policy {policy!r}",
                fix=nearest(policy, self.measured()),
            )
        if checked:
            self.recorded().require(path)
        return _measurement_at(path)

    def stage(self, name: str, identity: str) -> StageFolder:
        """The folder of a stage, which may not exist yet.

        A stage whose change was accepted keeps the folder that it started in.
        """
        for stage in self.stage_folders():
            record = stage.whole_record()
            if record is not None and (record.name, record.identity) == (name, identity):
                return stage
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
        """The exported models of the stages of that name.

        Raises:
            FileChanged: one is not what the ledger records.
        """
        found = [stage.model for stage in self.stages(name) if stage.model.is_dir()]
        self.recorded().require(*found)
        return found

    def treatment(self, kind: type[Treatment]) -> Treatment | None:
        """The decisions of a treatment so far; None in other runs.

        Raises:
            FileChanged: the file is not what the ledger records.
            DataError: the file is damaged.
        """
        path = self.treatment_file
        if not path.is_file():
            return None
        self.recorded().require(path)
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except msgspec.MsgspecError as error:
            raise DataError(
                f"{path} is damaged: {error}", fix="put the file back, or choose another --out"
            ) from None

    def diagnoses(self) -> list[int]:
        """Numbers of the diagnoses of a treatment, in order: the rounds before each."""
        return sorted(int(p.stem) for p in (self.path / DIAGNOSES).glob("*.json"))

    def diagnosis(self, number: int) -> str:
        """The diagnosis after ``number`` rounds, as JSON.

        Raises:
            FileChanged: the file is not what the ledger records.
        """
        path = self.diagnosis_file(number)
        self.recorded().require(path)
        return path.read_text(encoding="utf-8")

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
            writer = RunWriter(self.path, Ledger.open(self.ledger_file))
            with writing(self.path):
                writer.recover()
            yield writer


@dataclass(frozen=True, slots=True)
class RunWriter(RunFolder):
    """A run folder, writable: for the process with the lock only. See :meth:`RunFolder.lock`."""

    ledger: Ledger

    def recover(self) -> None:
        """Put right what a kill interrupted, so that files and ledger agree again."""
        if self.ledger.records:
            last = self.ledger.records[-1].body
            if "aside" in last:
                self._move(Path(str(last["folder"])), Path(str(last["aside"])))
            undone = RecordedFiles.of(self.path, self.ledger.records).undone()
            if undone is not None:
                self.ledger.append(RecordKind.FILE, undone)
        for stage in self.stage_folders():
            StageWriter(stage.path, self.ledger).recover()
        self._remove_partials()

    def stage_writer(self, name: str, identity: str) -> StageWriter:
        """The folder of a stage, writable. The first write creates it."""
        return StageWriter(self.stage(name, identity).path, self.ledger)

    def stage_writers(self, name: str) -> list[StageWriter]:
        """The started stages of one name, writable."""
        return [StageWriter(stage.path, self.ledger) for stage in self.stages(name)]

    def write_recipe(self, recipe: Recipe) -> None:
        """Replace the run's recipe."""
        self._write(self.recipe_file, msgspec.json.format(msgspec.json.encode(recipe)))

    def write_measurement(self, policy: str, measurement: Measurement) -> None:
        """Replace the policy's measurement."""
        self._write(self.measurement_file(policy), measurement.to_json())

    def write_treatment(self, record: Config) -> None:
        """Replace the treatment's record."""
        self._write(self.treatment_file, msgspec.json.format(msgspec.json.encode(record)))

    def write_diagnosis(self, number: int, content: str) -> None:
        """Write the diagnosis after ``number`` rounds, as JSON."""
        self._write(self.diagnosis_file(number), content)

    def _write(self, path: Path, content: bytes | str) -> None:
        write_recorded(self.ledger, path, content)

    def remove_stage(self, stage: StageWriter) -> None:
        """Delete the folder of a stage that has not started."""
        announce(self.ledger, dict.fromkeys(files_below(stage.path)))
        with writing(stage.path):
            shutil.rmtree(stage.path)

    def set_aside(self, name: str) -> list[Path]:
        """Move the folders of a stage out of the way, whatever they hold; returns the new places.

        Nothing is deleted. The ledger keeps the rows of its work.
        """
        own = re.compile(re.escape(name) + "-[0-9a-f]{8}")
        moved = []
        for stage in (s.path for s in self.stage_folders() if own.fullmatch(s.path.name)):
            number = 1
            while (to := self.path / ASIDE / f"{stage.name}-{number}").exists():
                number += 1
            places = [p.relative_to(self.path).as_posix() for p in (stage, to)]
            known = [n for n in self.recorded().names if n.startswith(f"{places[0]}/")]
            body = {"name": name, "event": "set aside", "folder": places[0], "aside": places[1]}
            self.ledger.append(RecordKind.STAGE, {**body, "files": dict.fromkeys(known)})
            self._move(Path(places[0]), Path(places[1]))
            moved.append(to)
        return moved

    def _move(self, stage: Path, to: Path) -> None:
        """Move a stage's folder, unless an earlier process did."""
        source, target = self.path / stage, self.path / to
        if source.is_dir() and not target.exists():
            with writing(target):
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
                sync_folder(target.parent)
                sync_folder(source.parent)

    def accept_files(self, faults: Sequence[Fault]) -> None:
        """Go on with files as they are now: the ledger holds what they were and what they are."""
        known = self.recorded().entries
        names = [f.path for f in faults if f.path != head_file(self.ledger_file).name]
        was = {n: known[n].plain if n in known else None for n in names}
        now = {self.path / n: entry_at(self.path / n) for n in names}
        files = plain_files(self.path, now)
        self.ledger.append(RecordKind.ACCEPT, {"name": "files", "old": was, "files": files})

    def _remove_partials(self) -> None:
        """Remove the partial files of killed writes; their names end in random digits."""
        flat = (self.path, self.path / MEASUREMENTS, self.path / DIAGNOSES)
        for folder in (*flat, *(self.path / STAGES).glob("**")):
            for file in folder.glob(".*.partial"):
                if file.is_file():  # folders are left for recover_folder, which may need them
                    file.unlink()
