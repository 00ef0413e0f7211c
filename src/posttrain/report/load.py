"""From a run folder to what its report shows."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.chat import ChatRenderer
from posttrain.core import config
from posttrain.core.clock import GROUPS, seconds_in
from posttrain.core.errors import LedgerBroken
from posttrain.core.monitors import alarms
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column, Trajectory
from posttrain.measure.attribution import (
    Attribution,
    ChangeKind,
    PolicyChange,
    attribute_changes,
    role_in_run,
)
from posttrain.measure.bootstrap import Interval, student_quantile
from posttrain.measure.distance import kl_base_column
from posttrain.measure.measurement import Measurement
from posttrain.measure.passk import curve, pass_interval
from posttrain.measure.support import labels
from posttrain.recipe import Recipe
from posttrain.report.render import render
from posttrain.report.retained import retained
from posttrain.report.rounds import treatment
from posttrain.report.view import (
    UNMEASURED,
    Account,
    Change,
    Comparison,
    CurvePoint,
    Effect,
    Estimate,
    GateView,
    Outcome,
    Piece,
    PolicyTask,
    PolicyView,
    PromptSupport,
    Regime,
    RetentionView,
    RunView,
    Sample,
    Seal,
    Series,
    StageView,
    Support,
    SupportMap,
    TaskEffect,
    TimePart,
    Token,
    TokenCount,
    Totals,
)
from posttrain.run.folder import RunFolder, StageFolder
from posttrain.run.ledger import GENESIS, Record, RecordKind, verify
from posttrain.run.plan import PlannedStage
from posttrain.run.store import UseRole, read_trajectories, read_uses, tokens_by_producer

CURVES = ("loss", "reward", "entropy", "kl", "grad_norm", "zero_variance", "accuracy")
SAMPLES_PER_STAGE = 4
OUTCOMES = {
    "stop": Outcome.STOPPED,
    "warn": Outcome.WARNED,
    "roll_back": Outcome.ROLLED_BACK,
    "branch": Outcome.BRANCHED,
}
"""What a gate that did not pass did."""


def write_report(out: Path) -> Path:
    """Write ``out/report.html``; returns its path.

    Raises:
        ConfigError: ``out`` is not a run folder.
    """
    return RunFolder(out).write_report(render(load_view(out)))


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A run folder, read."""

    out: RunFolder
    recipe: Recipe
    measurements: tuple[Measurement, ...]  # base first
    stages: tuple[PlannedStage, ...]  # those that have started
    records: tuple[Record, ...]

    def folder(self, planned: PlannedStage) -> StageFolder:
        return self.out.stage(planned.spec.name, planned.identity)


def load_view(out: Path) -> RunView:
    """Everything the report of a run folder shows, finished or not."""
    run = _open(RunFolder(out))
    spec = run.recipe.measure
    measured, changes = {m.policy: m for m in run.measurements}, _changes(run)
    last = measured[_final(run)] if measured else None
    whole = _compare(run, measured["base"], last) if changes and last else None
    accounts = [a for s in run.stages for a in _accounts(run, s)]
    newest = next((r for r in reversed(run.records) if r.kind is RecordKind.RUN), None)
    return RunView(
        name=run.recipe.name,
        created=newest.time if newest else "",
        base_model=Path(run.recipe.model).name,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        totals=_totals(run, accounts),
        ledger=_seal(run.out),
        recipe_digest=config.digest(run.recipe),
        versions=_versions(newest),
        seeds=(run.recipe.seed,),
        protocol=(
            f"{spec.samples} samples per prompt at temperature {spec.sampling.temperature:g}, "
            f"seed {spec.seed}, at most {spec.max_new_tokens} tokens; a prompt is in reach from a "
            f"success rate of {spec.threshold:.3g}; {spec.confidence:.0%} intervals over prompts"
        ),
        unit="share of samples on held-out prompts that succeed (pass@1)",
        stages=tuple(_stage(run, s) for s in run.stages),
        policies=tuple(_policy(m, run.recipe) for m in run.measurements),
        comparisons=(
            *(_comparison(c, stage=c.after) for c in changes),
            *((_comparison(whole, stage=None),) if whole else ()),
        ),
        support=tuple(_support(run)),
        accounts=tuple(accounts),
        samples=tuple(sample for s in run.stages for sample in _samples(run, s)),
        warnings=tuple(_warnings(run, whole)),
        retention=_retained(run, changes),
        treatment=treatment(run.out),
    )


