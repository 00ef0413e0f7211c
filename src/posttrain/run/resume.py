"""What earlier sittings of a run left in its folder, and whether one may go on from there."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from posttrain.core import config
from posttrain.core.errors import DataError, ResumeRefused
from posttrain.measure.measurement import Measurement
from posttrain.run.journal import About, has_started, read_about
from posttrain.run.plan import Plan, PlannedStage


def read_measurement(path: Path) -> Measurement | None:
    """What was measured before. A damaged file is none: measuring again gives the same."""
    if not path.is_file():
        return None
    try:
        return Measurement.from_json(path.read_text(encoding="utf-8"))
    except (DataError, UnicodeDecodeError):
        return None


def remove_partials(out: Path) -> None:
    """Remove files that a kill left half written; their names end in random digits."""
    for folder in (out, out / "measurements", *(out / "stages").glob("**")):
        for file in folder.glob(".*.partial"):
            if file.is_file():  # folders are settled by recover_folder, which may need them
                file.unlink()


def refuse_changes(plan: Plan, out: Path) -> list[Path]:
    """Refuse to go on when a stage that has started would now mean something else.

    A stage without a checkpoint has not started: nothing of it could be lost.

    Returns:
        Folders of such stages, which the change makes useless.

    Raises:
        ResumeRefused: lists what changed.
    """
    abandoned: list[Path] = []
    started: list[tuple[PlannedStage, Path, About]] = []
    for planned in plan.stages:
        for folder in sorted((out / "stages").glob(f"{planned.spec.name}-*")):
            about = read_about(folder)
            # The pattern also finds `sft-long` for `sft`.
            if about is None or about.name != planned.spec.name:
                continue
            if about.identity == planned.identity:
                continue
            if has_started(folder):
                started.append((planned, folder, about))
            else:
                abandoned.append(folder)
    if started:
        planned, _, about = started[0]
        others = "" if len(started) == 1 else " (and what builds on it)"
        raise ResumeRefused(
            f"stage {planned.spec.name} has started in {out} and would now be another: "
            + "; ".join(_changes(planned, about)[:6]),
            expected="the recipe and data that the stage started with",
            fix=f"undo the change; or choose another --out; or start the stage{others} again: "
            + "rm -r "
            + " ".join(str(folder) for _, folder, _ in started),
        )
    return abandoned


def _changes(planned: PlannedStage, about: About) -> list[str]:
    """What differs from the stage that started, digests cut to what a person can compare."""
    now = msgspec.json.decode(msgspec.json.encode(planned.inputs))
    lines = []
    for line in config.differences(about.inputs, now):
        short, digests = re.subn(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1…", line)
        lines.append(f"{short} (the content changed)" if digests == 2 else short)
    return lines
