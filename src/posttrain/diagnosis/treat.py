"""The closed loop: diagnose, prescribe, run, compare, until nothing helps or the budget is spent.

measure base ─▶ diagnose ─▶ prescribe ─▶ run one stage ─▶ measure ─▶ helped? kept? ─┐
                  ▲                                                                  │
                  └──── from the policy that is kept ◀── roll back what did harm ◀───┘

All stages live in one run folder, with one ledger: the recipe grows by a stage per round. What
was decided is written there too, so the same command goes on from where it was.
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
from posttrain.diagnosis.rounds import Chart, Round
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
"""What a policy from outside the run is called; no stage may have this name."""

ROUNDS = 12
"""More stages than this are never a treatment."""

SMALLEST_DOSE = 0.15
"""A stage shorter than this share of its prescription is not worth beginning."""

LONGEST_DOSE = 1.5
"""A stage is made longer, up to this share, where the rest would be too little for another."""

WORTH_A_LOOK = 0.15
"""With less than this share of the budget left, looking again would leave too little to act on."""

LONGER = 1.15
"""Answers are taken to get longer by this factor while a stage trains on them."""

LOOKS = 2300
"""Rollouts of a diagnosis per task set, beside the measurement that the run takes anyway: what
success from a part of an answer needs for 32 prompts, and some more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Treated:
    """How a treatment ended."""

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
    """Treat a model within a budget of tokens, or go on with it.

    Args:
        ground: model, task sets and how to measure; its stages are ignored.
        out: the run folder.
        root: folder that the recipe's paths are relative to.
        engine: makes policies and learners.
        budget: tokens sampled and trained, looking included (see spending.py). A stage that would
            not fit is shortened, or not begun.
        supplies: what there is to work with.
        book: rules and treatments.
        observe: called with every event.
        stop: asked between draws; True commits and raises.

    Raises:
        ResumeRefused: ``out`` holds the treatment of something else.
        RunLocked: another process works in ``out``.
        Interrupted: ``stop`` said so. Call again to go on.
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
        chart = _opened(folder, digest=digest, budget=budget)
        return _Course(ground, folder, root, engine, supplies, book, observe, stop, chart).go()


def _opened(folder: RunFolder, *, digest: str, budget: int) -> Chart:
    """The chart of an earlier process, or a new one. A larger budget reopens what it ended."""
    known = folder.treatment(Chart)
    if known is None:
        return Chart(ground=digest, budget=budget)
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
    chart: Chart
    measured: dict[str, Measurement] = field(default_factory=dict)

    def go(self) -> Treated:
        """Turn until something ends it."""
        self._run()
        self._look_back()
        if self.chart.rounds and self.chart.rounds[-1].kept is None:
            self._decide()
        while self.chart.ended is None:
            self._turn()
        current = self._current
        return Treated(
            out=self.folder.path,
            policy=current,
            model=self._model(current),
            rounds=self.chart.rounds,
            spent=self._spent,
            budget=self.chart.budget,
            ended=self.chart.ended,
            before=self.measured["base"],
            after=self.measured[current],
        )

    def _turn(self) -> None:
        if self._spent.total > (1 - WORTH_A_LOOK) * self.chart.budget:
            self._end("the budget is spent")
            return
        found = self._diagnosis()
        prescription = found.next
        if prescription is None:
            self._end(_nothing_left(found))
        elif len(self.chart.rounds) >= ROUNDS:
            self._end(f"{ROUNDS} rounds were taken")
        else:
            stage = self._fitted(prescription, found)
            if stage is None:
                self._end("the budget does not reach for another stage")
                return
            self._begin(prescription, stage)
            self._run()
            self._decide()

    # --- looking -----------------------------------------------------------------------------

    @property
    def _current(self) -> str:
        """The policy that is gone on from."""
        kept = [r.stage.name for r in self.chart.rounds if r.kept]
        return kept[-1] if kept else "base"

    def _diagnosis(self) -> Diagnosis:
        """The card of the current policy; that of an earlier process when there is one."""
        number = len(self.chart.rounds)
        path = self.folder.diagnosis_file(number)
        if path.is_file():
            return Diagnosis.from_json(path.read_text(encoding="utf-8"))
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
        """Measure the earlier policy that the user brought, once; it may be the best teacher."""
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
        """By task set, the measured policy that was best at it, stages rolled back included."""

        def rate(policy: str, task: str) -> float:
            return float(self.measured[policy].task(task).successes.mean())

        best = {}
        for task in self.ground.tasks:
            rates = {policy: rate(policy, task) for policy in self.measured}
            best[task] = max(rates, key=rates.__getitem__)
        return MappingProxyType(best)

    def _earlier(self, best: Mapping[str, str]) -> Measurement:
        """The best that was ever measured on each task set, as if of one policy."""
        first = self.measured["base"]
        return replace(
            first, tasks=tuple(self.measured[best[t.taskset]].task(t.taskset) for t in first.tasks)
        )

    def _tried(self) -> frozenset[tuple[str, str]]:
        """What did not help from the policy that is current, so that it is not tried again."""
        failed: set[tuple[str, str]] = set()
        for r in self.chart.rounds:
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
        # Decisions are the loop's: a gate of an earlier stage must not end a later process.
        gates = tuple(_only_warns(gate) for gate in stage.gates)
        name = f"{len(self.chart.rounds) + 1}-{stage.name}"
        stage = msgspec.structs.replace(stage, name=name, init=self._current, gates=gates)
        whole = expected(
            msgspec.structs.replace(
                self.ground, stages=(*(r.stage for r in self.chart.rounds), stage)
            ),
            root=self.root,
            lengths={t.task: _length(t.evidence) for t in found.tasks},
        )
        # The stage is measured afterwards, like the base was.
        left = self.chart.budget - self._spent.total - spent(self.folder, looks=("base",)).looking
        share = dose(left, whole)
        if share is None or stage.budget.steps is None:
            return None
        steps = max(1, int(stage.budget.steps * share))
        return msgspec.structs.replace(stage, budget=Budget(steps=steps))

    def _begin(self, prescription: Prescription, stage: Stage) -> None:
        number = len(self.chart.rounds) + 1
        self._say(
            f"round {number}: {prescription.title} ({', '.join(prescription.tasks)}), "
            f"{stage.budget.steps} steps from {stage.init}"
        )
        begun = Round(
            number=number,
            treatment=str(prescription.treatment),
            tasks=prescription.tasks,
            bottleneck=prescription.bottleneck,
            stage=stage,
        )
        self._write(rounds=(*self.chart.rounds, begun))

    def _decide(self) -> None:
        last = self.chart.rounds[-1]
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
        self._write(rounds=(*self.chart.rounds[:-1], settled))

    # --- running and writing -----------------------------------------------------------------

    def _run(self) -> None:
        """Everything that the chart holds; what is finished is not run again."""
        recipe = msgspec.structs.replace(
            self.ground, stages=tuple(r.stage for r in self.chart.rounds)
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
            self.folder.open_ledger().append(RecordKind.STAGE, body)

    def _write(self, *, rounds: tuple[Round, ...] | None = None, ended: str | None = None) -> None:
        self.chart = msgspec.structs.replace(
            self.chart,
            rounds=self.chart.rounds if rounds is None else rounds,
            ended=ended,
        )
        self.folder.write_treatment(self.chart)

    def _say(self, text: str) -> None:
        self.observe(Note(text=text))


def dose(left: float, whole: float) -> float | None:
    """How much of a prescribed stage to run with so many tokens left; None for nothing.

    As much as there are tokens for. Where a whole stage would leave less than half of another, it
    takes that too: a short second stage would have to be looked at, and begins with a high rate.

    Args:
        left: tokens, without those of the look that follows.
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
    """Leaves out what an earlier round has reported already."""
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
    """Tokens of an answer, taken a little long: right answers often are."""
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
