"""Resolving a recipe: its stages, their legality and their identities. Writes nothing.

A stage's identity is the hash of what it depends on: its resolved configuration, the content of
its data, the task sets it draws from, and the identities of its initial, reference and teacher
models. Its name counts too, since it seeds the stage's randomness. Paths, gates and checkpoint
intervals do not count: they do not change the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from posttrain.core.bounds import MOST_STEPS
from posttrain.core.config import digest, plain
from posttrain.core.errors import ConfigError, nearest
from posttrain.core.learner import MOVING
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import TaskSet
from posttrain.measure.gates import Detour, check_gate
from posttrain.models.files import model_digest
from posttrain.models.folder import read_folder
from posttrain.parts.base import LEARNER
from posttrain.parts.composition import Composition
from posttrain.parts.legality import check_composition
from posttrain.parts.registry import code_of
from posttrain.recipe import Recipe, Stage
from posttrain.run.folder import require_recorded
from posttrain.run.scorers import check_scorers

MAX_PATHS = 64
"""Most paths through the gates of one recipe."""

SEMANTICS = 3
"""Incremented when the same configuration comes to mean another computation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage with its composition expanded and its references resolved."""

    spec: Stage
    composition: Composition
    init: str  # "base", an earlier stage's name, or "path:..."
    inputs: Mapping[str, object]  # what the identity is the hash of
    identity: str

    @property
    def references(self) -> frozenset[str]:
        """Policies that its parts refer to, without the one it starts from."""
        return frozenset(self.composition.references())

    @property
    def provenance(self) -> str:
        """Where its trajectories come from, in words: the regime, then the origin."""
        source = self.composition.source
        return f"{source.regime}: {source.origin}"

    def steps(self, num_rows: int | None) -> int:
        """The budget in optimiser steps; ``num_rows`` is the length of its data set.

        A draw of ``groups_per_step`` rows gives ``updates_per_draw`` steps.
        """
        budget, spec = self.spec.budget, self.spec
        if budget.steps is not None:
            return budget.steps
        if num_rows is None or budget.epochs is None:
            raise ConfigError(
                f"stage {self.spec.name}: a budget in epochs on rollouts or a mix",
                expected="a budget in steps: rollouts have no end, nor has a mix",
            )
        draws = budget.epochs * num_rows / spec.groups_per_step
        steps = max(1, math.ceil(draws * spec.updates_per_draw))
        if steps > MOST_STEPS:
            raise ConfigError(
                f"stage {self.spec.name}: {budget.epochs:g} epochs are {steps:,} steps",
                expected=f"at most {MOST_STEPS:,}",
            )
        return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A resolved and legal recipe, on one path through its gates."""

    recipe: Recipe
    root: Path  # paths in the recipe are relative to it
    stages: tuple[PlannedStage, ...]  # stages of the path, in order
    final: str  # the policy that the path ends with: a stage, or "base"

    def stage(self, name: str) -> PlannedStage:
        """The stage of that name."""
        return next(s for s in self.stages if s.spec.name == name)


def make_plan(
    recipe: Recipe, *, root: Path, base: str, detours: Mapping[str, Detour] = MappingProxyType({})
) -> Plan:
    """Resolve every stage of a path, check that it is legal, and compute its identity.

    Args:
        recipe: the configuration.
        root: folder that its paths are relative to.
        base: digest of the base model (or its name, while it is not on disk).
        detours: decisions of gates, by stage; all other gates are assumed to pass.

    Raises:
        ConfigError: an unknown task set, stage, policy or option value.
        LegalityError: a composition that cannot work.
        DataError: a data file that does not exist.
    """
    if not recipe.stages and not recipe.tasks:
        raise ConfigError(
            f"recipe {recipe.name} has nothing to do: no stages, and no task sets to measure on",
            expected="stages, or tasks, or both",
        )
    _check_gates(recipe)
    identities = {"base": base}
    planned: list[PlannedStage] = []
    previous = "base"
    for spec in stages_of(recipe, detours):
        composition = spec.method.compose()
        init = previous if spec.init == "previous" else spec.init
        outside = [r for r in (init, *composition.references()) if r.startswith("path:")]
        known = {**identities, "learner": "learner"} | {r: _outside(r, root) for r in outside}
        known["input"] = known.get(init, init)
        if composition.moving is not None:
            known[MOVING] = MOVING
        _check_references(init, composition, known, stage=spec.name)
        _check_since(spec, known)
        _check_tasks(composition, recipe, stage=spec.name)
        check_composition(composition, stage=spec.name)
        heads = {s.spec.name: s.composition.scalar_head for s in planned}
        check_scorers(composition, heads, recipe.model, init=init, root=root, stage=spec.name)
        inputs = _inputs(spec, composition, recipe, known, init=init, root=root)
        identity = digest(inputs)
        planned.append(
            PlannedStage(
                spec=spec, composition=composition, init=init, inputs=inputs, identity=identity
            )
        )
        if not composition.source.has_end:
            planned[-1].steps(None)
        identities[spec.name] = identity
        previous = init if detours.get(spec.name, Detour()).rolled_back else spec.name
    return Plan(recipe=recipe, root=root, stages=tuple(planned), final=previous)


