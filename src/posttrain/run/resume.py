"""Whether a run may resume from its folder."""

from __future__ import annotations

import re

import msgspec

from posttrain.core import config
from posttrain.core.errors import DataError, ResumeRefused
from posttrain.measure.measurement import Measurement
from posttrain.run.folder import RunFolder, RunWriter
from posttrain.run.plan import Plan, PlannedStage
from posttrain.run.stage_folder import StageRecord, StageWriter


def earlier_measurement(
    folder: RunFolder, policy: str, *, digest: str, protocol: str
) -> Measurement | None:
    """An earlier measurement of the same weights with the same protocol, or None.

    A damaged file gives None: measuring again gives the same result.
    """
    if policy not in folder.measured():
        return None
    try:
        known = folder.measurement(policy)
    except DataError:
        return None
    return known if (known.digest, known.protocol) == (digest, protocol) else None


def check_resumable(plan: Plan, folder: RunWriter) -> list[StageWriter]:
    """Check that the recipe and data of every started stage are unchanged.

    A stage without a checkpoint has not started: it has nothing to lose.

    Returns:
        Folders of stages that changed and had not started; they can be removed.

    Raises:
        ResumeRefused: a started stage changed; the message lists what.
    """
    useless: list[StageWriter] = []
    started: list[tuple[PlannedStage, StageWriter, StageRecord]] = []
    for planned in plan.stages:
        for stage in folder.stage_writers(planned.spec.name):
            record = stage.record()
            if record is None or record.identity == planned.identity:
                continue
            if stage.has_started():
                started.append((planned, stage, record))
            else:
                useless.append(stage)
    if started:
        planned, _, record = started[0]
        others = "" if len(started) == 1 else " (and what builds on it)"
        raise ResumeRefused(
            f"stage {planned.spec.name} has started in {folder.path} and would now be another: "
            + "; ".join(_changes(planned, record)[:6]),
            expected="the recipe and data that the stage started with",
            fix=f"undo the change; or choose another --out; or start the stage{others} again: "
            + "rm -r "
            + " ".join(str(stage.path) for _, stage, _ in started),
        )
    return useless


def _changes(planned: PlannedStage, record: StageRecord) -> list[str]:
    """What differs from the started stage, with digests shortened."""
    now = msgspec.json.decode(msgspec.json.encode(planned.inputs))
    lines = []
    for line in config.differences(record.inputs, now):
        short, digests = re.subn(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1…", line)
        lines.append(f"{short} (the content changed)" if digests == 2 else short)
    return lines
