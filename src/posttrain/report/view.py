"""The content of a report: a run as read from its folder, with derived statistics.

    run folder ──run/history.py──▶ RunHistory ──load.py──▶ RunReport ──render.py──▶ report.html

Nothing here copies a domain type: a :class:`RunReport` holds them, so that a page is a pure
function of one value, without reading files or computing statistics. It may be incomplete: an
empty tuple, ``None`` or a number that is not finite means "not measured", and the page says so or
leaves the part out; it never shows a zero instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.core.proofs import Proof
from posttrain.core.trajectory import Trajectory
from posttrain.measure.attribution import MeasuredRole, PolicyChange
from posttrain.measure.profile import Profile
from posttrain.measure.retained import Retained
from posttrain.recipe import Recipe
from posttrain.run.history import StageHistory
from posttrain.run.ledger import Record, Verified


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A trajectory to show: ``texts`` [T] holds every token as text."""

    trajectory: Trajectory
    texts: tuple[str, ...]
    reward: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageReport:
    """One stage: its record, its effect, and some samples."""

    record: StageHistory
    roles: tuple[tuple[str, MeasuredRole], ...] = ()  # by task set, as measured
    change: PolicyChange | None = None  # from the policy it started from
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyReport:
    """A measured policy: the base, or the model after a stage."""

    name: str
    tasks: tuple[Profile, ...]

    def task(self, name: str) -> Profile | None:
        """Its profile on a task set; None where it was not measured."""
        return next((t for t in self.tasks if t.task == name), None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunReport:
    """The content of a page. ``policies`` starts with the base, in the order of the stages."""

    recipe: Recipe
    machine: str  # in words
    began: Record | None = None  # the ledger's last row of kind RUN
    ledger: Verified | None = None  # None: the chain does not hold
    alarms: tuple[str, ...] = ()  # files that are not what the ledger records, in words
    stages: tuple[StageReport, ...] = ()  # those that have started
    policies: tuple[PolicyReport, ...] = ()
    whole: PolicyChange | None = None  # base to final
    retained: tuple[Retained, ...] = ()
    tokens_measured: int = 0  # sampled to measure
    proofs: tuple[Proof, ...] = ()  # each once

    @property
    def base_model(self) -> str:
        """The base model's short name: the last part of a path or hub id."""
        return Path(self.recipe.model).name

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task sets with a measured policy, in the order of their first appearance."""
        return tuple(dict.fromkeys(t.task for p in self.policies for t in p.tasks))
