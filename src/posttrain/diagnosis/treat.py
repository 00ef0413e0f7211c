"""The closed loop: diagnose, prescribe, run, compare, until nothing helps or the budget is spent.

measure base ─▶ diagnose ─▶ prescribe ─▶ run one stage ─▶ measure ─▶ helped? kept? ─┐
                  ▲                                                                  │
                  └──── from the policy that is kept ◀── roll back what did harm ◀───┘

All stages share one run folder and one ledger: the recipe grows by a stage per round. Decisions
are written there too, so the same command resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import final

import msgspec

from posttrain.core import config
from posttrain.core.errors import ResumeRefused
from posttrain.core.events import Event, Measured, Note, Observer, StageStarted, ignore
from posttrain.diagnosis.card import Diagnosis, Evidence, Prescription
from posttrain.diagnosis.diagnose import Known, Practice, find_bottleneck, grounded
from posttrain.diagnosis.prescribe import Supplies
from posttrain.diagnosis.rounds import Round, TreatmentLog
from posttrain.diagnosis.rules import RuleBook
from posttrain.diagnosis.spending import Spent, expected, spent
from posttrain.diagnosis.stage_decision import decide_stage
from posttrain.measure.gates import Gate
from posttrain.measure.measurement import Measurement
from posttrain.protocols import Engine
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.folder import RunFolder, RunWriter
from posttrain.run.ledger import RecordKind
from posttrain.run.measuring import measure_model
from posttrain.run.pipeline import run_in

OUTSIDE = "_earlier"
"""Name of the policy from outside the run; no stage may have this name."""

ROUNDS = 12
"""Maximum number of stages of a treatment."""

SMALLEST_DOSE = 0.15
"""A stage shorter than this share of its prescription is not started."""

LONGEST_DOSE = 1.5
"""A stage is lengthened up to this share when the rest of the budget is too small for another."""

WORTH_A_LOOK = 0.15
"""With less than this share of the budget left, a diagnosis would leave too little for a stage."""

LONGER = 1.15
"""Assumed growth of answer lengths during a stage."""

LOOKS = 2300
"""Rollouts of a diagnosis per task set, besides the run's measurement: enough for continuations of
32 prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Treated:
    """The outcome of a treatment."""

    out: Path
    policy: str  # "base", or the stage whose policy is the result
    model: Path
    rounds: tuple[Round, ...]
    spent: Spent
    budget: int
    ended: str
    before: Measurement
    after: Measurement


def run_treatment(
    ground: Recipe,
    *,
    out: Path,
    root: Path,
    engine: Engine,
    budget: int,
    supplies: Supplies,
    book: RuleBook,
    observe: Observer = ignore,
    stop: Callable[[], bool] = lambda: False,
) -> Treated:
    """Treat a model within a budget of tokens, or resume a treatment.

    Args:
        ground: model, task sets and how to measure; its stages are ignored.
        out: the run folder.
        root: folder that the recipe's paths are relative to.
        engine: loads policies and learners.
        budget: tokens sampled and trained, diagnoses included (see spending.py). A stage that
            would not fit is shortened, or not started.
        supplies: available resources.
        book: rules and treatments.
        observe: called with every event.
        stop: called between draws; True commits and raises.

    Raises:
        ResumeRefused: ``out`` holds the treatment of another model, task sets or supplies.
        RunLocked: another process works in ``out``.
        Interrupted: ``stop`` returned True. Call again to resume.
    """
    ground = grounded(ground, root=root)
    digest = config.digest(
        {
            "ground": msgspec.to_builtins(ground),
            "supplies": msgspec.to_builtins(supplies),
            "rules": config.digest(book),
        }
    )
    with RunFolder(out).lock() as folder:
        log = _opened(folder, digest=digest, budget=budget)
        return _Course(ground, folder, root, engine, supplies, book, observe, stop, log).go()


def _opened(folder: RunFolder, *, digest: str, budget: int) -> TreatmentLog:
    """The log of an earlier process, or a new one. A larger budget reopens an ended one."""
    known = folder.treatment(TreatmentLog)
    if known is None:
        return TreatmentLog(ground=digest, budget=budget)
    if known.ground != digest:
        raise ResumeRefused(
            f"{folder.path} holds the treatment of another model, task set, supply or rule",
            expected="the same as when it began",
            fix="undo the change, or choose another --out",
        )
    ended = known.ended if budget == known.budget else None
    return msgspec.structs.replace(known, budget=budget, ended=ended)


# --- the loop --------------------------------------------------------------------------------


