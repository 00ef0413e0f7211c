"""What must be loaded or run to know that a recipe will work. Trains nothing, writes nothing.

recipe ──▶ base, loaded and proved ──▶ every path's plan ──▶ task sets ──▶ data files ──▶ Checked

``posttrain plan`` finds what can be read off files in seconds; this finds the rest, before the
first step. A run always begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.core import config
from posttrain.core.events import Note, Observer, Proved, ignore
from posttrain.core.proofs import Proof
from posttrain.core.task import TaskSet
from posttrain.protocols import Engine, Policy
from posttrain.recipe import Recipe
from posttrain.run.plan import Plan, PlannedStage, all_plans, model_path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checked:
    """A recipe that will work, and what was loaded to know it."""

    recipe: Recipe  # its types checked
    root: Path
    plans: tuple[Plan, ...]  # one per path through the gates, the one where all pass first
    base: Policy
    tasksets: Mapping[str, TaskSet]
    proofs: tuple[Proof, ...]

    @property
    def measured(self) -> list[TaskSet]:
        """The task sets that every policy is measured on."""
        return [self.tasksets[name] for name in self.recipe.measured_tasks]


def check(
    recipe: Recipe,
    *,
    root: Path,
    engine: Engine,
    observe: Observer = ignore,
    is_finished: Callable[[PlannedStage], bool] = lambda planned: False,
) -> Checked:
    """Load and try everything that a run relies on.

    Args:
        recipe: the configuration.
        root: folder that the recipe's paths are relative to.
        engine: makes policies.
        observe: called with every proof.
        is_finished: stages whose data need not be read again.

    Raises:
        PosttrainError: what would stop the run, found before it begins.
    """
    recipe = config.checked(recipe)
    observe(Note(text=f"loading {recipe.model}"))
    base = engine.policy(model_path(recipe.model, root))
    plans = all_plans(recipe, root=root, base=base.producer.digest or recipe.model)
    chat = base.renderer.has_template
    tasksets = {name: spec.build(name, root=root, chat=chat) for name, spec in recipe.tasks.items()}
    proofs = [replace(proof, of=recipe.model) for proof in base.proofs]
    for plan in plans:
        proofs += _data(plan, base, is_finished)
    for proof in proofs:
        observe(Proved(proof=proof))
    return Checked(
        recipe=recipe,
        root=root,
        plans=tuple(plans),
        base=base,
        tasksets=tasksets,
        proofs=tuple(proofs),
    )


def _data(plan: Plan, base: Policy, is_finished: Callable[[PlannedStage], bool]) -> Iterator[Proof]:
    """Read all data files before training, to find invalid rows early.

    Stages that descend from a model outside the recipe are checked when they start: their
    tokenizer is not loaded yet.
    """
    known = {"base"}
    for planned in plan.stages:
        if planned.init not in known:
            continue
        known.add(planned.spec.name)
        if not is_finished(planned):
            for leaf in planned.composition.source.leaves:
                leaf.rows(root=plan.root, renderer=base.renderer, context=base.context)
    yield from ()
