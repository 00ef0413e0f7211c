"""A small situation in the lab for every method that mixes demonstrations into rollouts.

``reverse`` is out of the base model's reach: no reward without guidance, whatever the number of
samples. Guided methods must get there. Those that only lean on demonstrations start where the
base answers one in ten rightly, on ``products``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from posttrain.lab.settings import PRODUCTS, REVERSE, Setting
from posttrain.lab.tour import ANSWER, BASE
from posttrain.methods import Method
from posttrain.methods.guided import GuidedGrpo, Luffy, PrefixRft, Uft
from posttrain.recipe import Budget, Measure, Optimizer, Recipe, Stage


def situation(
    setting: Setting, method: Method, *, steps: int, groups: int, lr: float, seed: int
) -> Recipe:
    """A recipe of one stage. It needs no data files: a task's answer is its demonstration."""
    name = str(method.__struct_config__.tag)
    return Recipe(
        name=f"guided-{name}",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={setting.name: setting.tasks},
        measure=Measure(samples=32, max_new_tokens=ANSWER, seed=7),
        stages=(
            Stage(
                name=name,
                intends="expansion",
                method=method,
                budget=Budget(steps=steps),
                groups_per_step=groups,
                optimizer=Optimizer(lr=lr),
            ),
        ),
    )


def _of(
    setting: Setting, method: Method, *, steps: int = 40, groups: int = 16, lr: float = 3e-4
) -> Callable[[Path, int], Recipe]:
    return lambda _, seed: situation(setting, method, steps=steps, groups=groups, lr=lr, seed=seed)


_FAR, _NEAR = (REVERSE.name,), (PRODUCTS.name,)
SITUATIONS: Mapping[str, Callable[[Path, int], Recipe]] = MappingProxyType(
    {
        "guided_grpo": _of(
            PRODUCTS, GuidedGrpo(tasks=_NEAR, start=0.5, draws=20, max_new_tokens=ANSWER)
        ),
        "guided_grpo_far": _of(
            REVERSE,
            GuidedGrpo(tasks=_FAR, start=0.8, draws=90, length="binomial", max_new_tokens=ANSWER),
            steps=100,
            groups=32,
        ),
        "uft_far": _of(
            REVERSE,
            Uft(tasks=_FAR, start=0.8, draws=90, nll_weight=0.1, max_new_tokens=ANSWER),
            steps=100,
            groups=64,
        ),
        "uft": _of(PRODUCTS, Uft(tasks=_NEAR, draws=30, max_new_tokens=ANSWER), groups=32),
        "prefix_rft": _of(PRODUCTS, PrefixRft(tasks=_NEAR, draws=30, max_new_tokens=ANSWER)),
        "luffy": _of(PRODUCTS, Luffy(tasks=_NEAR, max_new_tokens=ANSWER), lr=1e-3),
    }
)
"""By the name of the method, or of what it is compared with."""
