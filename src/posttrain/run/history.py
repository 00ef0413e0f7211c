"""A run as its folder says it: what was planned, measured and decided, finished or not.

run folder ──read_history──▶ RunHistory ──record──▶ StageHistory: metrics, tokens, gates
                                 │
        Measurement per policy ──┴─attribution──▶ PolicyChange, MeasuredRole, Retained
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from posttrain.core import config
from posttrain.core.clock import NAMES, seconds_in
from posttrain.core.provenance import Regime
from posttrain.core.trajectory import Column
from posttrain.measure.attribution import MeasuredRole, PolicyChange, attribute_changes, role_in_run
from posttrain.measure.gates import Gate
from posttrain.measure.measurement import Measurement
from posttrain.measure.retained import Retained, retained
from posttrain.parts.registry import tag_of
from posttrain.recipe import Recipe
from posttrain.run.folder import RunFolder, StageFolder, StageResult
from posttrain.run.ledger import Record, RecordKind
from posttrain.run.plan import PlannedStage
from posttrain.run.store import ProducerTokens, tokens_by_producer

Metrics = Mapping[str, float]
"""One line of ``metrics.jsonl``: the numbers of one optimiser step by name, ``step`` among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRecord:
    """A gate of the recipe, and its last decision as the ledger holds it."""

    gate: Gate
    passed: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageHistory:
    """What one stage was, what it wrote while it ran, and how its gates decided."""

    planned: PlannedStage
    metrics: tuple[Metrics, ...] = ()  # one per step
    done: StageResult | None = None  # None: it has not finished
    tokens: tuple[ProducerTokens, ...] = ()
    gates: tuple[GateRecord, ...] = ()  # those that were decided, in the recipe's order

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.planned.spec.name

    @property
    def method(self) -> str:
        """The name of its method in recipes."""
        return tag_of(self.planned.spec.method)

    @property
    def regime(self) -> Regime:
        """Whether the learner sampled what it learned from."""
        return Regime(self.planned.provenance.partition(":")[0])

    @property
    def source(self) -> str:
        """Where its trajectories came from, in words, the regime left out."""
        return self.planned.provenance.partition(": ")[2]

    @property
    def teachers(self) -> tuple[str, ...]:
        """Policies whose distributions it learned from: stages, ``base``, or outside ones."""
        return tuple(
            ref
            for signal in self.planned.composition.signals
            if Column.TEACHER_LOGPROBS in signal.provides
            for ref in dict.fromkeys(signal.references())
        )

    @property
    def seconds(self) -> float:
        """Time in it: what it says when it has finished, else what its steps took so far."""
        if self.done is not None:
            return self.done.seconds
        return sum(sum(seconds_in(line).values()) for line in self.metrics)

    @property
    def seconds_by_work(self) -> Mapping[str, float]:
        """What its steps' time went into, in the order of the clock's names; no zeros."""
        steps = [seconds_in(line) for line in self.metrics]
        sums = {name: sum(step.get(name, 0.0) for step in steps) for name in NAMES}
        return {name: seconds for name, seconds in sums.items() if seconds}


