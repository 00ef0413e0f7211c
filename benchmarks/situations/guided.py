"""A small situation in the lab for every method that mixes demonstrations into rollouts.

The task is ``products``: the base answers one in ten rightly. A task's answer is its
demonstration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from posttrain.core.learner import Optimizer
from posttrain.lab.settings import PRODUCTS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.composition import Method
from posttrain.parts.guided.presets import GuidedGrpo, Hpt, Luffy, PrefixRft, Uft
from posttrain.parts.registry import tag_of
from posttrain.recipe import Budget, Recipe, Stage


def situation(method: Method, *, groups: int, lr: float, seed: int) -> Recipe:
    """A recipe of one stage. It needs no data files."""
    name = tag_of(method)
    return Recipe(
        name=f"guided-{name}",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={PRODUCTS.name: PRODUCTS.tasks},
        measure=Measure(samples=32, max_new_tokens=ANSWER, seed=7),
        stages=(
            Stage(
                name=name,
                intends="expansion",
                method=method,
                budget=Budget(steps=40),
                groups_per_step=groups,
                optimizer=Optimizer(lr=lr),
            ),
        ),
    )


def _of(method: Method, *, groups: int = 16, lr: float = 3e-4) -> Callable[[Path, int], Recipe]:
    return lambda _, seed: situation(method, groups=groups, lr=lr, seed=seed)


_TASKS = (PRODUCTS.name,)
SITUATIONS: Mapping[str, Callable[[Path, int], Recipe]] = MappingProxyType(
    {
        "guided_grpo": _of(GuidedGrpo(tasks=_TASKS, start=0.5, draws=20, max_new_tokens=ANSWER)),
        "uft": _of(Uft(tasks=_TASKS, draws=30, max_new_tokens=ANSWER), groups=32),
        "prefix_rft": _of(PrefixRft(tasks=_TASKS, draws=30, max_new_tokens=ANSWER)),
        "hpt": _of(Hpt(tasks=_TASKS, max_new_tokens=ANSWER)),
        "luffy": _of(Luffy(tasks=_TASKS, max_new_tokens=ANSWER), lr=1e-3),
    }
)
"""By the name of the method, or of what it is compared with."""
