"""The tour: the lab's data files and recipe, in the form of a user's own.

    base ─▶ expand (SFT) ─▶ reshape (GRPO) ─▶ prefer (DPO) ─▶ consolidate (OPD)
             reverse          products          chains          every task, each from the
             demonstrations   own rollouts      pairs           policy that was best at it

A run does not depend on the lab: the tour is a recipe file like any other.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.core import config
from posttrain.core.documents import write_yaml
from posttrain.core.files import write_atomic
from posttrain.core.learner import Optimizer
from posttrain.lab.corpus import demonstrations, preference_pairs, write_rows
from posttrain.lab.settings import CHAINS, REVERSE, SETTINGS
from posttrain.measure.spec import Measure
from posttrain.parts.composition import method
from posttrain.parts.distillation.presets import Opd
from posttrain.parts.policy.presets import Grpo
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Sft
from posttrain.recipe import Budget, Recipe, Stage

BASE = Path(__file__).parent / "base"
"""The lab's base model, in ordinary Hugging Face format."""

ANSWER = 8
"""Longest answer in tokens, the end of the turn included."""


def tour_recipe(*, seed: int = 0, model: str = str(BASE)) -> Recipe:
    """The tour as a recipe. Its data files are those of :func:`write_tour`."""
    return Recipe(
        name="tour",
        model=model,
        seed=seed,
        threads=1,
        tasks={s.name: s.tasks for s in SETTINGS.values()},
        measure=Measure(samples=256, max_new_tokens=ANSWER, seed=7),
        stages=(
            Stage(
                name="expand",
                intends="expansion",
                method=Sft(
                    data=Dataset(
                        path="demonstrations.jsonl", name="lab-demonstrations", licence="CC0-1.0"
                    )
                ),
                budget=Budget(steps=320),
                groups_per_step=64,
                optimizer=Optimizer(lr=1e-3, warmup_steps=10, schedule="linear"),
            ),
            Stage(
                name="reshape",
                intends="reshaping",
                method=Grpo(
                    tasks=("products",),
                    group_size=16,
                    max_new_tokens=ANSWER,
                    aggregate="token_mean",
                ),
                budget=Budget(steps=60),
                groups_per_step=32,
                optimizer=Optimizer(lr=2e-4),
            ),
            Stage(
                name="prefer",
                intends="reshaping",
                method=method(
                    "dpo",
                    data=Dataset(path="preferences.jsonl", name="lab-pairs", licence="CC0-1.0"),
                ),
                budget=Budget(steps=100),
                groups_per_step=32,
                optimizer=Optimizer(lr=2e-4, warmup_steps=5, schedule="linear"),
            ),
            Stage(
                name="consolidate",
                intends="consolidation",
                method=Opd(
                    tasks=tuple(SETTINGS),
                    teachers={
                        "sums": "base",
                        "calculate": "base",
                        "products": "reshape",
                        "chains": "prefer",
                        "reverse": "expand",
                    },
                    max_new_tokens=ANSWER,
                ),
                budget=Budget(steps=120),
                groups_per_step=80,
                optimizer=Optimizer(lr=1e-3, warmup_steps=5, schedule="linear"),
            ),
        ),
    )


def write_tour(out: Path, *, seed: int = 0) -> Path:
    """Write the tour's data and recipe under ``out/inputs``; returns the recipe's path.

    Equal seeds give equal files, so writing them again changes nothing.
    """
    inputs = out / "inputs"
    demos = demonstrations(REVERSE, seed=seed, count=3000)
    write_rows(inputs / "demonstrations.jsonl", (d.row for d in demos))
    pairs = preference_pairs(CHAINS, seed=seed, count=1800)
    write_rows(inputs / "preferences.jsonl", pairs)
    recipe = config.plain(tour_recipe(seed=seed))
    path = inputs / "recipe.yaml"
    write_atomic(path, write_yaml(recipe))
    return path