@final
@dataclass(slots=True, eq=False)
class _Course:
    """The work of one process on a treatment."""

    ground: Recipe
    folder: RunWriter
    root: Path
    engine: Engine
    supplies: Supplies
    book: RuleBook
    observe: Observer
    stop: Callable[[], bool]
    log: TreatmentLog
    measured: dict[str, Measurement] = field(default_factory=dict)

    def go(self) -> Treated:
        """Run rounds until the treatment ends."""
        self._run()
        self._look_back()
        if self.log.rounds and self.log.rounds[-1].kept is None:
            self._decide()
        while self.log.ended is None:
            self._turn()
        current = self._current
        return Treated(
            out=self.folder.path,
            policy=current,
            model=self._model(current),
            rounds=self.log.rounds,
            spent=self._spent,
            budget=self.log.budget,
            ended=self.log.ended,
            before=self.measured["base"],
            after=self.measured[current],
        )

    def _turn(self) -> None:
        if self._spent.total > (1 - WORTH_A_LOOK) * self.log.budget:
            self._end("the budget is spent")
            return
        found = self._diagnosis()
        prescription = found.next
        if prescription is None:
            self._end(_nothing_left(found))
        elif len(self.log.rounds) >= ROUNDS:
            self._end(f"{ROUNDS} rounds were taken")
        else:
            stage = self._fitted(prescription, found)
            if stage is None:
                self._end("the budget does not reach for another stage")
                return
            self._begin(prescription, stage)
            self._run()
            self._decide()

    # --- diagnosing --------------------------------------------------------------------------

    @property
    def _current(self) -> str:
        """The policy that the next round starts from."""
        kept = [r.stage.name for r in self.log.rounds if r.kept]
        return kept[-1] if kept else "base"

    def _diagnosis(self) -> Diagnosis:
        """The card of the current policy, read from the run folder when it exists."""
        number = len(self.log.rounds)
        if self.folder.diagnosis_file(number).is_file():
            return Diagnosis.from_json(self.folder.diagnosis(number))
        current = self._current
        best = self._best()
        found = find_bottleneck(
            msgspec.structs.replace(self.ground, model=str(self._model(current))),
            root=self.root,
            engine=self.engine,
            supplies=replace(self.supplies, best=best),
            practice=Practice(book=self.book, name=self.ground.name, tried=self._tried()),
            budget=LOOKS * len(self.ground.tasks),
            known=Known(now=self.measured[current], before=self._earlier(best)),
            labels=False,
            observe=self.observe,
            stop=self.stop,
        )
        self.folder.write_diagnosis(number, found.to_json())
        for task in found.tasks:
            self._say(
                f"{task.task}: {task.bottleneck}"
                + (f", likeliest {task.leaning}" if task.leaning else "")
            )
        return found

    def _look_back(self) -> None:
        """Measure the user's earlier policy once; it may be the best teacher."""
        before = self.supplies.before
        if before is None or self._outside in self.measured:
            return
        if OUTSIDE not in self.folder.measured():
            self._say(f"sampling {before}")
            ground = msgspec.structs.replace(self.ground, model=before)
            taken = measure_model(ground, root=self.root, engine=self.engine, observe=self.observe)
            self.folder.write_measurement(OUTSIDE, taken)
        self.measured[self._outside] = self.folder.measurement(OUTSIDE)

    @property
    def _outside(self) -> str:
        return f"path:{self.supplies.before}"

    def _best(self) -> Mapping[str, str]:
        """By task set, the measured policy with the best pass@1, rolled-back stages included."""

        def rate(policy: str, task: str) -> float:
            return float(self.measured[policy].task(task).successes.mean())

        best = {}
        for task in self.ground.tasks:
            rates = {policy: rate(policy, task) for policy in self.measured}
            best[task] = max(rates, key=rates.__getitem__)
        return MappingProxyType(best)

    def _earlier(self, best: Mapping[str, str]) -> Measurement:
        """The best measurement of each task set, combined as if of one policy."""
        first = self.measured["base"]
        return replace(
            first, tasks=tuple(self.measured[best[t.taskset]].task(t.taskset) for t in first.tasks)
        )

    def _tried(self) -> frozenset[tuple[str, str]]:
        """Treatments of the current policy that did not help, to be skipped."""
        failed: set[tuple[str, str]] = set()
        for r in self.log.rounds:
            if r.helped and r.kept:
                failed.clear()  # another policy: what failed before may work now
            elif r.kept is not None:
                failed |= {(task, r.treatment) for task in r.tasks}
        return frozenset(failed)

    # --- the next stage ----------------------------------------------------------------------

    def _fitted(self, prescription: Prescription, found: Diagnosis) -> Stage | None:
        """The prescribed stage from the current policy, as long as the budget allows."""
        assert prescription.recipe is not None
        recipe = config.convert(
            msgspec.yaml.decode(prescription.recipe), Recipe, origin="prescription"
        )
        (stage,) = recipe.stages
        # The loop decides: a gate of an earlier stage must not end a later process.
        gates = tuple(_only_warns(gate) for gate in stage.gates)
        name = f"{len(self.log.rounds) + 1}-{stage.name}"
        stage = msgspec.structs.replace(stage, name=name, init=self._current, gates=gates)
        whole = expected(
            msgspec.structs.replace(
                self.ground, stages=(*(r.stage for r in self.log.rounds), stage)
            ),
            root=self.root,
            lengths={t.task: _length(t.evidence) for t in found.tasks},
        )
        # The stage is measured afterwards, like the base was.
        left = self.log.budget - self._spent.total - spent(self.folder, looks=("base",)).looking
        share = dose(left, whole)
        if share is None or stage.budget.steps is None:
            return None
        steps = max(1, int(stage.budget.steps * share))
        return msgspec.structs.replace(stage, budget=Budget(steps=steps))

    def _begin(self, prescription: Prescription, stage: Stage) -> None:
        number = len(self.log.rounds) + 1
        self._say(
            f"round {number}: {prescription.title} ({', '.join(prescription.tasks)}), "
            f"{stage.budget.steps} steps from {stage.init}"
        )
        started = Round(
            number=number,
            treatment=str(prescription.treatment),
            tasks=prescription.tasks,
            bottleneck=prescription.bottleneck,
            stage=stage,
        )
        self._write(rounds=(*self.log.rounds, started))

    def _decide(self) -> None:
        last = self.log.rounds[-1]
        decision = decide_stage(
            self.measured[last.stage.init],
            self.measured[last.stage.name],
            treated=last.tasks,
            counted=[t for t in self.ground.tasks if t not in self.supplies.later],
            confidence=self.ground.measure.confidence,
        )
        self._say(decision.words)
        settled = msgspec.structs.replace(
            last, kept=decision.kept, helped=decision.helped, words=decision.words
        )
        self._record(
            {
                "name": last.stage.name,
                "event": "kept" if decision.kept else "rolled back",
                "bottleneck": str(last.bottleneck),
                "treatment": last.treatment,
                "words": decision.words,
            }
        )
        self._write(rounds=(*self.log.rounds[:-1], settled))

    # --- running and writing -----------------------------------------------------------------

    def _run(self) -> None:
        """Run all stages of the log; finished ones are no-ops."""
        recipe = msgspec.structs.replace(
            self.ground, stages=tuple(r.stage for r in self.log.rounds)
        )
        run_in(
            self.folder,
            recipe,
            root=self.root,
            engine=self.engine,
            observe=_only_new(self.observe),
            stop=self.stop,
        )
        for name in ("base", *(s.name for s in recipe.stages)):
            self.measured[name] = self.folder.measurement(name)

    @property
    def _spent(self) -> Spent:
        return spent(
            self.folder,
            looks=[OUTSIDE if n == self._outside else n for n in self.measured],
            diagnoses=self.folder.diagnoses(),
        )

    def _model(self, policy: str) -> Path:
        if policy == "base":
            return Path(self.ground.model)
        (model,) = self.folder.models(policy)
        return model

    def _end(self, words: str) -> None:
        self._say(words)
        self._record({"name": self._current, "event": "treatment ended", "words": words})
        self._write(ended=words)

    def _record(self, body: Mapping[str, object]) -> None:
        """A row of the run's ledger, once."""
        recorded = [dict(r.body) for r in self.folder.records() if r.kind is RecordKind.STAGE]
        if dict(body) not in recorded:
            self.folder.ledger.append(RecordKind.STAGE, body)

    def _write(self, *, rounds: tuple[Round, ...] | None = None, ended: str | None = None) -> None:
        self.log = msgspec.structs.replace(
            self.log,
            rounds=self.log.rounds if rounds is None else rounds,
            ended=ended,
        )
        self.folder.write_treatment(self.log)

    def _say(self, text: str) -> None:
        self.observe(Note(text=text))


