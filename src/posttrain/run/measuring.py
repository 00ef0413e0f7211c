"""Measuring a model on a recipe's task sets, without a run folder.

recipe, model ──▶ policy ──▶ task sets, as chat or plain text ──▶ Measurement
"""

from __future__ import annotations

from pathlib import Path

from posttrain.core.events import Observer, Proved, ignore
from posttrain.core.task import TaskSet
from posttrain.measure.measure import measure_policy
from posttrain.measure.measurement import Measurement
from posttrain.protocols import Engine, Policy
from posttrain.recipe import Recipe
from posttrain.run.plan import model_path, protocol_of, protocol_parts
from posttrain.tasks.trial import try_rewards


def measure_model(
    recipe: Recipe, *, root: Path, engine: Engine, observe: Observer = ignore
) -> Measurement:
    """Measure the recipe's model on its task sets.

    Args:
        recipe: its stages are ignored.
        root: folder that the recipe's paths are relative to.
        engine: makes the policy.
        observe: called with every event.
    """
    policy = engine.policy(model_path(recipe.model, root))
    return measure_for_recipe(recipe, policy, root=root, observe=observe)


def measure_for_recipe(
    recipe: Recipe, policy: Policy, *, root: Path, observe: Observer = ignore
) -> Measurement:
    """Measure any policy on the recipe's task sets; the recipe's model and stages are ignored."""
    tasksets = measured_tasksets(recipe, policy, root=root)
    for proof in try_rewards(tasksets):
        observe(Proved(proof=proof))
    return measure_policy(
        policy.producer.name,
        policy,
        tasksets,
        spec=recipe.measure,
        protocol=protocol_of(recipe, tasksets, root=root),
        parts=protocol_parts(recipe, tasksets, root=root),
        observe=observe,
    )


def measured_tasksets(recipe: Recipe, policy: Policy, *, root: Path) -> list[TaskSet]:
    """The task sets that a recipe measures, as chat prompts if the policy has a chat template."""
    chat = policy.renderer.has_template
    return [recipe.tasks[n].build(n, root=root, chat=chat) for n in recipe.measured_tasks]
