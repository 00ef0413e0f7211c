"""A recipe: a model, task sets, stages with gates, and how to measure. Pure data.

recipe.yaml ──load_recipe──▶ Recipe ◀── built in Python

model ──▶ [measure] ──▶ stage 1 ──▶ [measure, gate] ──▶ stage 2 ──▶ … ──▶ report
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from posttrain.core.bounds import Count, Positive, Seed, Threads, Tokens, Whole
from posttrain.core.config import Config, convert
from posttrain.core.documents import read_yaml
from posttrain.core.errors import ConfigError, nearest
from posttrain.core.learner import Lora, Optimizer
from posttrain.core.monitors import Monitors
from posttrain.measure.gates import Gate
from posttrain.measure.spec import Measure
from posttrain.models.code import same_code
from posttrain.parts import composition
from posttrain.parts.base import PolicyRef
from posttrain.tasks import base as task_sets

_NAME = re.compile(r"\w[\w .+-]{0,98}[\w.+-]|\w")
RESERVED = frozenset({"base", "learner", "input", "moving", "previous", "end"})


# --- a stage ---------------------------------------------------------------------------------


class Budget(Config):
    """When a stage ends: after optimiser steps, or after passes over its data set."""

    steps: Count | None = None
    epochs: Positive | None = None

    def __post_init__(self) -> None:
        amounts = [a for a in (self.steps, self.epochs) if a is not None]
        if len(amounts) != 1:
            raise ConfigError(
                f"budget with steps={self.steps}, epochs={self.epochs}",
                expected="exactly one of them",
            )


class Stage(Config):
    """One intervention: a method, a budget and an optimiser.

    ``groups_per_step`` prompts, demonstrations or pairs are drawn at a time; the learner takes
    ``updates_per_draw`` steps on each draw. ``init`` is the policy to start from: ``previous``,
    ``base`` or the name of an earlier stage. ``then`` is the stage that follows, if not the next
    one of the recipe: a later one, or ``end``. ``micro_batch_tokens`` is the size of a
    micro-batch; null lets the engine choose it from the sizes of the model and the device.
    ``activation_checkpointing`` recomputes activations in the backward pass: less memory, about a
    third more work. ``intends`` is a note; the role is measured.
    """

    name: str
    method: composition.AnyMethod
    budget: Budget
    init: PolicyRef = "previous"
    optimizer: Optimizer = Optimizer()
    groups_per_step: Count = 16
    updates_per_draw: Count = 1
    micro_batch_tokens: Tokens | None = None
    activation_checkpointing: bool = False
    max_age: Whole = 0
    lora: Lora | None = None
    checkpoint_every: Count = 25
    gates: tuple[Gate, ...] = ()
    then: str | None = None
    monitors: Monitors = Monitors()
    intends: Literal["expansion", "reshaping", "consolidation"] | None = None

    def __post_init__(self) -> None:
        letters = self.name.replace("-", "").replace("_", "").isalnum()
        if not letters or len(self.name) > 100 or self.name in RESERVED:
            raise ConfigError(
                f"stage name {self.name[:120]!r}",
                expected=f"1 to 100 letters, digits, - and _, and none of {sorted(RESERVED)}",
            )
        if self.updates_per_draw > self.groups_per_step:
            raise ConfigError(
                f"stage {self.name}: {self.updates_per_draw} updates on draws of "
                f"{self.groups_per_step} groups",
                expected="updates_per_draw <= groups_per_step",
            )


# --- the recipe ------------------------------------------------------------------------------


class Recipe(Config):
    """The complete configuration of a run.

    ``remote_code`` must repeat the model's name to allow code from its repository to run.
    ``threads`` is the number of CPU threads; null for the library's default. One is best for tiny
    models: on busy cores, threads that wait for each other cost more than they gain.
    """

    name: str
    model: str
    tasks: dict[str, task_sets.AnyTaskSet] = msgspec.field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    measure: Measure = Measure()
    seed: Seed = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Threads | None = None
    remote_code: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"recipe name {self.name!r}",
                expected="1 to 100 letters, digits, spaces and . _ + -, the first a letter, digit "
                "or _: it names a folder",
            )
        names = [s.name for s in self.stages]
        if doubled := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(f"stages named twice: {doubled}", expected="one name per stage")
        if self.remote_code not in (None, self.model):
            raise ConfigError(
                f"remote_code={self.remote_code!r} for model {self.model!r}",
                expected="null, or exactly the model's name",
            )
        for name in self.tasks:
            if not name.strip() or not name.isprintable() or len(name) > 100:
                raise ConfigError(f"task set {name[:120]!r}", expected="1 to 100 printable letters")
        if unknown := sorted(set(self.measure.tasks) - set(self.tasks)):
            raise ConfigError(
                f"measure.tasks names {unknown[0]!r}", fix=nearest(unknown[0], self.tasks)
            )
        for stage in self.stages:
            for gate in stage.gates:
                if gate.task not in self.measured_tasks:
                    raise ConfigError(
                        f"stage {stage.name}: gate on task {gate.task!r}, which is not measured",
                        fix=nearest(gate.task, self.measured_tasks),
                    )
        self._check_order(names)

    def _check_order(self, names: list[str]) -> None:
        """Targets of a stage must come after it; what its gates compare with, before it."""
        for number, stage in enumerate(self.stages):
            later, earlier = [*names[number + 1 :], "end"], ["base", "input", *names[:number]]
            for target in (stage.then, *(g.to for g in stage.gates)):
                if target is not None and target not in later:
                    raise ConfigError(
                        f"stage {stage.name} goes on with {target!r}",
                        expected=f"a later stage: {', '.join(later)}",
                        fix=nearest(target, later),
                    )
            for gate in stage.gates:
                if gate.since not in earlier:
                    raise ConfigError(
                        f"stage {stage.name}: gate since {gate.since!r}",
                        expected=", ".join(earlier),
                        fix=nearest(gate.since, earlier),
                    )

    @property
    def measured_tasks(self) -> tuple[str, ...]:
        """Names of the task sets that every policy is measured on."""
        return self.measure.tasks or tuple(self.tasks)


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe. Paths in it are relative to its folder.

    Raises:
        ConfigError: the message has the path of the wrong option and the nearest valid name.
    """
    return convert(read_yaml(path), Recipe, origin=str(path))


