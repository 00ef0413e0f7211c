"""From a run folder to the content of its report.

RunHistory ──statistics, tokens as text──▶ RunReport ──render──▶ report.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from posttrain.chat.tokenizer import token_texts
from posttrain.core.errors import DataError, LedgerBroken, RunError
from posttrain.core.trajectory import Trajectory
from posttrain.measure.measurement import Measurement
from posttrain.measure.profile import profile
from posttrain.measure.spec import Measure
from posttrain.pages.template import Section
from posttrain.report.render import render
from posttrain.report.view import PolicyReport, RunReport, Sample, StageReport
from posttrain.run.folder import RunFolder
from posttrain.run.history import RunHistory, read_history
from posttrain.run.ledger import Record, Verified, verify
from posttrain.run.plan import PlannedStage
from posttrain.run.store import read_trajectories, read_uses

SAMPLES_PER_STAGE = 4

SectionOf = Callable[[RunFolder], Section | None]
"""Another unit's section on a run folder; None for a folder that it does not apply to."""


def write_report(out: Path, *, sections: Sequence[SectionOf] = ()) -> Path:
    """Write ``out/report.html``; returns its path.

    Args:
        out: the run folder.
        sections: functions that each give a section of the page, after the summary.

    Raises:
        ConfigError: ``out`` is not a run folder.
    """
    folder, report, added = RunFolder(out), load_report(out), list[Section]()
    for of in sections:
        try:
            section = of(folder)
        except (DataError, RunError) as error:
            report = replace(
                report, alarms=(*report.alarms, f"a section is left out: {error.found}")
            )
            continue
        added += [] if section is None else [section]
    return folder.write_report(render(report, sections=added))


def load_report(out: Path) -> RunReport:
    """Everything the report of a run folder shows, finished or not.

    Files that are not what the ledger records are left out, and named in ``alarms``.
    """
    run = read_history(out, lenient=True)
    return RunReport(
        recipe=run.recipe,
        machine=_machine(run.began),
        began=run.began,
        ledger=_verified(run.folder.ledger_file),
        alarms=run.alarms,
        stages=tuple(_stage(run, planned) for planned in run.stages),
        policies=tuple(_policy(m, run.recipe.measure) for m in run.measurements),
        whole=run.whole(),
        retained=run.retained(),
        tokens_measured=sum(int(t.lengths.sum()) for m in run.measurements for t in m.tasks),
        proofs=run.proofs,
    )


def _machine(began: Record | None) -> str:
    """The machine of the run's latest process, which need not be this one."""
    body = began.body if began else {}
    found = [str(body[k]) for k in ("machine", "python") if k in body]
    return ", Python ".join(found) or "not recorded"


def _stage(run: RunHistory, planned: PlannedStage) -> StageReport:
    return StageReport(
        record=run.record(planned),
        roles=run.roles(planned),
        change=next((c for c in run.changes if c.after == planned.spec.name), None),
        samples=tuple(_samples(run, planned)),
    )


def _policy(measurement: Measurement, spec: Measure) -> PolicyReport:
    return PolicyReport(
        name=measurement.policy,
        tasks=tuple(
            profile(task, epsilon=spec.threshold, confidence=spec.confidence)
            for task in measurement.tasks
        ),
    )


def _samples(run: RunHistory, planned: PlannedStage) -> Iterator[Sample]:
    """Trajectories of the last shard: one of each reward where there are several."""
    stage = run.stage_folder(planned)
    shards, uses = map(run.readable, (stage.trajectory_files(), stage.use_files()))
    models = [run.stage_folder(s).model for s in run.stages]
    # All stages share one tokenizer; before the first export there is none in the run folder.
    folder = next((m for m in models if m.is_dir()), None)
    if not shards or not uses or folder is None:
        return
    text_of = token_texts(folder)
    rewards = {u.trajectory: u.reward for u in read_uses(uses[-1])}
    chosen: dict[tuple[str, float | None], Trajectory] = {}
    for trajectory in read_trajectories(shards[-1]):
        kind = (trajectory.task.rpartition("/")[0], rewards.get(trajectory.id))
        chosen.setdefault(kind, trajectory)
    for (_, reward), trajectory in list(chosen.items())[:SAMPLES_PER_STAGE]:
        texts = tuple(text_of(int(token)) for token in trajectory.tokens)
        yield Sample(trajectory=trajectory, texts=texts, reward=reward)


def _verified(path: Path) -> Verified | None:
    try:
        return verify(path)
    except LedgerBroken:
        return None
