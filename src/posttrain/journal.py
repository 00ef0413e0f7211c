"""A stage's memory: checkpoints, metrics, trajectories and ledger rows that agree with each other.

    stages/<name>-<id>/
      metrics.jsonl               one line per step, cut back to the checkpoint on resume
      shards/000025.*.parquet     trajectories and their uses since the previous checkpoint
      checkpoint/                 learner.pt, progress.json          ← the commit point
      model/                      the export, written once, last

A commit writes the shards, then swaps the checkpoint folder, then appends to the ledger. A crash
in between loses nothing and doubles nothing: shards without a checkpoint are rewritten with equal
content, and ledger rows that the crash cut off stand in ``progress.json`` and are appended on
resume.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import msgspec

from posttrain.errors import RunError
from posttrain.files import as_disk_full, atomic_folder, recover_folder, write_atomic
from posttrain.ledger import Ledger, RecordKind, read
from posttrain.legality import Admission
from posttrain.protocols import Learner
from posttrain.store import Use, UseRole, write_trajectories, write_uses
from posttrain.trajectory import Column, Group, Scored, Trajectory


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a checkpoint stands, and the ledger rows that belong to it."""

    step: int
    seconds: float  # of work so far, over all sittings
    rows: list[tuple[str, dict[str, object]]]  # (ledger kind, body)


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

    def resume(self, learner: Learner) -> int:
        """Load the last checkpoint, if there is one; returns the step to go on from."""
        recover_folder(self._checkpoint)
        progress = read_progress(self._folder)
        self._sitting = time.monotonic()
        if progress is None:
            self._metrics.unlink(missing_ok=True)
            return 0
        learner.load(self._checkpoint)
        self._step, self._seconds = progress.step, progress.seconds
        self._cut_metrics(progress.step)
        if not self._in_ledger(progress):
            self._append(progress)
        return progress.step

    def record(self, step: int, admission: Admission, metrics: Mapping[str, float]) -> None:
        """Remember one step. Metrics are on disk at once, the rest at the next commit."""
        for group in admission.kept:
            self._remember(group, step=step, role=UseRole.TRAIN, reason=None)
        for group in admission.stale:
            self._remember(group, step=step, role=UseRole.DISCARDED, reason="stale")
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise as_disk_full(error, writing=self._metrics) or error from error

    def commit(self, step: int, learner: Learner) -> None:
        """Make everything up to ``step`` durable."""
        shards = self._folder / "shards"
        shards.mkdir(exist_ok=True)
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
        )
        with atomic_folder(self._checkpoint) as partial:
            learner.save(partial)
            write_atomic(partial / "progress.json", msgspec.json.encode(progress))
        self._append(progress)
        self._step, self._seconds, self._sitting = step, seconds, now
        self._trajectories, self._uses = {}, []

    def _append(self, progress: Progress) -> None:
        for kind, body in progress.rows:
            self._ledger.append(RecordKind(kind), body)

    def _in_ledger(self, progress: Progress) -> bool:
        """False when a crash fell between the checkpoint and its ledger rows."""
        last = progress.rows[-1][1]
        return any(
            r.kind is RecordKind.UPDATE
            and r.body["identity"] == last["identity"]
            and r.body["steps"] == last["steps"]
            for r in read(self._ledger.path)
        )

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


def _use(member: Scored, *, stage: str, step: int, role: UseRole, reason: str | None) -> Use:
    trajectory = member.trajectory
    author = next((s for s in trajectory.spans if s.is_authored), trajectory.spans[-1])
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
