"""Builds the live objects of a planned stage: source, signals, objective.

    PlannedStage ──▶ learner
                 └──▶ Tools: policies, task sets, memory ──▶ source.open, bound(signal) ──▶ Parts

Nothing here knows a part by name: every part declares what it needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.core.errors import LegalityError, ModelError
from posttrain.core.learner import MOVING
from posttrain.core.provenance import Kind
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import Group
from posttrain.models.readers import PROBE
from posttrain.numerics.logits import Head
from posttrain.parts.base import LEARNER, Source, bound
from posttrain.parts.legality import compared_in_the_loss, scopes
from posttrain.parts.memory import Memory
from posttrain.parts.shelf import Shelf
from posttrain.parts.tools import Score, Tools
from posttrain.protocols import Author, Engine, Learner, Policy, Sampler, ScalarStart, Scorer
from posttrain.recipe import Recipe
from posttrain.run.plan import PlannedStage
from posttrain.training.objective import StageObjective
from posttrain.training.stage import Parts


def learner_of(
    planned: PlannedStage, *, engine: Engine, recipe: Recipe, folder: Callable[[str], str]
) -> Learner:
    """The learner of a stage, at its start.

    Args:
        planned: the stage.
        engine: makes it.
        recipe: its name and seed.
        folder: the model folder, or hub id, of a policy's reference.
    """
    spec, head = planned.spec, planned.composition.scalar_head
    scalar = None
    if head is not None:
        start = planned.init if head.start == "input" else head.start
        scalar = ScalarStart(trunk=head.trunk, model=folder(start), lr=head.lr)
    return engine.learner(
        folder(planned.init),
        name=f"{recipe.name}/{spec.name}",
        optimizer=spec.optimizer,
        lora=spec.lora,
        seed=recipe.seed,
        moving=planned.composition.moving,
        scalar=scalar,
        activation_checkpointing=spec.activation_checkpointing,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageBuilder:
    """What building a stage needs from the run."""

    root: Path
    seed: int
    tasksets: Mapping[str, TaskSet]
    policy: Callable[[str], Policy]  # frozen policy behind a reference
    shelf: Shelf = field(default_factory=Shelf)  # data files that were rendered already

    def parts(self, planned: PlannedStage, learner: Learner) -> Parts:
        """Build a stage around its learner."""
        composition, source = planned.composition, planned.composition.source
        memory = Memory() if _rereads_data(planned) else None
        policy = self._finder(planned, learner)
        name, live = planned.spec.name, learner.policy
        # Cached: signals ask for their policies at every draw.
        scoring = functools.cache(lambda ref: _scoring(ref, policy(ref), stage=name))
        rows = _shared_rows(planned, policy, live)
        same = functools.cache(lambda ref: _same_tokens(scoring(ref), live).over(rows))
        heads = _teacher_heads(planned, same)
        tools = Tools(
            live=live,
            policy=same,
            any_policy=scoring,
            sampler=functools.cache(lambda ref: _same_tokens(policy(ref), live)),
            tasksets=self.tasksets,
            root=self.root,
            stage=name,
            seed=self.seed,
            drawn=source.draws_from,
            longest=_longest(source, learner.policy.context),
            memory=memory,
            shelf=self.shelf,
            heads={ref: number for number, ref in enumerate(heads)},
        )
        # Completions that a signal samples itself get the same rewards as those of the group.
        judges = [bound(s, tools) for s in composition.signals if s.judges]
        tools = replace(tools, judge=lambda groups: _in_turn(judges, groups))
        stream = source.open(tools, seed=tools.seed_of())
        return Parts(
            source=stream,
            signals=_signals(planned, tools),
            terms=composition.terms,
            objective=StageObjective(composition.terms, teachers=tuple(heads.values())),
            learner=learner,
            stateful=tuple(s for s in (memory, stream.state) if s is not None),
        )

    def _finder(self, planned: PlannedStage, learner: Learner) -> Callable[[str], Policy]:
        """Finds the policy behind a reference of the stage."""
        own = {LEARNER: learner.policy, MOVING: learner.moving, planned.init: learner.start}
        found = {ref: policy for ref, policy in own.items() if policy is not None}

        def policy(ref: str) -> Policy:
            ref = planned.init if ref == "input" else ref
            return found[ref] if ref in found else self.policy(ref)

        return policy


def _scoring(ref: str, policy: Policy, *, stage: str) -> Policy:
    """The policy, if it also gives log-probs. An engine that only generates has none that do.

    Raises:
        LegalityError: it only generates.
    """
    if not isinstance(policy, Scorer):
        raise LegalityError(
            f"stage {stage}: {ref} is asked for log-probs, and its engine only generates",
            expected="a policy of an engine that scores as well",
            fix="load the model with the local engine, or choose a method that only samples it",
        )
    return policy


def _longest(source: Source, context: int) -> int:
    bounds = [s.longest for s in source.leaves if s.longest is not None]
    return max(bounds, default=context)


def _in_turn(judges: Sequence[Score], groups: Sequence[Group]) -> Sequence[Group]:
    """Apply several judges; each sees the columns that the earlier ones wrote."""
    for judge in judges:
        groups = judge(groups)
    return groups


def _signals(planned: PlannedStage, tools: Tools) -> list[Score]:
    composition = planned.composition
    scores = [bound(s, tools) for s in composition.signals]
    if not composition.source.mixed:
        return scores
    return [scoped(s, k) for s, k in zip(scores, scopes(composition), strict=True)]


def scoped(score: Score, kinds: frozenset[Kind]) -> Score:
    """A signal applied to the groups with an author in ``kinds``; the others pass unchanged."""

    def some(groups: Sequence[Group]) -> Sequence[Group]:
        chosen = [i for i, group in enumerate(groups) if _writers(group) & kinds]
        judged = score([groups[i] for i in chosen]) if chosen else []
        out = list(groups)
        for index, group in zip(chosen, judged, strict=True):
            out[index] = group
        return out

    return some


def _writers(group: Group) -> frozenset[Kind]:
    return frozenset().union(*(member.trajectory.authors for member in group.members))


def _teacher_heads(planned: PlannedStage, policy: Callable[[str], Policy]) -> Mapping[str, Head]:
    """Heads of the teachers that give hidden states, by reference and in order."""
    heads = dict[str, Head]()
    for ref in compared_in_the_loss(planned.composition):
        hidden = policy(ref).hidden
        if hidden is not None:
            heads[ref] = hidden.head
    return heads


def _shared_rows(planned: PlannedStage, policy: Callable[[str], Sampler], live: Policy) -> int:
    """Ids that the distributions of the learner and of all policies with its tokens have."""
    asked = map(policy, sorted(planned.composition.references()))
    alike = [p.rows for p in asked if isinstance(p, Scorer) and p.vocabulary == live.vocabulary]
    return min([live.rows, *alike])


def _rereads_data(planned: PlannedStage) -> bool:
    """Whether frozen policies score trajectories of a data set, which repeat in every epoch."""
    composition = planned.composition
    asked = any(s.remembered for s in composition.signals)
    return asked and any(s.has_end for s in composition.source.leaves)


def _same_tokens(judge: Policy, live: Policy) -> Policy:
    if judge is not live:
        check_same_tokens(judge, live)
    return judge


def check_same_tokens(judge: Author, live: Author) -> None:
    """Check that a policy has the learner's vocabulary and tokenizer.

    The number of output rows may differ: padding behind the tokens is no token.

    Raises:
        ModelError: another vocabulary, or a tokenizer that splits a probe text differently.
    """
    probe = Task(taskset="probe", prompt=PROBE)
    ours, theirs = (p.renderer.prompt(probe).tokens.tolist() for p in (live, judge))
    name = judge.producer.name
    if judge.vocabulary != live.vocabulary:
        alike = "the same ids" if ours == theirs else "other ids"
        raise ModelError(
            f"{name} and the learner have different vocabularies; they give a probe text {alike}",
            expected="the same token ids",
            fix="use a teacher or reference of the same family, or the foreign_teacher signal",
        )
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        raise ModelError(
            f"{name} and the learner share a vocabulary and cut a probe text differently: "
            f"{len(theirs)} and {len(ours)} tokens, the first difference at {at}",
            expected="one tokenizer: the judge would rate token sequences it never saw",
            fix="use the learner's tokenizer files in the other folder, if they belong there",
        )