def stages_of(recipe: Recipe, detours: Mapping[str, Detour]) -> Iterator[Stage]:
    """The stages of one path: each is followed by a gate's target, its ``then``, or the next."""
    names = [s.name for s in recipe.stages]
    position = 0
    while position < len(names):
        stage = recipe.stages[position]
        yield stage
        target = detours.get(stage.name, Detour()).to or stage.then
        position = (
            position + 1
            if target is None
            else len(names)
            if target == "end"
            else names.index(target)
        )


def all_plans(recipe: Recipe, *, root: Path, base: str) -> list[Plan]:
    """A plan per possible path through the gates, the one where all pass first.

    An invalid path is thus found before training, and not at the gate that leads to it.

    Raises:
        ConfigError: more than MAX_PATHS paths; or as :func:`make_plan`, for any of them.
    """
    options: list[list[tuple[str, Detour]]] = []
    for stage in recipe.stages:
        backs = {False, *(True for g in stage.gates if g.otherwise == "roll_back")}
        targets = [None, *dict.fromkeys(g.to for g in stage.gates if g.otherwise == "branch")]
        options.append([(stage.name, Detour(b, t)) for b in sorted(backs) for t in targets])
    num = math.prod(map(len, options))
    if num > MAX_PATHS:
        raise ConfigError(
            f"{num} paths through the gates that branch or roll back",
            expected=f"at most {MAX_PATHS}",
            fix="split the recipe",
        )
    plans = [
        make_plan(recipe, root=root, base=base, detours=dict(choice))
        for choice in itertools.product(*options)
    ]
    known = {tuple(s.identity for s in plan.stages): plan for plan in reversed(plans)}
    return list(reversed(known.values()))


def _check_references(
    init: str, composition: Composition, known: Mapping[str, str], *, stage: str
) -> None:
    """Check that every policy exists, and that only allowed parts refer to the live learner."""
    named = set(composition.references())
    if (MOVING in named) != (composition.moving is not None):
        raise ConfigError(
            f"stage {stage}: {'' if MOVING in named else 'no '}part refers to policy {MOVING!r}, "
            f"and the composition has {'no ' if MOVING in named else 'a '}moving reference",
            expected="both or neither",
            fix="moving: {every: ..., rate: ...} in the composition, or another policy",
        )
    frozen = set(known) - {LEARNER}
    asked = [(init, frozen - {"input", MOVING})]
    if composition.scalar_head is not None:
        asked.append((composition.scalar_head.start, frozen))
    for part in composition.parts:
        usable = set(known) if part.may_ask_learner else frozen
        asked.extend((ref, usable) for ref in part.references())
    for ref, usable in asked:
        if ref not in usable:
            raise ConfigError(
                f"stage {stage} refers to policy {ref!r}",
                expected=f"{', '.join(sorted(usable))}, or path:<folder or hub id>",
                fix=nearest(ref, usable),
            )


def model_path(name: str, root: Path) -> str:
    """A folder relative to the recipe when there is one, else the name as a hub id.

    Raises:
        FileChanged: it is a model of a run, and not the one that the run's ledger records.
    """
    if not (root / name).exists():
        return name
    require_recorded(root / name)
    return str(root / name)


def is_hub_id(name: str) -> bool:
    """True for the form ``org/name``.

    Example:
        >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("./model"), is_hub_id("model")
        (True, False, False)
    """
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _outside(ref: str, root: Path) -> str:
    """The identity of a ``path:`` policy: its content hash if it is on disk, else its hub id.

    Raises:
        ConfigError: neither a folder nor the form of a hub id.
        ModelError: a folder that is not a whole model.
    """
    name = ref.removeprefix("path:")
    folder = Path(model_path(name, root)).expanduser()
    if folder.is_dir():
        return model_digest(read_folder(folder).path)
    if folder.exists() or not is_hub_id(name):
        raise ConfigError(
            f"no model folder {root / name}",
            expected="path:<folder or hub id>",
            fix="check the path; it is relative to the recipe's folder",
        )
    return ref