def load_retention(out: Path) -> tuple[RetentionView, ...]:
    """What later stages of a run left of what each task set had; nothing for a single stage."""
    run = _open(RunFolder(out))
    return _retained(run, _changes(run)) if len(run.measurements) > 2 else ()


def _retained(run: _Run, changes: Sequence[PolicyChange]) -> tuple[RetentionView, ...]:
    """Over the policies up to the final one; a stage that was rolled back left nothing behind."""
    undone = {s.spec.name for s in run.stages
              if any(g.outcome is Outcome.ROLLED_BACK for g in _gates(run, s))}  # fmt: skip
    chain = [m for m in run.measurements if m.policy not in undone]
    kept = [c for c in changes if c.after not in undone]
    return retained(chain, kept, spec=run.recipe.measure)


def _changes(run: _Run) -> list[PolicyChange]:
    """What each measured stage changed, from the policy it started from."""
    measured = {m.policy: m for m in run.measurements}
    return [
        _compare(run, measured[s.init], measured[s.spec.name])
        for s in run.stages
        if s.init in measured and s.spec.name in measured
    ]


def _open(out: RunFolder) -> _Run:
    recipe = out.recipe()
    names, measured = ["base", *(s.name for s in recipe.stages)], out.measured()
    measurements = tuple(out.measurement(n) for n in names if n in measured)
    return _Run(out, recipe, measurements, tuple(_started(out, recipe)), tuple(out.records()))


def _started(out: RunFolder, recipe: Recipe) -> Iterable[PlannedStage]:
    """Stages with a folder. What they were is read from the folder: data may have moved since."""
    for spec in recipe.stages:
        for record in filter(None, (stage.record() for stage in out.stages(spec.name))):
            yield PlannedStage(
                spec=spec,
                composition=spec.method.compose(),
                init=record.init,
                inputs=record.inputs,
                identity=record.identity,
            )


def _final(run: _Run) -> str:
    """The policy that the run has come to: its last measured stage, or what that one started
    from when a gate rolled it back."""
    measured = {m.policy for m in run.measurements}
    done = [s for s in run.stages if s.spec.name in measured]
    if not done:
        return "base"
    back = any(g.outcome is Outcome.ROLLED_BACK for g in _gates(run, done[-1]))
    return done[-1].init if back else done[-1].spec.name


def _compare(run: _Run, before: Measurement, after: Measurement) -> PolicyChange:
    spec = run.recipe.measure
    return attribute_changes(before, after, epsilon=spec.threshold, confidence=spec.confidence)


# --- stages ----------------------------------------------------------------------------------


def _effects(run: _Run, stage: PlannedStage) -> Iterable[TaskEffect]:
    """What the stage did per task, in the light of every policy measured before it."""
    names = [m.policy for m in run.measurements]
    if stage.spec.name not in names or stage.init not in names:
        return
    at, start = names.index(stage.spec.name), names.index(stage.init)
    before = [m for m in run.measurements[:at] if m.policy != stage.init]
    changes = [_compare(run, m, run.measurements[at]) for m in (*before, run.measurements[start])]
    for tasks in zip(*(c.tasks for c in changes), strict=True):
        *earlier, last = tasks
        yield TaskEffect(task=last.task, effect=Effect(str(role_in_run(last, earlier))))


def _stage(run: _Run, planned: PlannedStage) -> StageView:
    folder, spec = run.folder(planned), planned.spec
    done = folder.result()
    lines = folder.metrics()
    teachers = [
        ref
        for signal in planned.composition.signals
        if Column.TEACHER_LOGPROBS in signal.provides
        for ref in dict.fromkeys(signal.references())
    ]
    return StageView(
        name=spec.name,
        method=str(spec.method.__struct_config__.tag),
        regime=Regime.ON if planned.provenance.startswith("on-policy") else Regime.OFF,
        provenance=planned.provenance.partition(": ")[2],
        interface=spec.method.interface,
        steps=len(lines),
        seconds=done.seconds if done else _elapsed(lines),
        intends=spec.intends,
        effects=tuple(_effects(run, planned)),
        teachers=tuple(teachers),
        tokens=tuple(
            TokenCount(
                kind=t.kind,
                name=t.producer,
                tokens=t.completion_tokens,
                discarded=t.role is UseRole.DISCARDED,
            )
            for t in tokens_by_producer(folder.use_files())
        ),
        series=tuple(_series(lines)),
        gates=tuple(_gates(run, planned)),
        times=tuple(_times(lines)),
    )


def _elapsed(lines: Sequence[Mapping[str, float]]) -> float:
    return sum(sum(seconds_in(line).values()) for line in lines)


