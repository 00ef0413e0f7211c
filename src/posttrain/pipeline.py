"""Running a recipe: measure, intervene, measure again, decide.

base ──measure──▶ stage ──export──▶ measure ──gates──▶ stage ──▶ … ──▶ result
                    └─ a finished stage with the same identity is not run again

OUT/
  recipe.json                 the resolved recipe
  ledger.jsonl                what happened, hash-chained
  stages/<name>-<id>/         one folder per stage (see journal.py), model/ when finished
  measurements/<policy>.json  one file per measured policy
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import final

import msgspec

from posttrain import config
from posttrain.build import Workshop
from posttrain.errors import ResumeRefused, RunError
from posttrain.events import (
    GateDecided,
    Measured,
    Note,
    Observer,
    StageStarted,
    ignore,
)
from posttrain.files import atomic_folder, folder_lock, hash_file, hash_folder, write_atomic
from posttrain.gates import decide
from posttrain.journal import Journal, read_progress
from posttrain.ledger import Ledger, RecordKind, read
from posttrain.plan import Plan, PlannedStage, make_plan
from posttrain.probes.bootstrap import Interval
from posttrain.probes.measure import measure
from posttrain.probes.measurement import Measurement
from posttrain.probes.passk import pass_interval
from posttrain.protocols import Engine, Policy
from posttrain.recipe import Recipe
from posttrain.sources.dataset import DatasetSource
from posttrain.stage import Interrupted, run_stage
from posttrain.task import TaskSet
from posttrain.tasks import build_taskset


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """Written last into a stage's folder: the stage is finished."""

    steps: int
    seconds: float
    digest: str  # of the exported model folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    out: Path
    finished: tuple[str, ...]  # stages, in order
    stopped_by: str | None = None  # the gate that stopped it, in words


