"""The history of a run, read from its folder: stages, measurements and gates, finished or not.

run folder ──read_history──▶ RunHistory ──record──▶ StageHistory: metrics, tokens, gates
                                 │
        Measurement per policy ──┴─attribution──▶ PolicyChange, MeasuredRole, Retained
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from posttrain.core import config
from posttrain.core.clock import NAMES, seconds_in
from posttrain.core.errors import DataError, LedgerBroken, RunError
from posttrain.core.proofs import Proof, Subject
from posttrain.core.provenance import Regime
from posttrain.core.trajectory import Column
from posttrain.measure.attribution import MeasuredRole, PolicyChange, attribute_changes, role_in_run
from posttrain.measure.gates import Gate
from posttrain.measure.measurement import Measurement
from posttrain.measure.retained import Retained, retained
from posttrain.parts.registry import tag_of
from posttrain.recipe import Recipe
from posttrain.run.audit import agreed, audit
from posttrain.run.folder import RunFolder
from posttrain.run.ledger import Record, RecordKind
from posttrain.run.plan import PlannedStage
from posttrain.run.recorded import changed
from posttrain.run.stage_folder import StageFolder, StageResult
from posttrain.run.store import ProducerTokens, tokens_by_producer

Metrics = Mapping[str, float]
"""One line of ``metrics.jsonl``: the metrics of one optimiser step by name, ``step`` included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRecord:
    """A gate of the recipe, and its last decision in the ledger."""

    gate: Gate
    passed: bool
    words: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageHistory:
    """One stage: its plan, metrics, result and the decisions of its gates."""

    planned: PlannedStage
    metrics: tuple[Metrics, ...] = ()  # one per step
    done: StageResult | None = None  # None: not finished
    tokens: tuple[ProducerTokens, ...] = ()
    gates: tuple[GateRecord, ...] = ()  # decided ones, in the recipe's order

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
        """On-policy, off-policy or mixed."""
        return self.planned.composition.source.regime

    @property
    def source(self) -> str:
        """Where its trajectories came from, in words, without the regime."""
        return str(self.planned.composition.source.origin)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teacher models whose distributions it trained on: stages, ``base``, or outside ones."""
        return tuple(
            ref
            for signal in self.planned.composition.signals
            if Column.TEACHER_LOGPROBS in signal.provides
            for ref in dict.fromkeys(signal.references())
        )

    @property
    def seconds(self) -> float:
        """Run time: that of its result when finished, else the sum over its steps so far."""
        if self.done is not None:
            return self.done.seconds
        return sum(sum(seconds_in(line).values()) for line in self.metrics)

    @property
    def seconds_by_work(self) -> Mapping[str, float]:
        """Time of its steps by activity, in the order of the clock's names; no zeros."""
        steps = [seconds_in(line) for line in self.metrics]
        sums = {name: sum(step.get(name, 0.0) for step in steps) for name in NAMES}
        return {name: seconds for name, seconds in sums.items() if seconds}