def _times(lines: Sequence[Mapping[str, float]]) -> Iterable[TimePart]:
    """What the steps' time went into, in the order of the clock; parts that took none are out."""
    steps = [seconds_in(line) for line in lines]
    for group, names in GROUPS.items():
        for name in names:
            if seconds := sum(step.get(name, 0.0) for step in steps):
                yield TimePart(group=group, name=name, seconds=seconds)


def _series(lines: Sequence[Mapping[str, float]]) -> Iterable[Series]:
    """Curves worth showing; a term's own metrics carry its name before a slash."""
    found = list(dict.fromkeys(name for line in lines for name in line))
    for name in found:
        short = name.rpartition("/")[2]
        by_author = name.startswith("authors/") and short in found  # the same once more
        if short in CURVES and not by_author:
            points = tuple((int(x["step"]), x[name]) for x in lines if name in x)
            yield Series(name=short.replace("_", " "), points=points)


def _gates(run: _Run, planned: PlannedStage) -> Iterable[GateView]:
    """The last decision of each gate that the recipe still has, in the recipe's order."""
    latest = {
        config.digest(r.body["gate"]): r.body
        for r in run.records
        if r.kind is RecordKind.GATE and r.body["stage"] == planned.spec.name
    }
    for gate in planned.spec.gates:
        body = latest.get(config.digest(config.plain(gate)))
        if body is None:
            continue
        missed = OUTCOMES[gate.otherwise]
        yield GateView(
            outcome=Outcome.PASSED if body["passed"] else missed, words=str(body["words"])
        )


# --- what was measured -----------------------------------------------------------------------


def _estimate(interval: Interval | None) -> Estimate:
    if interval is None:
        return UNMEASURED
    return Estimate(value=interval.value, low=interval.low, high=interval.high)


def _policy(measurement: Measurement, recipe: Recipe) -> PolicyView:
    confidence = recipe.measure.confidence
    tasks = []
    for task in measurement.tasks:
        line = curve(task, confidence=confidence)
        points = zip(line.ks, line.value, line.low, line.high, strict=True)
        tasks.append(
            PolicyTask(
                task=task.taskset,
                num_prompts=len(task.prompts),
                num_samples=task.num_samples,
                pass_at_1=_estimate(pass_interval(task, 1, confidence=confidence)),
                curve=tuple(
                    CurvePoint(k=k, rate=Estimate(value=v, low=low, high=high))
                    for k, v, low, high in points
                ),
                kl_base=_mean(task.find(kl_base_column), confidence),
                entropy=_mean(task.nll, confidence),
                tokens=_mean(task.lengths, confidence),
            )
        )
    return PolicyView(name=measurement.policy, tasks=tuple(tasks))


def _mean(values: npt.NDArray[Any] | None, confidence: float) -> Estimate:
    """Mean of [P, n] values with Student's interval over prompts: they have no upper bound."""
    if values is None or len(values) < 2:
        return UNMEASURED if values is None else Estimate(value=float(values.mean()))
    per_prompt = values.mean(axis=1, dtype=np.float64)
    mean = float(per_prompt.mean())
    t = student_quantile((1 + confidence) / 2, degrees=len(per_prompt) - 1)
    half = t * float(per_prompt.std(ddof=1)) / math.sqrt(len(per_prompt))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def _comparison(change: PolicyChange, *, stage: str | None) -> Comparison:
    return Comparison(
        before=change.before,
        after=change.after,
        changes=tuple(_change(t) for t in change.tasks),
        stage=stage,
    )


def _change(task: Attribution) -> Change:
    parts = {p: _estimate(i) for p, i in task.parts.items()}
    return Change(
        task=task.task,
        reachable=parts[ChangeKind.NEWLY_REACHABLE],
        sharpened=parts[ChangeKind.SHARPENED],
        kept=parts[ChangeKind.KEPT],
        weakened=parts[ChangeKind.WEAKENED],
        lost=parts[ChangeKind.LOST],
        undetermined=parts[ChangeKind.UNDETERMINED],
        retention=_estimate(task.retention),
        before=_estimate(task.before),
        after=_estimate(task.after),
    )


def _support(run: _Run) -> Iterable[SupportMap]:
    spec = run.recipe.measure
    if not run.measurements:
        return
    for task in run.measurements[0].tasks:
        rows = [
            labels(m.task(task.taskset), epsilon=spec.threshold, confidence=spec.confidence)
            for m in run.measurements
        ]
        yield SupportMap(
            task=task.taskset,
            policies=tuple(m.policy for m in run.measurements),
            prompts=tuple(
                PromptSupport(prompt=key, labels=tuple(Support(str(r[i])) for r in rows))
                for i, key in enumerate(task.prompts)
            ),
        )


