"""Comparison of two models on the same prompts: changes, KL, and reachability before.

both models ──measure──▶ two Measurements ──attribution──▶ where the change came from
            ──draw, score──▶ KL both ways, the base's view of the successes
newly solved prompts ──importance weights──▶ how probable the successes were before
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.errors import ConfigError, ModelError
from posttrain.core.events import Note, Observer, ignore
from posttrain.core.task import TaskSet
from posttrain.diagnosis.drift import drift
from posttrain.diagnosis.reachability import TaskReach, reachability
from posttrain.measure.measurement import Measurement, require_comparable
from posttrain.measure.reading import Reading
from posttrain.measure.readings import require_prompts
from posttrain.measure.spec import Measure
from posttrain.protocols import Engine, Policy
from posttrain.recipe import Recipe
from posttrain.run.measuring import measure_for_recipe, measured_tasksets
from posttrain.run.plan import model_path

DRIFT_SAMPLES = 16
"""Answers per prompt and model from which distances are estimated."""

FEWEST_DRAWS = 64
"""Answers of the later model per newly solved prompt, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """Measurements of two models on the same prompts, and readings that need both log-probs."""

    before: Measurement
    after: Measurement
    readings: tuple[Reading, ...] = ()  # distances and reach
    reach: tuple[TaskReach, ...] = ()  # of the prompts that only the later model solves
    missing: tuple[str, ...] = ()  # sentences


def between(
    ground: Recipe,
    before: str,
    after: str,
    *,
    root: Path,
    engine: Engine,
    observe: Observer = ignore,
) -> Between:
    """Measure both models in the same way, with KL and reachability from the log-probs of both.

    Args:
        ground: task sets and how to measure; its model and stages are ignored.
        before: a folder or hub id.
        after: a folder or hub id.
        root: folder that the recipe's paths are relative to.
        engine: loads the policies.
        observe: called with every event.

    Raises:
        RunError: the chat templates differ, so that they answer different prompts.
        ConfigError: too few prompts.
    """
    models = [engine.policy(model_path(name, Path())) for name in (before, after)]
    sides = [measure_for_recipe(ground, model, root=root, observe=observe) for model in models]
    require_comparable(*sides)
    require_prompts(sides[0])
    found: list[Reading] = []
    reached: list[TaskReach] = []
    missing: list[str] = []
    for taskset in measured_tasksets(ground, models[0], root=root):
        observe(Note(text=f"what each thinks of the other's answers to {taskset.name}"))
        try:
            found += drift(
                models[1],
                models[0],
                taskset,
                samples=DRIFT_SAMPLES,
                max_new_tokens=ground.measure.max_new_tokens,
                seed=ground.measure.seed,
                sampling=ground.measure.sampling,
                confidence=ground.measure.confidence,
            ).readings
            reach = _reach(models, taskset, sides, ground.measure)
        except (ModelError, ConfigError) as error:  # the measurements are valid without these
            missing.append(f"{taskset.name}: KL and reach: {error}")
            continue
        if reach is not None:
            reached.append(reach)
            found += [reach.reading] if reach.reading else []
    return Between(
        before=sides[0],
        after=sides[1],
        readings=tuple(found),
        reach=tuple(reached),
        missing=tuple(missing),
    )


def _reach(
    models: Sequence[Policy], taskset: TaskSet, sides: Sequence[Measurement], spec: Measure
) -> TaskReach | None:
    """The earlier model's success probability on prompts that only the later one solved.

    The prompts are chosen on the measured samples, and estimated from new samples.
    """
    old, new = (m.task(taskset.name) for m in sides)
    n = old.num_samples
    solved = {
        key
        for key, was, now in zip(old.prompts, old.counts, new.counts, strict=True)
        if was == 0 and now > 0
    }
    tasks = [t for t in taskset.held_out if t.key in solved]
    if not tasks:
        return None
    return reachability(
        models[0],
        models[1],
        taskset,
        samples=max(n, FEWEST_DRAWS),
        max_new_tokens=spec.max_new_tokens,
        seed=spec.seed,
        tasks=tasks,
        sampling=spec.sampling,
        base_counts={t.key: (0, n) for t in tasks},
        confidence=spec.confidence,
    )
