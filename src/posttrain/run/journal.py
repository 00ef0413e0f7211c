"""A stage's memory: checkpoints, metrics, trajectories and ledger rows that agree with each other.

    stages/<name>-<id>/
      stage.json                  what the stage is: its identity, and everything behind it
      metrics.jsonl               one line per step, cut back to the checkpoint on resume
      shards/000025.*.parquet     trajectories and their uses since the previous checkpoint
      checkpoint/                 learner.pt, progress.json          ← the commit point
      model/                      the export, written once, after the last step
      done.json                   the stage is finished

A commit writes the shards, then swaps the checkpoint folder, then appends to the ledger. A crash
in between loses nothing and doubles nothing: shards without a checkpoint are removed on resume,
and ledger rows that the crash cut off stand in ``progress.json`` and are appended on resume.
Until the first commit a stage has not started: its folder holds nothing that could be lost.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import msgspec

from posttrain.core.errors import RunError
from posttrain.core.files import as_disk_full, atomic_folder, recover_folder, write_atomic
from posttrain.core.protocols import Learner, Stateful
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.parts.legality import Admission
from posttrain.run.ledger import Ledger, RecordKind, read
from posttrain.run.store import Use, UseRole, write_trajectories, write_uses


class About(msgspec.Struct, frozen=True, kw_only=True):
    """Written first into a stage's folder: what the stage is."""

    name: str
    identity: str
    inputs: dict[str, object]  # everything the identity is the hash of, as plain data


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a checkpoint stands, and the ledger rows that belong to it."""

    step: int
    seconds: float  # of work so far, over all sittings
    rows: list[tuple[str, dict[str, object]]]  # (ledger kind, body)
    after: int  # records in the ledger before these rows


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """Written last into a stage's folder: the stage is finished."""

    steps: int
    seconds: float
    digest: str  # of the exported model folder


@final
class Journal:
    """Writes what a stage did. One writer per folder."""

    def __init__(
        self,
        folder: Path,
        *,
        ledger: Ledger,
        stage: str,
        identity: str,
        facts: Mapping[str, object],
    ) -> None:
        """
        Args:
            folder: the stage's folder; made if missing.
            ledger: of the run.
            stage: its name.
            identity: its content hash.
            facts: what every ``update`` row repeats (objective, input policy and the like).
        """
        self._folder, self._ledger = folder, ledger
        self._stage, self._identity, self._facts = stage, identity, dict(facts)
        self._trajectories: dict[str, Trajectory] = {}
        self._uses: list[Use] = []
        self._step, self._seconds, self._sitting = 0, 0.0, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _metrics(self) -> Path:
        return self._folder / "metrics.jsonl"

    @property
    def _checkpoint(self) -> Path:
        return self._folder / "checkpoint"

    def resume(self, learner: Learner, *also: Stateful) -> int:
        """Load the last checkpoint, if there is one; returns the step to go on from."""
        recover_folder(self._checkpoint)
        progress = read_progress(self._folder)
        self._sitting = time.monotonic()
        self._remove_shards(after=progress.step if progress else 0)
        if progress is None:
            self._metrics.unlink(missing_ok=True)
            return 0
        for kept in (learner, *also):
            kept.load(self._checkpoint)
        self._step, self._seconds = progress.step, progress.seconds
        self._cut_metrics(progress.step)
        self._append_missing(progress)
        return progress.step

    def metrics(self) -> list[Mapping[str, float]]:
        """What was recorded of every step so far, in order."""
        if not self._metrics.is_file():
            return []
        return [json.loads(x) for x in self._metrics.read_text(encoding="utf-8").splitlines()]

    def record(self, step: int, admission: Admission, metrics: Mapping[str, float]) -> None:
        """Remember one step. Metrics are on disk at once, the rest at the next commit."""
        for group in admission.kept:
            self._remember(group, step=step, role=UseRole.TRAIN, reason=None)
        for group in admission.stale:
            self._remember(group, step=step, role=UseRole.DISCARDED, reason="stale")
        for reason, groups in admission.discarded.items():
            for group in groups:
                self._remember(group, step=step, role=UseRole.DISCARDED, reason=str(reason))
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            full = as_disk_full(error, writing=self._metrics)
            if full is None:
                raise
            raise full from error

    def commit(self, step: int, learner: Learner, *also: Stateful) -> None:
        """Make everything up to ``step`` durable."""
        shards = self._folder / "shards"
        names = [f"{step:06d}.trajectories.parquet", f"{step:06d}.uses.parquet"]
        digests = [
            write_trajectories(shards / names[0], list(self._trajectories.values())),
            write_uses(shards / names[1], self._uses),
        ]
        shard: dict[str, object] = {
            "stage": self._stage,
            "files": {f"shards/{n}": d for n, d in zip(names, digests, strict=True)},
            "rows": len(self._uses),
            "discarded": sum(u.role is UseRole.DISCARDED for u in self._uses),
            "completion_tokens": sum(u.completion_tokens for u in self._uses),
        }
        now = time.monotonic()
        seconds = self._seconds + now - self._sitting
        update: dict[str, object] = {
            "stage": self._stage,
            "identity": self._identity,
            "steps": [self._step, step],
            "shards": digests,
            "seconds": round(seconds - self._seconds, 3),
            **self._facts,
        }
        progress = Progress(
            step=step,
            seconds=seconds,
            rows=[(RecordKind.SHARD, shard), (RecordKind.UPDATE, update)],
            after=self._ledger.num_records,
        )
        self._sync_metrics()
        with atomic_folder(self._checkpoint) as partial:
            for kept in (learner, *also):
                kept.save(partial)
            write_atomic(partial / "progress.json", msgspec.json.encode(progress))
        for kind, body in progress.rows:
            self._ledger.append(RecordKind(kind), body)
        self._step, self._seconds, self._sitting = step, seconds, now
        self._trajectories, self._uses = {}, []

    def _append_missing(self, progress: Progress) -> None:
        """Append what a crash between the checkpoint and its last ledger row cut off."""
        recorded = read(self._ledger.path)[progress.after :]
        for kind, body in progress.rows:
            if not any(r.kind == kind and r.body == body for r in recorded):
                self._ledger.append(RecordKind(kind), body)

    def _remove_shards(self, *, after: int) -> None:
        """Drop shards that were written for a checkpoint that never came to be."""
        for shard in (self._folder / "shards").glob("*.parquet"):
            if int(shard.name.partition(".")[0]) > after:
                shard.unlink()

    def _sync_metrics(self) -> None:
        """Lines of committed steps must survive a power cut as the checkpoint does."""
        with self._metrics.open("rb") as file:
            os.fsync(file.fileno())

    def _cut_metrics(self, step: int) -> None:
        """Drop lines of steps that came after the checkpoint: they will be taken again."""
        if not self._metrics.is_file():
            return
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        whole = [line for line in lines if line.endswith("}")]  # a killed write leaves half a line
        kept = [line for line in whole if json.loads(line)["step"] < step]
        write_atomic(self._metrics, "".join(line + "\n" for line in kept))

    def _remember(self, group: Group, *, step: int, role: UseRole, reason: str | None) -> None:
        for member in group.members:
            use = _use(member, stage=self._stage, step=step, role=role, reason=reason)
            self._trajectories.setdefault(use.trajectory, member.trajectory)
            self._uses.append(use)


