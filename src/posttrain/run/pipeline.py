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

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import msgspec

from posttrain.composition import Dataset, parts_of
from posttrain.core import config
from posttrain.core.events import (
    GateDecided,
    Measured,
    Note,
    Observer,
    StageStarted,
    ignore,
)
from posttrain.core.files import (
    atomic_folder,
    folder_lock,
    hash_folder,
    recover_folder,
    write_atomic,
)
from posttrain.core.protocols import Engine, Learner, Policy, ScalarStart
from posttrain.core.task import TaskSet
from posttrain.measure.gates import Detour, GateDecision, decide, detour
from posttrain.measure.measure import measure_policy
from posttrain.measure.measurement import Measurement
from posttrain.measure.passk import pass_interval
from posttrain.recipe import Recipe
from posttrain.run.journal import (
    Done,
    Journal,
    read_done,
    read_progress,
)
from posttrain.run.ledger import Ledger
from posttrain.run.plan import (
    Plan,
    PlannedStage,
    all_plans,
    make_plan,
    model_path,
    protocol_of,
    protocol_parts,
)
from posttrain.run.records import Records
from posttrain.run.resume import read_measurement, refuse_changes, remove_partials
from posttrain.sources.dataset import DatasetSource
from posttrain.sources.mix import MixSource
from posttrain.tasks import build_taskset
from posttrain.training.build import Workshop
from posttrain.training.stage import Interrupted, Parts, run_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    out: Path
    finished: tuple[str, ...]  # stages that ran, in order
    final: str  # the policy that the run ended with: a stage, or "base"
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
    detours: dict[str, Detour] = field(default_factory=dict)  # what gates decided, by stage

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
        plans = all_plans(recipe, root=root, base=base.producer.digest or recipe.model)
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
            plan=plans[0],
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
        for plan in plans:
            run._check_data(plan)
        run._retrace()
        abandoned = refuse_changes(run.plan, out)
        for folder in abandoned:
            shutil.rmtree(folder)
        remove_partials(out)
        write_atomic(out / "recipe.json", msgspec.json.format(msgspec.json.encode(recipe)))
        records.model(recipe.model, digest=base.producer.digest, role="base")
        return run

    # --- the order of things -----------------------------------------------------------------

    def go(self) -> Outcome:
        """Measure the base, then every stage in turn, with its measurement and gates."""
        base = self.policies["base"].producer
        self._measure("base", base.digest or base.name)
        position = 0
        while position < len(self.plan.stages):
            planned = self.plan.stages[position]
            done = self._stage(planned)
            self._measure(planned.spec.name, done.digest)
            stopped_by = self._gates(planned)
            position += 1
            if stopped_by:
                return self._outcome(position, stopped_by)
            self._forget(later=self.plan.stages[position:])
        return self._outcome(position, None)

    def _outcome(self, num_stages: int, stopped_by: str | None) -> Outcome:
        ran = self.plan.stages[:num_stages]
        final = self.plan.final
        if stopped_by:
            last = ran[-1]
            back = self.detours.get(last.spec.name, Detour()).rolled_back
            final = last.init if back else last.spec.name
        return Outcome(
            out=self.out,
            finished=tuple(s.spec.name for s in ran),
            final=final,
            stopped_by=stopped_by,
        )

    def _retrace(self) -> None:
        """Follow the path of earlier sittings as far as it was measured and decided."""
        known: dict[str, Measurement] = {}
        base = self.policies["base"].producer
        if (measured := self._known("base", base.digest or base.name)) is None:
            return
        known["base"] = measured
        position = 0
        while position < len(self.plan.stages):
            planned = self.plan.stages[position]
            done = read_done(self._folder(planned))
            found = self._known(planned.spec.name, done.digest) if done else None
            if found is None:
                return
            known[planned.spec.name] = found
            self._turn(planned, detour(self._decisions(planned, known)))
            position += 1

    def _turn(self, planned: PlannedStage, detour: Detour) -> None:
        """Plan again from here when the gates lead elsewhere than the present plan goes."""
        if detour == self.detours.get(planned.spec.name, Detour()):
            return
        self.detours[planned.spec.name] = detour
        self.plan = make_plan(
            self.plan.recipe,
            root=self.plan.root,
            base=self.policies["base"].producer.digest or self.plan.recipe.model,
            detours=self.detours,
        )

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

    def _check_data(self, plan: Plan) -> None:
        """Find a broken row now rather than after the stages before it were trained.

        Stages that descend from a model outside the recipe are checked when they begin: their
        tokenizer is not loaded yet.
        """
        workshop, known = self._workshop(), {"base"}
        for planned in plan.stages:
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
            "init": planned.init,
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
            scalar=self._scalar_start(planned),
            activation_checkpointing=spec.activation_checkpointing,
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

    def _scalar_start(self, planned: PlannedStage) -> ScalarStart | None:
        spec = planned.composition.scalar_head
        if spec is None:
            return None
        start = planned.init if spec.start == "input" else spec.start
        return ScalarStart(trunk=spec.trunk, model=self._model_folder(start), lr=spec.lr)

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
        known = self._known(name, digest)
        result = known or self._take(name, path)
        self.records.measured(result, path)
        self.measured[name] = result
        first = {t.taskset: pass_interval(t, 1, confidence=spec.confidence) for t in result.tasks}
        self.observe(
            Measured(
                policy=name,
                pass_at_1={n: (i.value, i.low, i.high) for n, i in first.items()},
                cached=known is not None,
            )
        )

    def _take(self, name: str, path: Path) -> Measurement:
        recipe = self.plan.recipe
        self.records.began()
        result = measure_policy(
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

    def _known(self, name: str, digest: str) -> Measurement | None:
        """An earlier measurement of these very weights, taken in this very way."""
        known = read_measurement(self.out / "measurements" / f"{name}.json")
        same = known is not None and (known.digest, known.protocol) == (digest, self.protocol)
        return known if same else None

    def _gates(self, planned: PlannedStage) -> str | None:
        """Decide the stage's gates, and take the way they lead; words when one stops the run."""
        decisions = self._decisions(planned, self.measured)
        for decision in decisions:
            self.records.gate(planned.spec.name, decision)
            self.observe(
                GateDecided(stage=planned.spec.name, passed=decision.passed, words=decision.words)
            )
        way = detour(decisions)
        self._turn(planned, way)
        return way.stopped_by

    def _decisions(
        self, planned: PlannedStage, measured: Mapping[str, Measurement]
    ) -> list[GateDecision]:
        return [
            decide(
                gate,
                now=measured[planned.spec.name].task(gate.task),
                since=measured[planned.init if gate.since == "input" else gate.since].task(
                    gate.task
                ),
                confidence=self.plan.recipe.measure.confidence,
                epsilon=self.plan.recipe.measure.threshold,
            )
            for gate in planned.spec.gates
        ]


__all__ = [
    "Done",
    "Interrupted",
    "Outcome",
    "model_path",
    "protocol_of",
    "read_done",
    "run",
]