# --- tokens, samples, totals -----------------------------------------------------------------


def _accounts(run: _Run, planned: PlannedStage) -> Iterable[Account]:
    counts: dict[str, list[int]] = {}
    for row in tokens_by_producer(run.folder(planned).use_files()):
        both = counts.setdefault(row.kind, [0, 0])
        both[row.role is not UseRole.TRAIN] += row.completion_tokens
    for kind, (trained, discarded) in counts.items():
        yield Account(
            stage=planned.spec.name, kind=Kind(kind), trained=trained, discarded=discarded
        )


def _samples(run: _Run, planned: PlannedStage) -> Iterable[Sample]:
    """Trajectories of the last shard: one of each reward where there are several."""
    stage = run.folder(planned)
    shards, uses = stage.trajectory_files(), stage.use_files()
    models = [run.folder(s).model for s in run.stages]
    # All stages share one tokenizer; before the first export there is none in the run folder.
    folder = next((m for m in models if m.is_dir()), None)
    if not shards or folder is None:
        return
    renderer = ChatRenderer.from_folder(folder)
    rewards = {u.trajectory: u.reward for u in read_uses(uses[-1])}
    chosen: dict[tuple[str, float | None], Trajectory] = {}
    for trajectory in read_trajectories(shards[-1]):
        kind = (trajectory.task.rpartition("/")[0], rewards.get(trajectory.id))
        chosen.setdefault(kind, trajectory)
    for (_, reward), trajectory in list(chosen.items())[:SAMPLES_PER_STAGE]:
        yield Sample(
            task=trajectory.task,
            stage=planned.spec.name,
            pieces=tuple(_pieces(trajectory, renderer)),
            reward=reward,
        )


def _pieces(trajectory: Trajectory, renderer: ChatRenderer) -> Iterable[Piece]:
    start = 0
    for span in trajectory.spans:
        ids = trajectory.tokens[start : start + span.length]
        texts = [renderer.token_text(int(i)) for i in ids]
        known = [None] * len(texts) if span.logprobs is None else [float(x) for x in span.logprobs]
        tokens = [Token(text=t, logprob=x) for t, x in zip(texts, known, strict=True)]
        yield Piece(
            text="".join(texts),
            kind=span.producer.kind,
            producer=span.producer.name,
            role=span.role,
            tokens=tuple(tokens) if span.logprobs is not None else (),
        )
        start += span.length


def _totals(run: _Run, accounts: Sequence[Account]) -> Totals:
    sampled = sum(int(t.lengths.sum()) for m in run.measurements for t in m.tasks)
    live = sum(a.trained + a.discarded for a in accounts if a.kind in ("learner", "teacher"))
    seconds = [run.folder(s).result() for s in run.stages]
    return Totals(
        wall_seconds=sum(d.seconds for d in seconds if d),
        tokens_generated=sampled + live,
        tokens_trained=sum(a.trained for a in accounts),
    )


def _seal(out: RunFolder) -> Seal:
    try:
        return Seal(head=verify(out.ledger_file).head, verified=True)
    except LedgerBroken:
        return Seal(head=GENESIS, verified=False)


def _versions(record: Record | None) -> tuple[tuple[str, str], ...]:
    libraries = record.body["libraries"] if record else {}
    assert isinstance(libraries, Mapping)
    return tuple((str(k), str(v)) for k, v in libraries.items())


def _warnings(run: _Run, whole: PolicyChange | None) -> Iterable[str]:
    for planned in run.stages:
        lines = run.folder(planned).metrics()
        for alarm in alarms(planned.spec.monitors, lines):
            where = f"{planned.spec.name}, step {alarm.step + 1}"
            yield f"{where}: {alarm.words}. Try: {alarm.advice}"
        if idle := sum(line.get("tokens") == 0 for line in lines):
            yield (
                f"{planned.spec.name}: {idle} steps had nothing to learn from and changed "
                "nothing: every answer was filtered out or too old"
            )
    for task in whole.tasks if whole else ():
        unclear = max(task.undetermined_gain.value, task.undetermined_loss.value)
        if unclear > 0.05:
            yield (
                f"{task.task}: a change of {unclear:.2f} could not be attributed; more samples "
                "per prompt would decide it"
            )