def read_progress(folder: Path) -> Progress | None:
    """The progress of the stage in ``folder``; None when it has no checkpoint yet.

    Raises:
        RunError: the checkpoint is damaged.
    """
    path = folder / "checkpoint" / "progress.json"
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except msgspec.MsgspecError as error:
        raise RunError(
            f"{path} is damaged: {error}",
            expected="the file that the last commit wrote",
            fix=f"delete {path.parent} to start this stage again",
        ) from None


def has_started(folder: Path) -> bool:
    """True when the stage in ``folder`` has something to lose: a checkpoint or a model.

    For the writer of the folder only: it settles what a kill in the middle of a commit left.
    """
    for name in ("checkpoint", "model"):
        recover_folder(folder / name)
    return any((folder / name).exists() for name in ("checkpoint", "model", "done.json"))


def read_about(folder: Path) -> About | None:
    """What the stage in ``folder`` is; None when there is no stage.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / "stage.json"
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=About)
    except msgspec.MsgspecError as error:
        raise RunError(
            f"{path} is damaged: {error}",
            expected="the file that the stage wrote when it began",
            fix=f"delete {folder} to start this stage again",
        ) from None


def read_done(folder: Path) -> Done | None:
    """The finishing mark of a stage, or None.

    Raises:
        RunError: the mark is damaged, or the stage finished and its model was removed.
    """
    path = folder / "done.json"
    if not path.is_file():
        return None
    again = f"delete {path} to export again from the last checkpoint"
    if not (folder / "model").is_dir():
        raise RunError(
            f"{folder} is finished, and its model folder is gone",
            expected=f"{folder / 'model'}",
            fix=f"put it back, or {again}",
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=Done)
    except msgspec.MsgspecError as error:
        raise RunError(f"{path} is damaged: {error}", fix=again) from None


def _use(member: Scored, *, stage: str, step: int, role: UseRole, reason: str | None) -> Use:
    trajectory = member.trajectory
    author = next((s for s in reversed(trajectory.spans) if s.is_authored), trajectory.spans[-1])
    live = [s.versions for s in trajectory.spans if s.versions is not None]
    advantage = member.columns.get(Column.ADVANTAGE)
    return Use(
        trajectory=trajectory.id,
        task=trajectory.task,
        kind=author.producer.kind,
        producer=author.producer.name,
        stage=stage,
        step=step,
        role=role,
        reason=reason,
        reward=member.scalar(Column.REWARD),
        advantage=None if advantage is None else float(advantage[-1]),
        prompt_tokens=trajectory.prompt_length,
        completion_tokens=len(trajectory) - trajectory.prompt_length,
        first_version=min((v[0] for v in live), default=None),
        last_version=max((v[1] for v in live), default=None),
    )