def measuring_recipe(
    path: Path, *, model: str, samples: int | None = None, name: str = "probe"
) -> Recipe:
    """A recipe without stages that measures ``model`` on the task sets of a YAML file.

    Args:
        path: a recipe, or any YAML mapping with ``tasks``; paths in it are relative to its folder.
        model: a folder, relative to the working directory, or a hub id. Code that the file allows
            for its own model is allowed for this one too if it is the same.
        samples: per prompt, in place of the file's number.
        name: of the recipe.

    Raises:
        ConfigError: no task sets, or an unknown option.
    """
    content: dict[str, object] = dict(read_yaml(path))
    if not content.get("tasks"):
        raise ConfigError(
            f"{path} has no tasks, so there is nothing to measure on",
            expected="a mapping under `tasks`, as in a recipe",
        )
    measure = content.get("measure", {})
    if samples is not None and isinstance(measure, dict):
        measure["samples"] = samples
    chosen: dict[str, object] = {
        "name": name,
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "tasks": content["tasks"],
        "measure": measure,
        **{k: content[k] for k in ("dtype", "device", "threads", "seed") if k in content},
    }
    allowed = content.get("remote_code")
    if isinstance(allowed, str) and _same_code(Path(model), path.parent / allowed):
        chosen["remote_code"] = chosen["model"]
    return convert(chosen, Recipe, origin=str(path))


def _same_code(model: Path, allowed: Path) -> bool:
    return model.is_dir() and allowed.is_dir() and same_code(model, allowed)
