"""Recipes: what was changed is refused, or plans; what plans runs, where it is small enough."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import yaml

from fuzz import world
from fuzz.frame import Trial
from fuzz.mutate import damaged, mutated
from posttrain.recipe import Recipe, load_recipe
from posttrain.run.preview import preview

RUN_EVERY = 8
"""Of recipes that plan, one in so many is also run."""


def trials(folder: Path, *, num: int, seed: int) -> Iterator[Trial]:
    """Changed recipes of this repository and of every method."""
    valid = [*world.methods().values(), *world.shipped().values()]
    for number in range(num):
        rng = random.Random(f"recipe/{seed}/{number}")
        tree, words = mutated(rng.choice(valid), rng, times=rng.choice((1, 1, 1, 2, 3, 8)))
        content = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode(errors="replace")
        if rng.random() < 0.1:
            content, more = damaged(content, rng)
            words = f"{words}; {more}"
        path = folder / f"recipe-{number}.yaml"
        path.write_bytes(content)
        yield Trial(number, words, _Plan(path, run=number % RUN_EVERY == 0), ("plan", path.name))


class _Plan:
    """Plan a recipe in its folder, and run it where that is cheap."""

    def __init__(self, path: Path, *, run: bool) -> None:
        self._path, self._run = path, run

    def __call__(self) -> bool:
        recipe = load_recipe(self._path)
        planned = preview(recipe, root=self._path.parent)
        if self._run and is_small(recipe):
            return run_recipe(recipe, out=self._path.with_suffix(""), root=self._path.parent)
        return bool(planned)


def is_small(recipe: Recipe) -> bool:
    """True when a run takes seconds."""
    spec = recipe.measure
    sizes = [spec.samples / 8, spec.max_new_tokens / 16]
    for stage in recipe.stages:
        sizes += [
            (stage.budget.steps or 2) / 2,
            stage.groups_per_step / 8,
            (stage.budget.epochs or 0),
        ]
        for option in ("group_size", "max_new_tokens", "samples", "top_k"):
            value = getattr(stage.method, option, None)
            sizes.append((value if isinstance(value, int) else 0) / 16)
    return max(sizes) <= 1 and len(recipe.stages) <= 2


def run_recipe(recipe: Recipe, *, out: Path, root: Path) -> bool:
    """Run it; True when something was trained or measured."""
    from posttrain.api import run

    outcome = run(recipe, out=out, root=root)
    return bool(recipe.stages or recipe.measured_tasks) and outcome.out.is_dir()
