"""The cost of a treatment in tokens: counted afterwards, and estimated before.

The unit is one token that was sampled, or that went through a training step (a prompt counts once
per step for all its answers). Sampling for measurements and probes counts too. Forward passes of
reference, teacher and reward models are not counted, for any method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.provenance import Kind
from posttrain.diagnosis.card import Diagnosis
from posttrain.measure.measurement import Measurement
from posttrain.models.folder import read_folder
from posttrain.parts.base import Signal, Source
from posttrain.recipe import Recipe
from posttrain.run.folder import RunFolder
from posttrain.run.plan import make_plan
from posttrain.run.preview import facts_of, leaf_tokens, volume
from posttrain.run.stage_folder import StageFolder
from posttrain.run.store import tokens_by_producer


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens by what they were spent on."""

    looking: int  # sampled by measurements and probes
    sampled: int  # sampled for training
    trained: int  # passed through a training step

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.looking + self.sampled + self.trained


def spent(
    out: RunFolder,
    *,
    looks: Sequence[str] = (),
    diagnoses: Sequence[int] = (),
    stages: Sequence[StageFolder] | None = None,
) -> Spent:
    """The cost of a run folder so far, from its files.

    Args:
        out: the run folder.
        looks: the policies whose measurements count; a final evaluation that every method gets
            may be left out.
        diagnoses: numbers of the diagnoses that count.
        stages: the stages that count; None for all.
    """
    stages = out.stages() if stages is None else stages
    looking = sum(_sampled(out.measurement(name)) for name in looks)
    for number in diagnoses:
        card = out.diagnosis(number)
        looking += Diagnosis.from_json(card).cost.sampled_tokens
    uses = tokens_by_producer([file for stage in stages for file in stage.use_files()])
    rolled = sum(u.completion_tokens for u in uses if u.kind in (Kind.LEARNER, Kind.TEACHER))
    trained = sum(int(line["tokens"]) for stage in stages for line in stage.metrics())
    return Spent(looking=looking, sampled=rolled, trained=trained)


def _sampled(found: Measurement) -> int:
    return sum(int(task.lengths.sum()) for task in found.tasks)


def expected(recipe: Recipe, *, root: Path, lengths: Mapping[str, float]) -> float:
    """The expected cost of the last stage of a recipe.

    Args:
        recipe: its model must be a folder on this disk.
        root: folder that its paths are relative to.
        lengths: mean tokens of an answer by task set; a plan alone has only an upper bound.
    """
    plan = make_plan(recipe, root=root, base="estimate")
    planned, facts = plan.stages[-1], facts_of(plan, read_folder(Path(recipe.model)))
    spec = planned.spec
    if planned.composition.source.has_end:
        amount = volume(planned, facts)
        return float(amount.prompts + amount.completions)
    groups = math.ceil(planned.steps(None) / spec.updates_per_draw) * spec.groups_per_step
    total = 0.0
    for leaf, (prompts, completions) in leaf_tokens(planned, facts, groups=groups):
        total += prompts
        if leaf.longest is not None:
            length = sum(lengths[t] for t in leaf.draws_from) / len(leaf.draws_from)
            completions *= min(length / leaf.longest, 1.0)
            completions *= 1 + _trained_share(planned.composition.signals, leaf)
        total += completions
    return total


def _trained_share(signals: Sequence[Signal], leaf: Source) -> float:
    """Share of sampled tokens that are trained on: all, or the best of a group."""
    return min((s.trained_share(leaf.group_size) for s in signals), default=1.0)