@dataclass(frozen=True, eq=False)  # no slots: they leave no room for what is cached
class RunHistory:
    """A run folder, read. Everything that it computes follows from the files alone."""

    folder: RunFolder
    recipe: Recipe
    measurements: tuple[Measurement, ...]  # base first, then in the recipe's order
    stages: tuple[PlannedStage, ...]  # those that have started
    records: tuple[Record, ...]  # the ledger

    def stage_folder(self, planned: PlannedStage) -> StageFolder:
        """The folder of a stage."""
        return self.folder.stage(planned.spec.name, planned.identity)

    def record(self, planned: PlannedStage) -> StageHistory:
        """Everything that a stage wrote, trajectories aside."""
        folder = self.stage_folder(planned)
        return StageHistory(
            planned=planned,
            metrics=tuple(folder.metrics()),
            done=folder.result(),
            tokens=tuple(tokens_by_producer(folder.use_files())),
            gates=tuple(self._gates(planned)),
        )

    def _gates(self, planned: PlannedStage) -> Iterator[GateRecord]:
        latest = {
            config.digest(r.body["gate"]): r.body
            for r in self.records
            if r.kind is RecordKind.GATE and r.body["stage"] == planned.spec.name
        }
        for gate in planned.spec.gates:
            body = latest.get(config.digest(config.plain(gate)))
            if body is not None:
                words = str(body["words"])
                yield GateRecord(gate=gate, passed=bool(body["passed"]), words=words)

    def _rolled_back(self, planned: PlannedStage) -> bool:
        """Its result was left aside: the run went on from what it had started from."""
        gates = self._gates(planned)
        return any(not g.passed and g.gate.otherwise == "roll_back" for g in gates)

    # --- what the stages did -----------------------------------------------------------------

    @property
    def measured(self) -> Mapping[str, Measurement]:
        """Measurements by policy."""
        return {m.policy: m for m in self.measurements}

    @property
    def began(self) -> Record | None:
        """The ledger's row of the latest time that the run did something: when, and with what."""
        return next((r for r in reversed(self.records) if r.kind is RecordKind.RUN), None)

    @property
    def final(self) -> str:
        """The policy that the run has come to: its last measured stage, or what that one started
        from when a gate rolled it back."""
        done = [s for s in self.stages if s.spec.name in self.measured]
        if not done:
            return "base"
        return done[-1].init if self._rolled_back(done[-1]) else done[-1].spec.name

    @cached_property
    def changes(self) -> tuple[PolicyChange, ...]:
        """What each measured stage changed, from the policy it started from."""
        measured = self.measured
        return tuple(
            self._compare(measured[s.init], measured[s.spec.name])
            for s in self.stages
            if s.init in measured and s.spec.name in measured
        )

    def whole(self) -> PolicyChange | None:
        """What the run changed from the base to its final policy; None when it cannot be said."""
        measured = self.measured
        ends = ("base", self.final)
        return self._compare(*(measured[p] for p in ends)) if self.changes else None

    def roles(self, planned: PlannedStage) -> tuple[tuple[str, MeasuredRole], ...]:
        """(task set, what the stage did to it), in the light of every policy measured before."""
        names = [m.policy for m in self.measurements]
        if planned.spec.name not in names or planned.init not in names:
            return ()
        at, start = names.index(planned.spec.name), names.index(planned.init)
        before = [m for m in self.measurements[:at] if m.policy != planned.init]
        changes = [
            self._compare(m, self.measurements[at]) for m in (*before, self.measurements[start])
        ]
        return tuple(
            (last.task, role_in_run(last, earlier))
            for *earlier, last in zip(*(c.tasks for c in changes), strict=True)
        )

    def retained(self) -> tuple[Retained, ...]:
        """What later stages left of what each task set had; nothing for a single stage.

        Over the policies up to the final one: a stage that was rolled back left nothing behind.
        """
        if len(self.measurements) < 3:
            return ()
        undone = {s.spec.name for s in self.stages if self._rolled_back(s)}
        chain = [m for m in self.measurements if m.policy not in undone]
        kept = [c for c in self.changes if c.after not in undone]
        return retained(chain, kept, spec=self.recipe.measure)

    def _compare(self, before: Measurement, after: Measurement) -> PolicyChange:
        spec = self.recipe.measure
        return attribute_changes(before, after, epsilon=spec.threshold, confidence=spec.confidence)


def read_history(out: Path) -> RunHistory:
    """Read a run folder, without its trajectories.

    Raises:
        ConfigError: ``out`` is not a run folder.
        LedgerBroken: the ledger's chain does not hold.
    """
    folder = RunFolder(out)
    recipe = folder.recipe()
    known = folder.measured()
    names = [n for n in ("base", *(s.name for s in recipe.stages)) if n in known]
    measurements = tuple(folder.measurement(name) for name in names)
    stages = tuple(_started(folder, recipe))
    return RunHistory(folder, recipe, measurements, stages, tuple(folder.records()))


def _started(folder: RunFolder, recipe: Recipe) -> Iterator[PlannedStage]:
    """Stages with a folder. What they were is read from the folder: data may have moved since."""
    for spec in recipe.stages:
        for stage in folder.stages(spec.name):
            record = stage.record()
            if record is not None and record.name == spec.name:
                yield PlannedStage(
                    spec=spec,
                    composition=spec.method.compose(),
                    init=record.init,
                    inputs=record.inputs,
                    identity=record.identity,
                )