def dose(left: float, whole: float) -> float | None:
    """The share of a prescribed stage to run with the tokens left; None for nothing.

    As much as there are tokens for. Where a whole stage would leave less than half of another, it
    takes that too: a short second stage needs a measurement and starts at a high learning
    rate.

    Args:
        left: tokens, without those of the measurement that follows.
        whole: tokens that the stage as prescribed would cost.

    Example:
        >>> [dose(left, 100.0) for left in (10, 40, 100, 140, 150, 400)]
        [None, 0.4, 1.0, 1.4, 1.0, 1.0]
    """
    share = left / whole
    if share < SMALLEST_DOSE:
        return None
    return share if share < LONGEST_DOSE else 1.0


def _only_new(observe: Observer) -> Observer:
    """Skips events that an earlier round has already reported."""
    reported = False

    def pass_on(event: Event) -> None:
        nonlocal reported
        if isinstance(event, StageStarted):
            reported = event.finished
        known = isinstance(event, Measured) and event.cached
        loading = isinstance(event, Note) and event.text.startswith("loading")
        if not (reported or known or loading):
            observe(event)

    return pass_on


def _only_warns(gate: Gate) -> Gate:
    return msgspec.structs.replace(gate, otherwise="warn", to=None)


def _length(evidence: Evidence) -> float:
    """Tokens of an answer, overestimated: right answers are often longer."""
    seen = evidence.get("tokens_per_answer")
    return LONGER * seen.value if seen is not None else math.inf


def _nothing_left(found: Diagnosis) -> str:
    """Why there is no next stage."""
    needed = [
        f"{', '.join(p.tasks)} ({p.bottleneck}): {p.obtain}"
        for p in found.prescriptions
        if p.obtain
    ]
    if needed:
        return "nothing at hand helps any more. Needed for " + "; ".join(needed)
    return "nothing is left to treat"