@dataclass(frozen=True, eq=False)  # no slots: cached_property needs a __dict__
class RunHistory:
    """The content of a run folder. Everything else is computed from its files."""

    folder: RunFolder
    recipe: Recipe
    measurements: tuple[Measurement, ...]  # base first, then in the recipe's order
    stages: tuple[PlannedStage, ...]  # started ones
    records: tuple[Record, ...]  # the ledger
    alarms: tuple[str, ...] = ()  # files that are not what the ledger records, in words
    unread: frozenset[Path] = frozenset()  # these files: nothing is taken from them
    compared: tuple[Proof, ...] = ()  # with the ledger, now

    def stage_folder(self, planned: PlannedStage) -> StageFolder:
        """The folder of a stage."""
        return self.folder.stage(planned.spec.name, planned.identity)

    def record(self, planned: PlannedStage) -> StageHistory:
        """Everything that a stage wrote, without trajectories."""
        folder = self.stage_folder(planned)
        uses = self.readable(folder.use_files())
        metrics = _unless_damaged(folder.metrics) if self.readable([folder.metrics_file]) else None
        done = _unless_damaged(folder.result) if self.readable([folder.result_file]) else None
        return StageHistory(
            planned=planned,
            metrics=tuple(metrics or ()),
            done=done,
            tokens=tuple(_unless_damaged(lambda: tokens_by_producer(uses)) or ()),
            gates=tuple(self._gates(planned)),
        )

    def readable(self, files: Sequence[Path]) -> list[Path]:
        """Those of the files that are what the ledger records."""
        return [file for file in files if file not in self.unread]

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
        """True when a gate discarded its result: the run continued from the stage's input."""
        gates = self._gates(planned)
        return any(not g.passed and g.gate.otherwise == "roll_back" for g in gates)

    # --- what the stages changed -------------------------------------------------------------

    @property
    def measured(self) -> Mapping[str, Measurement]:
        """Measurements by policy."""
        return {m.policy: m for m in self.measurements}

    @property
    def began(self) -> Record | None:
        """The ledger's row of the latest process of the run: time, software and machine."""
        return next((r for r in reversed(self.records) if r.kind is RecordKind.RUN), None)

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """What was compared with what it claims to be. An export has several of one name."""
        bodies = (r.body for r in self.records if r.kind is RecordKind.PROOF)
        told = dict.fromkeys((str(b["subject"]), str(b["of"]), str(b["words"])) for b in bodies)
        earlier = (
            Proof(subject=Subject(subject), of=of, words=words) for subject, of, words in told
        )
        return (*earlier, *self.compared)

    @property
    def final(self) -> str:
        """The run's current policy: its last measured stage, or that stage's input when a gate
        rolled it back."""
        done = [s for s in self.stages if s.spec.name in self.measured]
        if not done:
            return "base"
        return done[-1].init if self._rolled_back(done[-1]) else done[-1].spec.name

    @cached_property
    def changes(self) -> tuple[PolicyChange, ...]:
        """The change by each measured stage, relative to the policy it started from."""
        measured = self.measured
        return tuple(
            self._compare(measured[s.init], measured[s.spec.name])
            for s in self.stages
            if s.init in measured and s.spec.name in measured
        )

    def whole(self) -> PolicyChange | None:
        """The change from the base to the final policy; None when no stage was measured."""
        measured = self.measured
        ends = ("base", self.final)
        return self._compare(*(measured[p] for p in ends)) if self.changes else None

    def roles(self, planned: PlannedStage) -> tuple[tuple[str, MeasuredRole], ...]:
        """(task set, the stage's measured role on it), given all earlier measured policies."""
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
        """Retention of each task set over later stages; empty for a single stage.

        Stages that were rolled back are left out: the final policy does not descend from them.
        """
        if len(self.measurements) < 3:
            return ()
        undone = {s.spec.name for s in self.stages if self._rolled_back(s)}
        chain = [m for m in self.measurements if m.policy not in undone]
        changes = [c for c in self.changes if c.after not in undone]
        return retained(chain, changes, spec=self.recipe.measure)

    def _compare(self, before: Measurement, after: Measurement) -> PolicyChange:
        spec = self.recipe.measure
        return attribute_changes(before, after, epsilon=spec.threshold, confidence=spec.confidence)


def read_history(out: Path, *, lenient: bool = False) -> RunHistory:
    """Read a run folder, without its trajectories.

    Args:
        out: the run folder.
        lenient: leave out files that are not what the ledger records, and name them in
            ``alarms``. Where the ledger itself is broken nothing can be compared; what can be read
            is then taken as it is.

    Raises:
        ConfigError: ``out`` is not a run folder.
        LedgerBroken: the ledger is missing, cut, or its chain is broken; not if lenient.
        FileChanged: a file is not what the ledger records; not if lenient.
    """
    folder = RunFolder(out)
    recipe = folder.recipe(checked=False)
    try:
        records, faults = folder.records(), audit(folder, weights=False)
        alarms = [str(fault) for fault in faults]
    except LedgerBroken as error:
        if not lenient:
            raise
        records, faults, alarms = [], [], [error.found]
    if faults and not lenient:
        raise changed(out, faults)
    unread = frozenset(out / fault.path for fault in faults)
    known = [n for n in folder.measured() if folder.measurement_file(n) not in unread]
    names = [n for n in ("base", *(s.name for s in recipe.stages)) if n in known]
    taken = [_unless_damaged(partial(folder.measurement, n, checked=False)) for n in names]
    return RunHistory(
        folder,
        recipe,
        tuple(m for m in taken if m is not None),
        tuple(_started(folder, recipe, unread)),
        tuple(records),
        tuple(alarms),
        unread,
        () if alarms else agreed(folder),
    )


T = TypeVar("T")


def _unless_damaged(read: Callable[[], T]) -> T | None:
    """What a file holds; None when it is damaged, which the alarms of its ledger say already."""
    try:
        return read()
    except (DataError, RunError):
        return None


def _started(folder: RunFolder, recipe: Recipe, unread: frozenset[Path]) -> Iterator[PlannedStage]:
    """Started stages. Their plans are read from their folders: data may have changed since."""
    found = [s for s in folder.stage_folders() if s.record_file not in unread]
    records = [r for s in found if (r := _unless_damaged(s.record)) is not None]
    for spec in recipe.stages:
        for record in records:
            if record.name == spec.name:
                yield PlannedStage(
                    spec=spec,
                    composition=spec.method.compose(),
                    init=record.init,
                    inputs=record.inputs,
                    identity=record.identity,
                )