def run(
    recipe: Recipe,
    *,
    out: Path,
    root: Path,
    engine: Engine,
    observe: Observer = ignore,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run a recipe, or go on with it. Running a finished recipe again does nothing.

    Args:
        recipe: what to do.
        out: the run folder; made if missing.
        root: folder that the recipe's paths are relative to.
        engine: makes policies and learners.
        observe: told about everything that happens.
        stop: asked between draws; True commits and raises.

    Raises:
        ResumeRefused: a started stage would now mean something else.
        RunLocked: another process works in ``out``.
        Interrupted: ``stop`` said so. Run again to go on.
        PosttrainError: any other error of the tree; what was committed stays.
    """
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        return _Run.open(recipe, out, root, engine, observe, stop).go()


def measure_model(
    recipe: Recipe, *, root: Path, engine: Engine, observe: Observer = ignore
) -> Measurement:
    """Measure the recipe's model on its task sets, without a run folder.

    Args:
        recipe: its stages are ignored.
        root: folder that the recipe's paths are relative to.
        engine: makes the policy.
        observe: told about progress.
    """
    policy = engine.policy(model_path(recipe.model, root))
    tasksets = [
        build_taskset(n, recipe.tasks[n], root=root, chat=policy.renderer.has_template)
        for n in recipe.measured_tasks
    ]
    return measure(
        policy.producer.name,
        policy,
        tasksets,
        spec=recipe.measure,
        protocol=protocol_of(recipe, tasksets),
        observe=observe,
    )


@final
@dataclass(slots=True, eq=False)
class _Run:
    """One sitting of a run."""

    plan: Plan
    out: Path
    engine: Engine
    observe: Observer
    stop: Callable[[], bool]
    ledger: Ledger
    base: Policy
    tasksets: Mapping[str, TaskSet]
    policies: dict[str, Policy] = field(default_factory=dict)
    measured: dict[str, Measurement] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        out: Path,
        root: Path,
        engine: Engine,
        observe: Observer,
        stop: Callable[[], bool],
    ) -> _Run:
        recipe = config.checked(recipe)
        observe(Note(text=f"loading {recipe.model}"))
        base = engine.policy(model_path(recipe.model, root))
        plan = make_plan(recipe, root=root, base=base.producer.digest or recipe.model)
        _refuse_changes(plan, out)
        write_atomic(out / "recipe.json", msgspec.json.format(msgspec.json.encode(recipe)))
        chat = base.renderer.has_template
        tasksets = {
            name: build_taskset(name, spec, root=root, chat=chat)
            for name, spec in recipe.tasks.items()
        }
        ledger = Ledger.open(out / "ledger.jsonl")
        run = cls(plan, out, engine, observe, stop, ledger, base, tasksets)
        run._record_start()
        return run

    # --- the order of things -----------------------------------------------------------------

    def go(self) -> Outcome:
        """Measure the base, then every stage in turn, with its measurement and gates."""
        self.policies["base"] = self.base
        self._measure("base", self.base)
        finished: list[str] = []
        for planned in self.plan.stages:
            self._stage(planned)
            finished.append(planned.spec.name)
            name = planned.spec.name
            self._measure(name, self.policy(name))
            if words := self._gates(planned):
                return Outcome(out=self.out, finished=tuple(finished), stopped_by=words)
        return Outcome(out=self.out, finished=tuple(finished))

    def policy(self, ref: str) -> Policy:
        """The frozen policy behind a reference, loaded once."""
        if ref not in self.policies:
            if ref.startswith("path:"):
                folder = model_path(ref.removeprefix("path:"), self.plan.root)
            else:
                folder = str(self._folder(self.plan.stage(ref)) / "model")
            self.policies[ref] = self.engine.policy(folder)
        return self.policies[ref]

    # --- a stage -----------------------------------------------------------------------------

    def _folder(self, planned: PlannedStage) -> Path:
        return self.out / "stages" / planned.folder

    def _stage(self, planned: PlannedStage) -> None:
        spec, folder = planned.spec, self._folder(planned)
        done = read_done(folder)
        if done is not None:
            self._started(planned, step=done.steps, steps=done.steps, finished=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        about = {"name": spec.name, "identity": planned.identity, "inputs": planned.inputs}
        write_atomic(folder / "stage.json", msgspec.json.format(msgspec.json.encode(about)))
        workshop = Workshop(
            root=self.plan.root,
            seed=self.plan.recipe.seed,
            tasksets=self.tasksets,
            policy=self.policy,
        )
        learner = self.engine.learner(
            self._init_folder(planned),
            name=f"{self.plan.recipe.name}/{spec.name}",
            optimizer=spec.optimizer,
            lora=spec.lora,
            seed=self.plan.recipe.seed,
        )
        parts = workshop.parts(planned, learner)
        rows = None
        if isinstance(parts.source, DatasetSource):
            rows = self._record_dataset(parts.source)
        steps = planned.steps(rows)
        progress = read_progress(folder)
        self._started(planned, step=progress.step if progress else 0, steps=steps)
        journal = Journal(
            folder,
            ledger=self.ledger,
            stage=spec.name,
            identity=planned.identity,
            facts={
                "objective": [msgspec.to_builtins(t) for t in parts.terms],
                "policy_in": planned.inputs["init"],
            },
        )
        run_stage(spec, parts, steps=steps, journal=journal, observe=self.observe, stop=self.stop)
        with atomic_folder(folder / "model") as partial:
            learner.export(partial)
        self._finish(planned, steps=steps)

    def _finish(self, planned: PlannedStage, *, steps: int) -> None:
        folder = self._folder(planned)
        digest = hash_folder(folder / "model")
        progress = read_progress(folder)
        seconds = progress.seconds if progress else 0.0
        self.ledger.append(
            RecordKind.CHECKPOINT,
            {
                "digest": digest,
                "path": str((folder / "model").relative_to(self.out)),
                "parents": [planned.inputs["init"]],
                "name": planned.spec.name,
                "identity": planned.identity,
            },
        )
        done = Done(steps=steps, seconds=seconds, digest=digest)
        write_atomic(folder / "done.json", msgspec.json.encode(done))

    def _init_folder(self, planned: PlannedStage) -> str:
        if planned.init == "base":
            return model_path(self.plan.recipe.model, self.plan.root)
        if planned.init.startswith("path:"):
            return model_path(planned.init.removeprefix("path:"), self.plan.root)
        return str(self._folder(self.plan.stage(planned.init)) / "model")

    def _started(
        self, planned: PlannedStage, *, step: int, steps: int, finished: bool = False
    ) -> None:
        self.observe(
            StageStarted(
                stage=planned.spec.name,
                method=str(planned.spec.method.__struct_config__.tag),
                provenance=planned.provenance,
                step=step,
                steps=steps,
                finished=finished,
            )
        )

    # --- measuring and deciding --------------------------------------------------------------

    def _measure(self, name: str, policy: Policy) -> None:
        spec = self.plan.recipe.measure
        path = self.out / "measurements" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        tasksets = [self.tasksets[t] for t in self.plan.recipe.measured_tasks]
        cached = None
        if path.is_file():
            cached = Measurement.from_json(path.read_text(encoding="utf-8"))
            protocol = protocol_of(self.plan.recipe, tasksets)
            if (cached.digest, cached.protocol) != (policy.producer.digest, protocol):
                cached = None
        result = cached or measure(
            name,
            policy,
            tasksets,
            spec=spec,
            base=self.base if name != "base" else None,
            protocol=protocol_of(self.plan.recipe, tasksets),
            observe=self.observe,
            stop=self.stop,
        )
        if cached is None:
            write_atomic(path, result.to_json())
            self._record_measurement(result, path)
        self.measured[name] = result
        first = {t.taskset: pass_interval(t, 1, confidence=spec.confidence) for t in result.tasks}
        self.observe(
            Measured(
                policy=name,
                pass_at_1={n: (i.value, i.low, i.high) for n, i in first.items()},
                cached=cached is not None,
            )
        )

    def _gates(self, planned: PlannedStage) -> str | None:
        """Decide the stage's gates; returns words when one stops the run."""
        for gate in planned.spec.gates:
            decision = decide(
                gate,
                base=self.measured["base"].task(gate.task),
                now=self.measured[planned.spec.name].task(gate.task),
                confidence=self.plan.recipe.measure.confidence,
            )
            body = {
                "stage": planned.spec.name,
                "gate": msgspec.to_builtins(gate),
                "passed": decision.passed,
                "words": decision.words,
            }
            if not self._has(RecordKind.GATE, body):
                self.ledger.append(RecordKind.GATE, body)
            self.observe(
                GateDecided(stage=planned.spec.name, passed=decision.passed, words=decision.words)
            )
            if not decision.passed and gate.otherwise == "stop":
                return decision.words
        return None

    # --- ledger rows -------------------------------------------------------------------------

    def _record_start(self) -> None:
        recipe = self.plan.recipe
        libraries = ("posttrain", "torch", "transformers", "numpy")
        self.ledger.append(
            RecordKind.RUN,
            {
                "recipe": config.digest(recipe),
                "name": recipe.name,
                "seed": recipe.seed,
                "python": platform.python_version(),
                "libraries": {name: version(name) for name in libraries},
                "machine": f"{platform.system()} {platform.machine()}",
                "command": sys.argv[:1],
            },
        )
        model = {"digest": self.base.producer.digest, "name": recipe.model, "role": "base"}
        if not self._has(RecordKind.MODEL, model):
            self.ledger.append(RecordKind.MODEL, model)

    def _record_dataset(self, source: DatasetSource) -> int:
        """One ``source`` row per data set and content; returns its number of rows."""
        body = {
            "name": source.name,
            "category": source.producer.kind,
            "digest": source.digest,
            "licence": source.licence,
            "rows": source.num_groups,
            "skipped": source.skipped,
        }
        if not self._has(RecordKind.SOURCE, body):
            self.ledger.append(RecordKind.SOURCE, body)
        return source.num_groups

    def _record_measurement(self, result: Measurement, path: Path) -> None:
        confidence = self.plan.recipe.measure.confidence
        for task in result.tasks:
            first: Interval = pass_interval(task, 1, confidence=confidence)
            self.ledger.append(
                RecordKind.EVAL,
                {
                    "checkpoint": result.digest,
                    "suite": task.taskset,
                    "metric": "pass@1",
                    "value": first.value,
                    "ci": [first.low, first.high],
                    "confidence": confidence,
                    "prompts": len(task.prompts),
                    "n": task.num_samples,
                    "seed": self.plan.recipe.measure.seed,
                    "file": hash_file(path),
                },
            )

    def _has(self, kind: RecordKind, body: Mapping[str, object]) -> bool:
        same = msgspec.json.decode(msgspec.json.encode(body))
        return any(r.kind is kind and dict(r.body) == same for r in read(self.ledger.path))


def protocol_of(recipe: Recipe, tasksets: list[TaskSet]) -> str:
    """Digest of everything that must be equal for two measurements to be comparable."""
    keys = {t.name: [task.key for task in t.held_out] for t in tasksets}
    spec = msgspec.to_builtins(recipe.measure)
    del spec["epsilon"], spec["confidence"]  # how counts are read, not how they are taken
    return config.digest([spec, keys])


def model_path(name: str, root: Path) -> str:
    """A folder relative to the recipe when there is one, else the name as a hub id."""
    return str(root / name) if (root / name).exists() else name


def read_done(folder: Path) -> Done | None:
    """The finishing mark of a stage, or None.

    Raises:
        RunError: the stage finished, and its model was removed.
    """
    path = folder / "done.json"
    if not path.is_file():
        return None
    if not (folder / "model").is_dir():
        raise RunError(
            f"{folder} is finished, and its model folder is gone",
            expected=f"{folder / 'model'}",
            fix=f"put it back, or delete {path} to export again from the last checkpoint",
        )
    return msgspec.json.decode(path.read_bytes(), type=Done)


def _refuse_changes(plan: Plan, out: Path) -> None:
    """Refuse to go on when a stage that has started would now mean something else.

    Raises:
        ResumeRefused: lists what changed.
    """
    for planned in plan.stages:
        for folder in sorted((out / "stages").glob(f"{planned.spec.name}-*")):
            about = folder / "stage.json"
            if folder.name == planned.folder or not about.is_file():
                continue
            recorded = msgspec.json.decode(about.read_bytes())
            if recorded["name"] != planned.spec.name:
                continue
            now = msgspec.json.decode(msgspec.json.encode(planned.inputs))
            changed = config.differences(recorded["inputs"], now)
            raise ResumeRefused(
                f"stage {planned.spec.name} has started in {out} and would now be another: "
                + "; ".join(changed[:6]),
                expected="the recipe and data that the stage started with",
                fix=f"undo the change, choose another --out, or delete {folder} to start it again",
            )


__all__ = ["Done", "Interrupted", "Outcome", "model_path", "protocol_of", "read_done", "run"]
