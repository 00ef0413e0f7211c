"""Running a recipe: measure, train a stage, measure again, decide its gates.

base ──measure──▶ stage ──export──▶ measure ──gates──▶ stage ──▶ … ──▶ result
                    └─ a finished stage with the same identity is not run again

Everything is written into one run folder; ``folder.py`` shows its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import msgspec

from posttrain.core.events import (
    GateDecided,
    Measured,
    Observer,
    Proved,
    StageStarted,
    ignore,
)
from posttrain.core.proofs import Proof
from posttrain.core.task import TaskSet
from posttrain.measure.gates import Detour, GateDecision, decide, detour
from posttrain.measure.measure import measure_policy
from posttrain.measure.measurement import Measurement
from posttrain.measure.passk import pass_interval
from posttrain.models.files import model_digest
from posttrain.parts.shelf import Shelf
from posttrain.protocols import Engine, Policy
from posttrain.recipe import Recipe
from posttrain.run.build import StageBuilder, learner_of
from posttrain.run.check import check
from posttrain.run.folder import RunFolder, RunWriter
from posttrain.run.journal import Journal
from posttrain.run.ledger import Ledger
from posttrain.run.plan import (
    Plan,
    PlannedStage,
    make_plan,
    model_path,
    protocol_of,
    protocol_parts,
)
from posttrain.run.records import Records
from posttrain.run.rehearsal import WORTH
from posttrain.run.resume import (
    NOTHING,
    Consent,
    accept_changes,
    check_folder,
    earlier_measurement,
    unstarted,
    versions,
)
from posttrain.run.stage_folder import StageRecord, StageResult, StageWriter
from posttrain.training.stage import Parts, run_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    out: Path
    finished: tuple[str, ...]  # finished stages, in order
    final: str  # the run's final policy: a stage, or "base"
    stopped_by: str | None = None  # the gate that stopped it, in words


def run(
    recipe: Recipe,
    *,
    out: Path,
    root: Path,
    engine: Engine,
    observe: Observer = ignore,
    stop: Callable[[], bool] = lambda: False,
    consent: Consent = NOTHING,
) -> Outcome:
    """Run a recipe, or resume it. Running a finished recipe again does nothing.

    Args:
        recipe: the configuration.
        out: the run folder; created if missing.
        root: folder that the recipe's paths are relative to.
        engine: makes policies and learners.
        observe: called with every event.
        stop: called between draws; True commits and raises.
        consent: changes of started stages that are accepted, and stages to start again.

    Raises:
        ResumeRefused: the recipe, data or libraries of a started stage changed.
        FileChanged: a file of ``out`` is not what its ledger records.
        RunLocked: another process uses ``out``.
        Interrupted: ``stop`` returned True. Run again to resume.
        PosttrainError: any other error of the tree; what was committed stays.
    """
    with RunFolder(out).lock() as folder:
        return run_in(
            folder, recipe, root=root, engine=engine, observe=observe, stop=stop, consent=consent
        )


def run_in(
    folder: RunWriter,
    recipe: Recipe,
    *,
    root: Path,
    engine: Engine,
    observe: Observer = ignore,
    stop: Callable[[], bool] = lambda: False,
    consent: Consent = NOTHING,
) -> Outcome:
    """As :func:`run`, in a folder that this process has locked already."""
    return _Run.open(recipe, folder, root, engine, observe, stop, consent).go()


@final
@dataclass(slots=True, eq=False)
class _Run:
    """A run in this process."""

    plan: Plan
    folder: RunWriter
    engine: Engine
    observe: Observer
    stop: Callable[[], bool]
    ledger: Ledger
    records: Records
    tasksets: Mapping[str, TaskSet]
    shelf: Shelf  # data files that were rendered
    protocol: str
    parts: Mapping[str, str]  # of the protocol
    policies: dict[str, Policy]
    measured: dict[str, Measurement] = field(default_factory=dict)
    detours: dict[str, Detour] = field(default_factory=dict)  # what gates decided, by stage

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        folder: RunWriter,
        root: Path,
        engine: Engine,
        observe: Observer,
        stop: Callable[[], bool],
        consent: Consent,
    ) -> _Run:
        """Check everything that can be checked before training; then write to the folder."""
        check_folder(folder, consent, observe=observe)

        def has_started(planned: PlannedStage) -> bool:
            return folder.stage_writer(planned.spec.name, planned.identity).has_started()

        checked = check(
            recipe,
            root=root,
            engine=engine,
            observe=observe,
            has_started=has_started,
            rehearse_from=WORTH,
        )
        recipe, base = checked.recipe, checked.base
        protocol = protocol_of(recipe, checked.measured, root=root)
        parts = protocol_parts(recipe, checked.measured, root=root)
        ledger = folder.ledger
        records = Records(ledger, recipe)
        run = cls(
            plan=checked.plans[0],
            folder=folder,
            engine=engine,
            observe=observe,
            stop=stop,
            ledger=ledger,
            records=records,
            tasksets=checked.tasksets,
            shelf=checked.shelf,
            protocol=protocol,
            parts=parts,
            policies=dict(checked.policies),
        )
        run._replay()
        while accept_changes(run.plan, folder, consent=consent, observe=observe):
            run._replay()  # finished stages have the plan's identities now
        for useless in unstarted(run.plan, folder):
            folder.remove_stage(useless)
        folder.write_recipe(recipe)
        records.model(recipe.model, digest=base.producer.digest, role="base")
        for ref in sorted(checked.policies.keys() - {"base"}):
            run._outside(ref)
        for name, tasks in recipe.tasks.items():
            records.tasks(name, tasks.identity(root))
        for proof in checked.proofs:
            records.proof(proof)
        return run

    # --- the sequence of stages --------------------------------------------------------------

    def go(self) -> Outcome:
        """Measure the base, then train, measure and gate every stage in order."""
        base = self.policies["base"].producer
        self._measure("base", base.digest or base.name)
        position = 0
        while position < len(self.plan.stages):
            planned = self.plan.stages[position]
            result = self._stage(planned)
            self._measure(planned.spec.name, result.digest)
            stopped_by = self._gates(planned)
            position += 1
            if stopped_by:
                return self._outcome(position, stopped_by)
            self._unload(later=self.plan.stages[position:])
        return self._outcome(position, None)

    def _outcome(self, num_stages: int, stopped_by: str | None) -> Outcome:
        ran = self.plan.stages[:num_stages]
        final = self.plan.final
        if stopped_by:
            last = ran[-1]
            back = self.detours.get(last.spec.name, Detour()).rolled_back
            final = last.init if back else last.spec.name
        return Outcome(
            out=self.folder.path,
            finished=tuple(s.spec.name for s in ran),
            final=final,
            stopped_by=stopped_by,
        )

    def _replay(self) -> None:
        """Repeat the gate decisions of earlier processes, as far as stages were measured."""
        known: dict[str, Measurement] = {}
        base = self.policies["base"].producer
        if (measured := self._known("base", base.digest or base.name)) is None:
            return
        known["base"] = measured
        position = 0
        while position < len(self.plan.stages):
            planned = self.plan.stages[position]
            result = self._stage_folder(planned).result()
            found = self._known(planned.spec.name, result.digest) if result else None
            if found is None:
                return
            known[planned.spec.name] = found
            self._replan(planned, detour(self._decisions(planned, known)))
            position += 1

    def _replan(self, planned: PlannedStage, detour: Detour) -> None:
        """Plan again when the gates lead to other stages than the current plan."""
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
            for proof in policy.proofs:
                self._proved(replace(proof, of=ref))
            if ref.startswith("path:"):
                self._outside(ref)
        return self.policies[ref]

    def _outside(self, ref: str) -> None:
        """Record a model from outside the recipe."""
        found = self.policies[ref].producer.digest
        self.records.model(ref.removeprefix("path:"), digest=found, role="outside")

    def _unload(self, *, later: Sequence[PlannedStage]) -> None:
        """Unload models that no later stage refers to. The base stays: KL is measured to it."""
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
        model = self._stage_folder(self.plan.stage(ref)).model
        self.folder.recorded().require(model)
        return str(model)

    # --- a stage -----------------------------------------------------------------------------

    def _stage_folder(self, planned: PlannedStage) -> StageWriter:
        return self.folder.stage_writer(planned.spec.name, planned.identity)

    def _workshop(self) -> StageBuilder:
        return StageBuilder(
            root=self.plan.root,
            seed=self.plan.recipe.seed,
            tasksets=self.tasksets,
            policy=self.policy,
            shelf=self.shelf,
        )

    def _stage(self, planned: PlannedStage) -> StageResult:
        """Run or resume a stage to its end."""
        folder = self._stage_folder(planned)
        result = folder.result()
        if result is not None:
            self._started(planned, step=result.steps, steps=result.steps, finished=True)
            return result
        self.ledger.begin()
        record = StageRecord(
            name=planned.spec.name,
            identity=planned.identity,
            init=planned.init,
            inputs=planned.inputs,
            versions=versions(),
        )
        folder.write_record(record)
        steps = self._train(planned)
        progress = folder.progress()
        digest = model_digest(folder.model)
        path = str(folder.model.relative_to(self.folder.path))
        self.records.checkpoint(planned, digest=digest, path=path)
        seconds = progress.seconds if progress else 0.0
        result = StageResult(steps=steps, seconds=seconds, digest=digest)
        folder.write_result(result)
        return result

    def _train(self, planned: PlannedStage) -> int:
        """Take the remaining steps, then export; returns the total number of steps."""
        spec, folder = planned.spec, self._stage_folder(planned)
        learner = learner_of(
            planned, engine=self.engine, recipe=self.plan.recipe, folder=self._model_folder
        )
        for proof in learner.policy.proofs:
            self._proved(replace(proof, of=spec.name))
        parts = self._workshop().parts(planned, learner)
        for file in parts.source.files:
            self.records.dataset(file)
        steps = planned.steps(parts.source.num_groups)
        journal = self._journal(planned, parts)
        progress = folder.progress()
        self._started(planned, step=progress.step if progress else 0, steps=steps)
        run_stage(spec, parts, steps=steps, journal=journal, observe=self.observe, stop=self.stop)

        def export(model: Path) -> None:  # proofs first: once the folder is there, none is made
            for proof in learner.export(model):
                self._proved(replace(proof, of=spec.name))

        folder.export(export)
        return steps

    def _proved(self, proof: Proof) -> None:
        self.records.proof(proof)
        self.observe(Proved(proof=proof))

    def _journal(self, planned: PlannedStage, parts: Parts) -> Journal:
        return Journal(
            self._stage_folder(planned),
            stage=planned.spec.name,
            identity=planned.identity,
            facts={
                "objective": [msgspec.to_builtins(t) for t in parts.terms],
                "policy_in": planned.inputs["init"],
            },
        )

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
        """Measure a policy, unless the same weights were measured with the same protocol before."""
        spec = self.plan.recipe.measure
        known = self._known(name, digest)
        result = known or self._measure_now(name)
        self.records.measured(result, self.folder.measurement_file(name))
        self.measured[name] = result
        first = {t.taskset: pass_interval(t, 1, confidence=spec.confidence) for t in result.tasks}
        self.observe(
            Measured(
                policy=name,
                pass_at_1={n: (i.value, i.low, i.high) for n, i in first.items()},
                cached=known is not None,
            )
        )

    def _measure_now(self, name: str) -> Measurement:
        recipe = self.plan.recipe
        self.ledger.begin()
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
        self.folder.write_measurement(name, result)
        return result

    def _known(self, name: str, digest: str) -> Measurement | None:
        return earlier_measurement(self.folder, name, digest=digest, protocol=self.protocol)

    def _gates(self, planned: PlannedStage) -> str | None:
        """Decide the stage's gates and replan; the reason in words when one stops the run."""
        decisions = self._decisions(planned, self.measured)
        for decision in decisions:
            self.records.gate(planned.spec.name, decision)
            self.observe(
                GateDecided(stage=planned.spec.name, passed=decision.passed, words=decision.words)
            )
        way = detour(decisions)
        self._replan(planned, way)
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
