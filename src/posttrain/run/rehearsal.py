"""One timed draw of a stage before the run begins, in the real loop and with nothing recorded.

PlannedStage ──▶ learner, parts ──run_stage──▶ first draw, its updates ──▶ Proof: seconds a step

A stage that starts from an earlier one is tried from the base, whose shapes and tokens are the
same: what only depends on the weights is not decided by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.core.errors import DataError, Interrupted, ModelError
from posttrain.core.events import Event, Note, Observer, StepDone, ignore
from posttrain.core.proofs import Proof, Subject
from posttrain.parts.legality import Admission
from posttrain.protocols import Learner, Stateful
from posttrain.run.build import StageBuilder
from posttrain.run.plan import Plan, PlannedStage
from posttrain.training.stage import run_stage

WORTH = 20
"""A run rehearses stages of at least this many steps: a rehearsal is at most 5 % of a stage."""


class Unrecorded:
    """A log that keeps nothing and has nothing to resume from."""

    def resume(self, learner: Learner, *also: Stateful) -> int:
        """Step 0."""
        return 0

    def metrics(self) -> Sequence[Mapping[str, float]]:
        """None."""
        return ()

    def record(self, step: int, admission: Admission, metrics: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def commit(self, step: int, learner: Learner, *also: Stateful) -> None:
        """Nothing is kept."""


@dataclass(slots=True, eq=False)
class _Steps:
    """Counts steps and their seconds."""

    num: int = 0
    seconds: float = 0.0

    def observe(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.num += 1
            self.seconds += event.seconds


def rehearse(
    planned: PlannedStage,
    plan: Plan,
    *,
    build: StageBuilder,
    learner: Callable[[], Learner],
    observe: Observer = ignore,
) -> Proof | None:
    """Take the first draw of a stage, and its updates.

    Args:
        planned: the stage.
        plan: the plan it is of.
        build: makes its parts; the policy of an earlier stage is the base's.
        learner: makes its learner; an earlier stage's weights are the base's.
        observe: called with a note where the stage cannot be tried yet.

    Returns:
        The proof, with the seconds of a step; None where the stage cannot be tried yet.

    Raises:
        PosttrainError: what would stop the stage at its first step.
    """
    spec = planned.spec
    earlier = {s.spec.name: s for s in plan.stages}
    awaited = [earlier[r] for r in {planned.init, *planned.references} if r in earlier]
    heads = sorted(s.spec.name for s in awaited if s.composition.scalar_head is not None)
    if heads:
        _later(spec.name, f"it asks the scalar head of {', '.join(heads)}", observe)
        return None
    seen = _Steps()
    try:
        tried = learner()
        parts = build.parts(planned, tried)
        steps = planned.steps(parts.source.num_groups)
        run_stage(
            spec,
            parts,
            steps=steps,
            journal=Unrecorded(),
            observe=seen.observe,
            stop=lambda: True,
        )
    except Interrupted:
        pass
    except (DataError, ModelError) as error:
        if not awaited:
            raise
        _later(spec.name, f"with the base in place of earlier stages, {error.found}", observe)
        return None
    each = seen.seconds / seen.num
    return Proof(
        subject=Subject.STEP,
        of=spec.name,
        words=f"{seen.num} of {steps} steps tried"
        + (", from the base" if awaited else "")
        + f": {each:.2g} s a step"
        + "".join(f"; {proof.words}" for proof in tried.policy.proofs),
        seconds=seen.seconds,
        figures={"seconds_per_step": each, "steps": float(steps)},
    )


def _later(stage: str, why: str, observe: Observer) -> None:
    observe(Note(text=f"stage {stage} is tried when it starts: {why}"))