def _check_gates(recipe: Recipe) -> None:
    """Check before training that every gate can be decided."""
    for stage in recipe.stages:
        for gate in stage.gates:
            try:
                check_gate(gate, recipe.measure)
            except ConfigError as error:
                raise ConfigError(
                    f"stage {stage.name}: gate on {error.found}",
                    expected=error.expected,
                    fix=error.fix,
                ) from None


def _check_since(spec: Stage, known: Mapping[str, str]) -> None:
    """Check that gates compare with the base or a stage of this path, which are measured."""
    for gate in spec.gates:
        if gate.looks_back and (gate.since not in known or known[gate.since].startswith("path:")):
            raise ConfigError(
                f"stage {spec.name}: gate since {gate.since!r}, which is not measured before it",
                expected="base, or a stage that is sure to run before",
            )


def _check_tasks(composition: Composition, recipe: Recipe, *, stage: str) -> None:
    for name in sorted(composition.source.draws_from):
        if name not in recipe.tasks:
            raise ConfigError(
                f"stage {stage} draws from task set {name!r}",
                expected="a task set of this recipe",
                fix=nearest(name, recipe.tasks),
            )


def _inputs(
    spec: Stage,
    composition: Composition,
    recipe: Recipe,
    known: Mapping[str, str],
    *,
    init: str,
    root: Path,
) -> dict[str, object]:
    """What the stage's weights depend on, as plain data."""
    source = composition.source
    resolved = {**plain(composition), "source": source.identity(root)}
    tasks = {name: recipe.tasks[name].identity(root) for name in source.draws_from}
    references = {r: known[r] for r in composition.references()}
    # The code of extensions counts by its digest; built-in parts count in `semantics`.
    packages = code_of((*composition.parts, *(recipe.tasks[n] for n in source.draws_from)))
    return {
        **({"extensions": packages} if packages else {}),
        "semantics": SEMANTICS,
        "name": spec.name,
        "composition": resolved,
        "budget": plain(spec.budget),
        "optimizer": plain(spec.optimizer),
        "lora": plain(spec.lora) if spec.lora else None,
        "groups_per_step": spec.groups_per_step,
        "updates_per_draw": spec.updates_per_draw,
        "micro_batch_tokens": spec.micro_batch_tokens,
        **({"activation_checkpointing": True} if spec.activation_checkpointing else {}),
        "max_age": spec.max_age,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "init": known[init],
        "references": references,
        "tasks": tasks,
    }


def protocol_of(recipe: Recipe, tasksets: Sequence[TaskSet], *, root: Path) -> str:
    """Digest of everything that must be equal for two measurements to be comparable.

    Args:
        recipe: sampling and seeds, and the origin of the task sets, scorers included.
        tasksets: the measured task sets.
        root: folder that the recipe's paths are relative to.
    """
    keys = {t.name: [task.key for task in t.held_out] for t in tasksets}
    judged = {t.name: recipe.tasks[t.name].identity(root) for t in tasksets}
    spec = plain(recipe.measure)
    # These affect the analysis of counts and not the counts; task names are also in `keys`.
    del spec["epsilon"], spec["confidence"], spec["tasks"]
    return digest([spec, keys, judged])


def protocol_parts(recipe: Recipe, tasksets: Sequence[TaskSet], *, root: Path) -> dict[str, str]:
    """What :func:`protocol_of` digests, part by part, to show what differs.

    See :class:`posttrain.measure.measurement.Measurement`; ``measure_policy`` adds the template.
    """
    spec = recipe.measure
    usual = plain(SamplingSpec())
    words = [
        f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in plain(spec.sampling).items()
        if v != usual[k]
    ]
    words = words or ["the policy's own distribution"]
    parts = {
        "decoding": ", ".join([*words, f"at most {spec.max_new_tokens} tokens"]),
        "samples": f"{spec.samples} per prompt",
        "seeds": f"from {spec.seed}",
    }
    for taskset in tasksets:
        judged = recipe.tasks[taskset.name].identity(root)
        parts[f"prompts of {taskset.name}"] = digest([t.key for t in taskset.held_out])
        # The origin of the prompts is left out: the digest above covers the prompts themselves.
        parts[f"verifier of {taskset.name}"] = digest(
            {k: v for k, v in judged.items() if k not in ("path", "train", "held_out", "seed")}
        )
    return parts
