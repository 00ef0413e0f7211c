"""Methods with a scalar head in situations in which they must learn, on the lab's base model.

A critic has to raise pass@1 of ``products``, where the base answers one in ten rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from posttrain.core.learner import Optimizer
from posttrain.lab.settings import PRODUCTS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.policy.ppo import Ppo, ValuePretraining, Vapo
from posttrain.parts.policy.shapes import OnRollouts
from posttrain.parts.registry import tag_of
from posttrain.recipe import Budget, Recipe, Stage

ROLLOUTS = 128
"""Answers per draw."""

LENGTH_ALPHA = 1.0
"""The paper's 0.05 looks at nothing but the next token in answers of up to 20 tokens; these have
three."""

_TASKS = (PRODUCTS.name,)


def stage(method: OnRollouts, *, steps: int = 40, updates: int = 1) -> Stage:
    """A stage of one method on fresh rollouts."""
    return Stage(
        name=tag_of(method),
        method=method,
        budget=Budget(steps=steps),
        groups_per_step=ROLLOUTS // method.group_size,
        updates_per_draw=updates,
        optimizer=Optimizer(lr=3e-4),
    )


def situation(*stages: Stage, seed: int) -> Recipe:
    """A recipe of some stages. It needs no data files."""
    return Recipe(
        name=f"values-{stages[-1].name}",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={PRODUCTS.name: PRODUCTS.tasks},
        measure=Measure(samples=32, max_new_tokens=ANSWER, seed=7),
        stages=stages,
    )


def _of(*stages: Stage) -> Callable[[Path, int], Recipe]:
    return lambda _, seed: situation(*stages, seed=seed)


_FITTED = stage(ValuePretraining(tasks=_TASKS, max_new_tokens=ANSWER), steps=20)
_VAPO = Vapo(tasks=_TASKS, max_new_tokens=ANSWER, length_alpha=LENGTH_ALPHA)

SITUATIONS: Mapping[str, Callable[[Path, int], Recipe]] = MappingProxyType(
    {
        "ppo": _of(stage(Ppo(tasks=_TASKS, max_new_tokens=ANSWER), updates=2)),
        "ppo_shared": _of(stage(Ppo(tasks=_TASKS, max_new_tokens=ANSWER, critic="shared"))),
        "value_pretraining": _of(_FITTED),
        "vapo": _of(_FITTED, stage(_VAPO)),
    }
)
"""A recipe per method, from a folder for its inputs and a seed."""
