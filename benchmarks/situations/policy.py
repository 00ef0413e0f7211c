"""Every policy-gradient method in a situation in which it must learn, on the lab's base model.

The task is ``products``: the base model answers one in ten rightly, so the right answer is within
reach and has to become the usual one. Methods that differ once the policy has moved take two
updates on every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from posttrain.core.learner import Optimizer
from posttrain.lab.settings import PRODUCTS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.composition import method
from posttrain.parts.policy.estimators import (
    Gdpo,
    Gpg,
    LitePpo,
    Opo,
    PassAtK,
    Reinforce,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    Remax,
    Rloo,
)
from posttrain.parts.policy.presets import (
    AdaptiveEntropy,
    ClipCov,
    Dapo,
    DrGrpo,
    Grpo,
    HighEntropy,
    KlCov,
    Luspo,
)
from posttrain.parts.policy.shapes import OnRollouts
from posttrain.parts.registry import tag_of
from posttrain.recipe import Budget, Recipe, Stage

ROLLOUTS = 128
"""Answers per draw."""

_TASKS = (PRODUCTS.name,)


def situation(method: OnRollouts, *, updates: int, seed: int) -> Recipe:
    """A recipe of one stage, ``updates`` of them on every draw. It needs no data files."""
    name = tag_of(method)
    return Recipe(
        name=f"policy-{name}",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={PRODUCTS.name: PRODUCTS.tasks},
        measure=Measure(samples=32, max_new_tokens=ANSWER, seed=7),
        stages=(
            Stage(
                name=name,
                intends="reshaping",
                method=method,
                budget=Budget(steps=40),
                groups_per_step=ROLLOUTS // method.group_size,
                updates_per_draw=updates,
                optimizer=Optimizer(lr=3e-4),
            ),
        ),
    )


def _of(method: OnRollouts, *, updates: int = 1) -> Callable[[Path, int], Recipe]:
    return lambda _, seed: situation(method, updates=updates, seed=seed)


SITUATIONS: Mapping[str, Callable[[Path, int], Recipe]] = MappingProxyType(
    {
        "grpo": _of(Grpo(tasks=_TASKS, max_new_tokens=ANSWER)),
        "grpo_of_two": _of(Grpo(tasks=_TASKS, group_size=2, max_new_tokens=ANSWER)),
        "dr_grpo": _of(DrGrpo(tasks=_TASKS, max_new_tokens=ANSWER)),
        "dapo": _of(Dapo(tasks=_TASKS, group_size=16, max_new_tokens=ANSWER)),
        "gspo": _of(method("gspo", tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "luspo": _of(Luspo(tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "gmpo": _of(method("gmpo", tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "cispo": _of(method("cispo", tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "sapo": _of(method("sapo", tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "vespo": _of(method("vespo", tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "clip_cov": _of(ClipCov(tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "kl_cov": _of(KlCov(tasks=_TASKS, max_new_tokens=ANSWER), updates=2),
        "high_entropy": _of(HighEntropy(tasks=_TASKS, max_new_tokens=ANSWER)),
        "high_entropy_per_sequence": _of(
            HighEntropy(tasks=_TASKS, over="sequence", max_new_tokens=ANSWER)
        ),
        "adaptive_entropy": _of(AdaptiveEntropy(tasks=_TASKS, max_new_tokens=ANSWER)),
        "reinforce": _of(Reinforce(tasks=_TASKS, group_size=1, max_new_tokens=ANSWER)),
        "rloo": _of(Rloo(tasks=_TASKS, group_size=4, max_new_tokens=ANSWER)),
        "reinforce_plus_plus": _of(
            ReinforcePlusPlus(tasks=_TASKS, group_size=1, max_new_tokens=ANSWER)
        ),
        "reinforce_plus_plus_baseline": _of(
            ReinforcePlusPlusBaseline(tasks=_TASKS, max_new_tokens=ANSWER)
        ),
        "remax": _of(Remax(tasks=_TASKS, group_size=1, max_new_tokens=ANSWER)),
        "opo": _of(Opo(tasks=_TASKS, max_new_tokens=ANSWER)),
        "gpg": _of(Gpg(tasks=_TASKS, max_new_tokens=ANSWER)),
        "lite_ppo": _of(LitePpo(tasks=_TASKS, max_new_tokens=ANSWER)),
        "gdpo": _of(Gdpo(tasks=_TASKS, length_cache=2, max_new_tokens=ANSWER)),
        "pass_at_k": _of(PassAtK(tasks=_TASKS, k=4, max_new_tokens=ANSWER)),
    }
)
"""A recipe per method, from a folder for its inputs and a seed."""
