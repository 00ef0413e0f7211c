"""Running and measuring from Python, on this machine. The only module that chooses an engine.

from posttrain import Recipe
from posttrain.api import run

run(Recipe(...), out=Path("out/mine"))

Paths are made absolute here, once: code that a recipe calls may change the working folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from posttrain.core.events import Observer, ignore
from posttrain.diagnosis.between import Between
from posttrain.diagnosis.between import between as compare_models
from posttrain.diagnosis.card import Diagnosis
from posttrain.diagnosis.diagnose import BUDGET, Practice, find_bottleneck
from posttrain.diagnosis.prescribe import NOTHING, Supplies
from posttrain.diagnosis.rules import RuleBook, load_rules
from posttrain.diagnosis.treat import Treated, run_treatment
from posttrain.engines.local.engine import LocalEngine
from posttrain.engines.local.loading import pick_device
from posttrain.measure.measurement import Measurement
from posttrain.protocols import Engine
from posttrain.recipe import Recipe
from posttrain.run import pipeline
from posttrain.run.check import Checked
from posttrain.run.check import check as check_recipe
from posttrain.run.measuring import measure_model
from posttrain.run.pipeline import Outcome
from posttrain.run.plan import model_path
from posttrain.run.resume import Consent
from posttrain.run.trust import check_trust


def run(
    recipe: Recipe,
    *,
    out: Path,
    root: Path = Path(),
    observe: Observer = ignore,
    stop: Callable[[], bool] = lambda: False,
    trust_code: bool = False,
    accept: Sequence[str] = (),
    restart: Sequence[str] = (),
) -> Outcome:
    """Run a recipe in this process, or resume it.

    Args:
        recipe: the configuration.
        out: the run folder.
        root: folder that the recipe's paths are relative to.
        observe: called with every event.
        stop: called between draws; True commits and raises ``Interrupted``.
        trust_code: allow code from outside ``root``.
        accept: changes under started stages to go on with, by the names that a refusal lists.
        restart: stages to set aside and start again, with what builds on them.
    """
    check_trust(recipe, root=root, trust_code=trust_code)
    return pipeline.run(
        recipe,
        out=out.absolute(),
        root=root.absolute(),
        engine=engine_for(recipe, root=root),
        observe=observe,
        stop=stop,
        consent=Consent.to(accept=accept, restart=restart),
    )


def check(
    recipe: Recipe,
    *,
    root: Path = Path(),
    observe: Observer = ignore,
    trust_code: bool = False,
) -> Checked:
    """Load and try everything that a run of the recipe relies on; trains and writes nothing.

    Args:
        recipe: the configuration.
        root: folder that the recipe's paths are relative to.
        observe: called with every proof.
        trust_code: allow code from outside ``root``.

    Raises:
        PosttrainError: what would stop the run.
    """
    check_trust(recipe, root=root, trust_code=trust_code)
    return check_recipe(
        recipe, root=root.absolute(), engine=engine_for(recipe, root=root), observe=observe
    )


def measure(
    recipe: Recipe,
    *,
    root: Path = Path(),
    observe: Observer = ignore,
    trust_code: bool = False,
) -> Measurement:
    """Measure the recipe's model on its task sets; its stages are ignored."""
    check_trust(recipe, root=root, trust_code=trust_code)
    return measure_model(
        recipe, root=root.absolute(), engine=engine_for(recipe, root=root), observe=observe
    )


def compare(
    recipe: Recipe,
    before: str,
    after: str,
    *,
    root: Path = Path(),
    observe: Observer = ignore,
    trust_code: bool = False,
) -> Between:
    """Compare two models, measured on the recipe's task sets; its model and stages are ignored."""
    check_trust(recipe, root=root, trust_code=trust_code)
    return compare_models(
        recipe,
        before,
        after,
        root=root.absolute(),
        engine=engine_for(recipe, root=root),
        observe=observe,
    )


def diagnose(
    recipe: Recipe,
    *,
    root: Path = Path(),
    supplies: Supplies = NOTHING,
    book: RuleBook | None = None,
    budget: int | None = None,
    observe: Observer = ignore,
    trust_code: bool = False,
) -> Diagnosis:
    """Find what holds the recipe's model back on its task sets; its stages are ignored.

    Args:
        recipe: model, task sets and measuring.
        root: folder that the recipe's paths are relative to.
        supplies: demonstrations, teachers and other inputs that are available for training.
        book: the rules; None for the default ones.
        budget: most rollouts to sample; None for the default.
        observe: called with every event.
        trust_code: allow code from outside ``root``.
    """
    check_trust(recipe, root=root, trust_code=trust_code)
    return find_bottleneck(
        recipe,
        root=root.absolute(),
        engine=engine_for(recipe, root=root),
        supplies=supplies,
        practice=Practice(book=book) if book else None,
        budget=budget or BUDGET,
        observe=observe,
    )


def treat(
    recipe: Recipe,
    *,
    out: Path,
    budget: int,
    root: Path = Path(),
    supplies: Supplies = NOTHING,
    book: RuleBook | None = None,
    observe: Observer = ignore,
    stop: Callable[[], bool] = lambda: False,
    trust_code: bool = False,
) -> Treated:
    """Diagnose, prescribe, run and compare, until nothing helps or the budget is used up.

    Args:
        recipe: model, task sets and measuring; its stages are ignored.
        out: the run folder.
        budget: tokens sampled and trained on, diagnosis included.
        root: folder that the recipe's paths are relative to.
        supplies: demonstrations, teachers and other inputs that are available for training.
        book: the rules; None for the default ones.
        observe: called with every event.
        stop: called between draws; True commits and raises ``Interrupted``.
        trust_code: allow code from outside ``root``.
    """
    check_trust(recipe, root=root, trust_code=trust_code)
    return run_treatment(
        recipe,
        out=out.absolute(),
        root=root.absolute(),
        engine=engine_for(recipe, root=root),
        budget=budget,
        supplies=supplies,
        book=book or load_rules(),
        observe=observe,
        stop=stop,
    )


def engine_for(recipe: Recipe, *, root: Path) -> Engine:
    """The local engine, configured by the recipe."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    # Engines know models by their folders: code is allowed for that of the recipe's model.
    code = recipe.remote_code and model_path(recipe.remote_code, root.absolute())
    return LocalEngine(device=pick_device(recipe.device), dtype=recipe.dtype, remote_code=code)
