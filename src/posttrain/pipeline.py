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

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import msgspec

from posttrain import config
from posttrain.build import Workshop
from posttrain.composition import Dataset, parts_of
from posttrain.errors import DataError, ResumeRefused
from posttrain.events import (
    GateDecided,
    Measured,
    Note,
    Observer,
    StageStarted,
    ignore,
)
from posttrain.files import (
    atomic_folder,
    folder_lock,
    hash_folder,
    recover_folder,
    write_atomic,
)
from posttrain.gates import decide
from posttrain.journal import (
    About,
    Done,
    Journal,
    has_started,
    read_about,
    read_done,
    read_progress,
)
from posttrain.ledger import Ledger
from posttrain.plan import (
    Plan,
    PlannedStage,
    make_plan,
    model_path,
    protocol_of,
    protocol_parts,
)
from posttrain.probes.measure import measure
from posttrain.probes.measurement import Measurement
from posttrain.probes.passk import pass_interval
from posttrain.protocols import Engine, Learner, Policy
from posttrain.recipe import Recipe
from posttrain.records import Records
from posttrain.sources.dataset import DatasetSource
from posttrain.sources.mix import MixSource
from posttrain.stage import Interrupted, Parts, run_stage
from posttrain.task import TaskSet
from posttrain.tasks import build_taskset


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
        protocol=protocol_of(recipe, tasksets, root=root),
        parts=protocol_parts(recipe, tasksets, root=root),
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
    records: Records
    tasksets: Mapping[str, TaskSet]
    protocol: str
    parts: Mapping[str, str]  # of the protocol
    policies: dict[str, Policy]
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
        """Check everything that can be checked before a weight moves; then touch the folder."""
        recipe = config.checked(recipe)
        observe(Note(text=f"loading {recipe.model}"))
        base = engine.policy(model_path(recipe.model, root))
        plan = make_plan(recipe, root=root, base=base.producer.digest or recipe.model)
        abandoned = _refuse_changes(plan, out)
        chat = base.renderer.has_template
        tasksets = {
            name: build_taskset(name, spec, root=root, chat=chat)
            for name, spec in recipe.tasks.items()
        }
        measured = [tasksets[t] for t in recipe.measured_tasks]
        protocol = protocol_of(recipe, measured, root=root)
        parts = protocol_parts(recipe, measured, root=root)
        ledger = Ledger.open(out / "ledger.jsonl")
        records = Records(ledger, recipe)
        run = cls(
            plan=plan,
            out=out,
            engine=engine,
            observe=observe,
            stop=stop,
            ledger=ledger,
            records=records,
            tasksets=tasksets,
            protocol=protocol,
            parts=parts,
            policies={"base": base},
        )
        run._check_data()
        for folder in abandoned:
            shutil.rmtree(folder)
        _remove_partials(out)
        write_atomic(out / "recipe.json", msgspec.json.format(msgspec.json.encode(recipe)))
        records.model(recipe.model, digest=base.producer.digest, role="base")
        return run

    # --- the order of things -----------------------------------------------------------------

    def go(self) -> Outcome:
        """Measure the base, then every stage in turn, with its measurement and gates."""
        base = self.policies["base"].producer
        self._measure("base", base.digest or base.name)
        finished: list[str] = []
        for number, planned in enumerate(self.plan.stages, start=1):
            done = self._stage(planned)
            finished.append(planned.spec.name)
            self._measure(planned.spec.name, done.digest)
            self._forget(later=self.plan.stages[number:])
            if words := self._gates(planned):
                return Outcome(out=self.out, finished=tuple(finished), stopped_by=words)
        return Outcome(out=self.out, finished=tuple(finished))

    def policy(self, ref: str) -> Policy:
        """The frozen policy behind a reference, loaded once."""
        if ref not in self.policies:
            self.policies[ref] = policy = self.engine.policy(self._model_folder(ref))
            if ref.startswith("path:"):
                name = ref.removeprefix("path:")
                self.records.model(name, digest=policy.producer.digest, role="outside")
        return self.policies[ref]

    def _forget(self, *, later: Sequence[PlannedStage]) -> None:
        """Let go of models that no later stage refers to. The base stays: KL is measured to it."""
        needed = {"base"}
        for planned in later:
            needed |= {planned.init if r == "input" else r for r in planned.references}
        for ref in set(self.policies) - needed:
            del self.policies[ref]

    def _model_folder(self, ref: str) -> str:
        """The folder or hub id of a policy that is not the live learner."""
        root = self.plan.root
        if ref == "base":
            return model_path(self.plan.recipe.model, root)
        if ref.startswith("path:"):
            return model_path(ref.removeprefix("path:"), root)
        return str(self._folder(self.plan.stage(ref)) / "model")

    # --- a stage -----------------------------------------------------------------------------

    def _folder(self, planned: PlannedStage) -> Path:
        return self.out / "stages" / planned.folder

    def _workshop(self) -> Workshop:
        return Workshop(
            root=self.plan.root,
            seed=self.plan.recipe.seed,
            tasksets=self.tasksets,
            policy=self.policy,
        )

    def _check_data(self) -> None:
        """Find a broken row now rather than after the stages before it were trained.

        Stages that descend from a model outside the recipe are checked when they begin: their
        tokenizer is not loaded yet.
        """
        workshop, known = self._workshop(), {"base"}
        for planned in self.plan.stages:
            if planned.init not in known:
                continue
            known.add(planned.spec.name)
            for part in parts_of(planned.composition.source):
                if isinstance(part, Dataset) and read_done(self._folder(planned)) is None:
                    workshop.dataset(part, self.policies["base"])

    def _stage(self, planned: PlannedStage) -> Done:
        """Take a stage to its end, from wherever it stands."""
        folder = self._folder(planned)
        done = read_done(folder)
        if done is not None:
            self._started(planned, step=done.steps, steps=done.steps, finished=True)
            return done
        self.records.began()
        about = {
            "name": planned.spec.name,
            "identity": planned.identity,
            "inputs": planned.inputs,
        }
        write_atomic(folder / "stage.json", msgspec.json.format(msgspec.json.encode(about)))
        steps = self._train(planned)
        progress = read_progress(folder)
        digest = hash_folder(folder / "model")
        path = str((folder / "model").relative_to(self.out))
        self.records.checkpoint(planned, digest=digest, path=path)
        done = Done(steps=steps, seconds=progress.seconds if progress else 0.0, digest=digest)
        write_atomic(folder / "done.json", msgspec.json.encode(done))
        return done

    def _train(self, planned: PlannedStage) -> int:
        """Every step that is left, then the export; returns the number of steps in all."""
        spec, folder = planned.spec, self._folder(planned)
        learner = self.engine.learner(
            self._model_folder(planned.init),
            name=f"{self.plan.recipe.name}/{spec.name}",
            optimizer=spec.optimizer,
            lora=spec.lora,
            seed=self.plan.recipe.seed,
            moving=planned.composition.moving,
        )
        parts = self._workshop().parts(planned, learner)
        rows = None
        if isinstance(parts.source, DatasetSource):
            rows = parts.source.num_groups
        sources = parts.source.parts if isinstance(parts.source, MixSource) else [parts.source]
        for source in sources:
            if isinstance(source, DatasetSource):
                self.records.dataset(source)
        steps = planned.steps(rows)
        journal = self._journal(planned, parts)
        progress = read_progress(folder)
        self._started(planned, step=progress.step if progress else 0, steps=steps)
        run_stage(spec, parts, steps=steps, journal=journal, observe=self.observe, stop=self.stop)
        self._export(learner, folder / "model")
        return steps

    def _journal(self, planned: PlannedStage, parts: Parts) -> Journal:
        return Journal(
            self._folder(planned),
            ledger=self.ledger,
            stage=planned.spec.name,
            identity=planned.identity,
            facts={
                "objective": [msgspec.to_builtins(t) for t in parts.terms],
                "policy_in": planned.inputs["init"],
            },
        )

    def _export(self, learner: Learner, model: Path) -> None:
        """Write the model, unless an earlier sitting got that far: the folder is whole or absent,
        and its name says of which stage it is."""
        recover_folder(model)
        if not model.is_dir():
            with atomic_folder(model) as partial:
                learner.export(partial)

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

    def _measure(self, name: str, digest: str) -> None:
        """Measure a policy, unless these very weights were measured in this very way before."""
        spec = self.plan.recipe.measure
        path = self.out / "measurements" / f"{name}.json"
        known = _read_measurement(path)
        cached = known is not None and (known.digest, known.protocol) == (digest, self.protocol)
        result = known if known is not None and cached else self._take(name, path)
        self.records.measured(result, path)
        self.measured[name] = result
        first = {t.taskset: pass_interval(t, 1, confidence=spec.confidence) for t in result.tasks}
        self.observe(
            Measured(
                policy=name,
                pass_at_1={n: (i.value, i.low, i.high) for n, i in first.items()},
                cached=cached,
            )
        )

    def _take(self, name: str, path: Path) -> Measurement:
        recipe = self.plan.recipe
        self.records.began()
        result = measure(
            name,
            self.policy(name),
            [self.tasksets[t] for t in recipe.measured_tasks],
            spec=recipe.measure,
            base=self.policies["base"] if name != "base" else None,
            protocol=self.protocol,
            parts=self.parts,
            observe=self.observe,
            stop=self.stop,
        )
        write_atomic(path, result.to_json())
        return result

    def _gates(self, planned: PlannedStage) -> str | None:
        """Decide the stage's gates; returns words when one stops the run."""
        name = planned.spec.name
        for gate in planned.spec.gates:
            decision = decide(
                gate,
                base=self.measured["base"].task(gate.task),
                now=self.measured[name].task(gate.task),
                confidence=self.plan.recipe.measure.confidence,
            )
            self.records.gate(name, gate, decision)
            self.observe(GateDecided(stage=name, passed=decision.passed, words=decision.words))
            if not decision.passed and gate.otherwise == "stop":
                return decision.words
        return None


def _read_measurement(path: Path) -> Measurement | None:
    """What was measured before. A damaged file is none: measuring again gives the same."""
    if not path.is_file():
        return None
    try:
        return Measurement.from_json(path.read_text(encoding="utf-8"))
    except (DataError, UnicodeDecodeError):
        return None


def _remove_partials(out: Path) -> None:
    """Remove files that a kill left half written; their names end in random digits."""
    for folder in (out, out / "measurements", *(out / "stages").glob("**")):
        for file in folder.glob(".*.partial"):
            if file.is_file():  # folders are settled by recover_folder, which may need them
                file.unlink()


def _refuse_changes(plan: Plan, out: Path) -> list[Path]:
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


__all__ = [
    "Done",
    "Interrupted",
    "Outcome",
    "measure_model",
    "model_path",
    "protocol_of",
    "read_done",
    "run",
]
