"""The journal of a stage: consistent checkpoints, metrics, trajectories and ledger rows.

A commit writes the shards, then swaps the checkpoint folder, then appends to the ledger. A crash
in between loses and duplicates nothing: on resume, shards without a checkpoint are removed, and
missing ledger rows, which the checkpoint's progress also holds, are appended. Until the first
commit a stage has not started: its folder holds nothing to lose. ``stage_folder.py`` shows the
layout. A checkpoint is compared with its ledger row before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

from posttrain.core.files import writing
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.parts.legality import Admission
from posttrain.protocols import Learner, Stateful
from posttrain.run.ledger import RecordKind
from posttrain.run.recorded import FileEntry, RecordedFiles, entry_at, plain_files
from posttrain.run.stage_folder import StageProgress, StageWriter
from posttrain.run.store import Use, UseRole, write_trajectories, write_uses


@final
class Journal:
    """Writes the record of a stage. One writer per folder."""

    def __init__(
        self,
        folder: StageWriter,
        *,
        stage: str,
        identity: str,
        facts: Mapping[str, object],
    ) -> None:
        """
        Args:
            folder: of the stage; created if missing.
            stage: its name.
            identity: its content hash.
            facts: fields of every ``update`` row (objective, input policy and others).
        """
        self._folder, self._ledger = folder, folder.ledger
        self._stage, self._identity, self._facts = stage, identity, dict(facts)
        self._trajectories: dict[str, Trajectory] = {}
        self._uses: list[Use] = []
        self._step, self._seconds, self._since = 0, 0.0, time.monotonic()
        self._lines, self._bytes = hashlib.sha256(), 0  # of the metrics file
        folder.path.mkdir(parents=True, exist_ok=True)

    def resume(self, learner: Learner, *also: Stateful) -> int:
        """Load the last checkpoint, if there is one; returns the step to resume from.

        Raises:
            FileChanged: it is not what the ledger records.
        """
        self._folder.recover()
        progress = self._folder.progress()
        self._since = time.monotonic()
        self._remove_shards(after=progress.step if progress else 0)
        if progress is None:
            self._folder.metrics_file.unlink(missing_ok=True)
            return 0
        root = self._ledger.path.parent
        known = RecordedFiles.of(root, self._ledger.records)
        known.require(self._folder.checkpoint)
        learner.load(self._folder.checkpoint)
        for number, stateful in enumerate(also):
            stateful.load(state_folder(self._folder.checkpoint, number))
        self._step, self._seconds = progress.step, progress.seconds
        metrics = self._folder.metrics_file
        if (entry := known.entries.get(metrics.relative_to(root).as_posix())) is not None:
            self._cut_metrics(entry)
        return progress.step

    def metrics(self) -> list[Mapping[str, float]]:
        """The metrics of every step so far, in order."""
        return self._folder.metrics()

    def record(self, step: int, admission: Admission, metrics: Mapping[str, float]) -> None:
        """Record one step. Metrics are written at once, the rest at the next commit."""
        for group in admission.kept:
            self._remember(group, step=step, role=UseRole.TRAIN, reason=None)
        for group in admission.stale:
            self._remember(group, step=step, role=UseRole.DISCARDED, reason="stale")
        for reason, groups in admission.discarded.items():
            for group in groups:
                self._remember(group, step=step, role=UseRole.DISCARDED, reason=str(reason))
        line = (json.dumps({"step": step, **metrics}) + "\n").encode()
        path = self._folder.metrics_file
        with writing(path), path.open("ab") as file:
            file.write(line)
        self._lines.update(line)
        self._bytes += len(line)

    def commit(self, step: int, learner: Learner, *also: Stateful) -> None:
        """Make everything up to ``step`` durable."""
        self._ledger.begin()  # else its first row would come between those of the commit
        files = self._folder.shard_files(step)
        digests = [
            write_trajectories(files[0], list(self._trajectories.values())),
            write_uses(files[1], self._uses),
        ]
        shard: dict[str, object] = {
            "stage": self._stage,
            "files": plain_files(self._ledger.path.parent, {f: entry_at(f) for f in files}),
            "rows": len(self._uses),
            "discarded": sum(u.role is UseRole.DISCARDED for u in self._uses),
            "completion_tokens": sum(u.completion_tokens for u in self._uses),
        }
        now = time.monotonic()
        seconds = self._seconds + now - self._since
        update: dict[str, object] = {
            "stage": self._stage,
            "identity": self._identity,
            "steps": [self._step, step],
            "shards": digests,
            "seconds": round(seconds - self._seconds, 3),
            **self._facts,
        }
        progress = StageProgress(
            step=step,
            seconds=seconds,
            rows=[(RecordKind.SHARD, shard), (RecordKind.UPDATE, update)],
            after=self._ledger.num_records,
            head=self._ledger.head,
        )
        self._sync_metrics()
        grown = FileEntry(bytes=self._bytes, digest=self._lines.hexdigest(), grows=True)
        with self._folder.next_checkpoint(progress, metrics=grown) as partial:
            learner.save(partial)
            for number, stateful in enumerate(also):
                own = state_folder(partial, number)
                own.mkdir()
                stateful.save(own)
        self._step, self._seconds, self._since = step, seconds, now
        self._trajectories, self._uses = {}, []

    def _remove_shards(self, *, after: int) -> None:
        """Delete shards of a checkpoint that was not written."""
        for shard in self._folder.shards_after(after):
            shard.unlink()

    def _sync_metrics(self) -> None:
        """Flush the metrics: lines of committed steps must survive a power cut."""
        path = self._folder.metrics_file
        with writing(path), path.open("rb") as file:
            os.fsync(file.fileno())

    def _cut_metrics(self, entry: FileEntry) -> None:
        """Delete lines of steps after the checkpoint: these steps run again."""
        content = self._folder.metrics_file.read_bytes()[: entry.bytes]
        self._folder.write_metrics(content)
        self._lines, self._bytes = hashlib.sha256(content), len(content)

    def _remember(self, group: Group, *, step: int, role: UseRole, reason: str | None) -> None:
        for member in group.members:
            use = _use(member, stage=self._stage, step=step, role=role, reason=reason)
            self._trajectories.setdefault(use.trajectory, member.trajectory)
            self._uses.append(use)


def state_folder(checkpoint: Path, number: int) -> Path:
    """Where a stateful part of a stage saves: a folder of its own, whatever it calls its files."""
    return checkpoint / f"part-{number}"


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
