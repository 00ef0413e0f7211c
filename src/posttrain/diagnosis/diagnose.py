"""One whole diagnosis: examine, apply the rules, prescribe.

ground recipe, supplies ──examine──▶ Evidence ──rules──▶ TaskDiagnosis ──prescribe──▶ Diagnosis
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from posttrain.core import config
from posttrain.core.errors import ConfigError, nearest
from posttrain.core.events import Observer, ignore
from posttrain.core.files import write_atomic
from posttrain.diagnosis.card import Diagnosis
from posttrain.diagnosis.conditions import diagnose_task
from posttrain.diagnosis.examine import SAMPLES, Examination
from posttrain.diagnosis.page import render_card
from posttrain.diagnosis.prescribe import NOTHING, Supplies, prescribe
from posttrain.diagnosis.rules import RuleBook, load_rules
from posttrain.measure.measurement import Measurement
from posttrain.models.folder import read_folder
from posttrain.protocols import Engine
from posttrain.recipe import Recipe
from posttrain.run.plan import is_hub_id, model_path, protocol_of

BUDGET = 60_000
"""Default rollouts of a diagnosis: five task sets of 32 prompts with 64 samples each are 10,000,
continuations another 10,000, and the rest goes to undetermined labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Existing measurements of the model and of the earlier policy."""

    now: Measurement | None = None
    before: Measurement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Practice:
    """Options of rules and prescriptions."""

    book: RuleBook = field(default_factory=load_rules)
    name: str = "next"  # of the recipe
    dose: float = 1.0
    tried: frozenset[tuple[str, str]] = frozenset()


def find_bottleneck(
    ground: Recipe,
    *,
    root: Path,
    engine: Engine,
    supplies: Supplies = NOTHING,
    practice: Practice | None = None,
    budget: int = BUDGET,
    known: Known = Known(),
    labels: bool = True,
    observe: Observer = ignore,
    stop: Callable[[], bool] = lambda: False,
) -> Diagnosis:
    """Find the bottleneck of a model, and write the recipe of the next stage.

    Args:
        ground: model, task sets and how to measure; its stages are ignored.
        root: folder that its paths are relative to.
        engine: loads policies.
        supplies: demonstrations, teachers and other resources for a stage.
        practice: rules, and the name and scale of the recipe.
        budget: maximum number of rollouts.
        known: existing measurements.
        labels: spend the rest of the budget on labels of which prompts are in reach.
        observe: called with every event.
        stop: called between probes; True interrupts.

    Raises:
        ConfigError: no task sets, too few prompts or too small a budget.
        PosttrainError: a model or task set that cannot be used.
    """
    practice = practice or Practice()
    ground = grounded(ground, root=root)
    if not ground.tasks:
        raise ConfigError("no task sets", expected="at least one to diagnose the model on")
    for name in supplies.later:
        if name not in ground.tasks:
            raise ConfigError(f"later task set {name!r}", fix=nearest(name, ground.tasks))
    looked = _examination(ground, root=root, engine=engine, supplies=supplies, known=known)
    looked.budget, looked.labels = budget, labels
    looked.observe, looked.stop = observe, stop
    tasks = tuple(diagnose_task(e, practice.book) for e in looked.evidence())
    return Diagnosis(
        model=ground.model,
        digest=looked.policy.producer.digest or looked.policy.producer.name,
        rules=config.digest(practice.book),
        seed=ground.measure.seed,
        confidence=ground.measure.confidence,
        tasks=tasks,
        cost=looked.cost,
        prescriptions=prescribe(
            tasks,
            book=practice.book,
            ground=ground,
            supplies=supplies,
            num_weights=_size(ground.model),
            name=practice.name,
            dose=practice.dose,
            tried=practice.tried,
        ),
    )


def _examination(
    ground: Recipe, *, root: Path, engine: Engine, supplies: Supplies, known: Known
) -> Examination:
    """Load the policies and task sets to examine."""
    policy = engine.policy(model_path(ground.model, Path()))
    before = None
    if supplies.before is not None and known.before is None:
        before = engine.policy(model_path(supplies.before, Path()))
    tasksets = [
        spec.build(n, root=root, chat=policy.renderer.has_template)
        for n, spec in ground.tasks.items()
    ]
    asked = {n: supplies.teacher_for(n) for n in ground.tasks}
    named = sorted({m for m in asked.values() if m})
    loaded = {m: engine.policy(model_path(m, Path())) for m in named}
    return Examination(
        policy=policy,
        before=before,
        teachers={n: loaded[m] for n, m in asked.items() if m},
        tasksets=tasksets,
        spec=ground.measure,
        protocol=protocol_of(ground, tasksets, root=root),
        supplies=supplies,
        measured=known.now,
        earlier=known.before,
    )


def grounded(recipe: Recipe, *, root: Path) -> Recipe:
    """The recipe without stages, with absolute paths and the measuring that the rules need."""
    samples = max(recipe.measure.samples, SAMPLES)
    model = model_path(recipe.model, root)
    if not Path(model).exists() and not is_hub_id(model):
        raise ConfigError(f"no model {recipe.model}", fix="check the path, or give a hub id")
    return msgspec.structs.replace(
        recipe,
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        tasks={n: t.located(root) for n, t in recipe.tasks.items()},
        stages=(),
        measure=msgspec.structs.replace(recipe.measure, tasks=(), samples=samples),
    )


def _size(model: str) -> int | None:
    """Number of weights of a model folder; None for one that is not on this disk."""
    return read_folder(Path(model)).num_weights if Path(model).is_dir() else None


def write_diagnosis(found: Diagnosis, out: Path) -> list[Path]:
    """Write ``diagnosis.html``, ``diagnosis.json``, and ``next.yaml`` when there is a next stage.

    Returns:
        the paths.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "diagnosis.html", out / "diagnosis.json"]
    write_atomic(written[1], found.to_json())  # first: a page can be rendered again
    recipe = out / "next.yaml"
    if found.next is not None and found.next.recipe is not None:
        write_atomic(recipe, found.next.recipe)
        written.append(recipe)
    else:
        recipe.unlink(missing_ok=True)  # of an earlier diagnosis
    write_atomic(written[0], render_card(found))
    return written
