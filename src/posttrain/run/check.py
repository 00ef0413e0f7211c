"""What must be loaded or run to know that a recipe will work. Trains nothing, writes nothing.

recipe ──▶ base ──▶ every path's plan ──▶ task sets ──▶ other policies ──▶ data files
                                                              one draw of each stage ──▶ Checked

``posttrain plan`` finds what can be read off files in seconds; this finds the rest, before the
first step. A run always begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.core import config
from posttrain.core.events import Note, Observer, Proved, ignore
from posttrain.core.proofs import Proof
from posttrain.core.task import TaskSet
from posttrain.parts.shelf import Reader, Shelf
from posttrain.protocols import DataFile, Engine, Policy
from posttrain.recipe import Recipe
from posttrain.run.adaptable import check_adapters
from posttrain.run.build import StageBuilder, learner_of
from posttrain.run.material import PromptLengths, notes_of, overlaps, sampled_by
from posttrain.run.plan import Plan, PlannedStage, all_plans, model_path
from posttrain.run.rehearsal import rehearse
from posttrain.tasks.trial import try_rewards


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checked:
    """A recipe that will work, and what was loaded to know it."""

    recipe: Recipe  # its types checked
    root: Path
    plans: tuple[Plan, ...]  # one per path through the gates, the one where all pass first
    policies: Mapping[str, Policy]  # the base, and those outside the recipe, by reference
    tasksets: Mapping[str, TaskSet]
    proofs: tuple[Proof, ...]
    shelf: Shelf  # the data files that were rendered

    @property
    def base(self) -> Policy:
        """The model that the recipe begins with."""
        return self.policies["base"]

    @property
    def measured(self) -> list[TaskSet]:
        """The task sets that every policy is measured on."""
        return [self.tasksets[name] for name in self.recipe.measured_tasks]


def check(
    recipe: Recipe,
    *,
    root: Path,
    engine: Engine,
    observe: Observer = ignore,
    has_started: Callable[[PlannedStage], bool] = lambda planned: False,
    rehearse_from: int = 1,
) -> Checked:
    """Load and try everything that a run relies on.

    Args:
        recipe: the configuration.
        root: folder that the recipe's paths are relative to.
        engine: makes policies and learners.
        observe: called with every proof.
        has_started: stages that need not be tried again.
        rehearse_from: stages of at least this many steps take one draw, which is not recorded.

    Raises:
        PosttrainError: what would stop the run, found before it begins.
    """
    recipe = config.checked(recipe)
    observe(Note(text=f"loading {recipe.model}"))
    base = engine.policy(model_path(recipe.model, root))
    plans = all_plans(recipe, root=root, base=base.producer.digest or recipe.model)
    chat = base.renderer.has_template
    tasksets = {name: spec.build(name, root=root, chat=chat) for name, spec in recipe.tasks.items()}
    trial = _Trial(recipe, root, engine, tasksets, observe, {"base": base})
    trial.prove(replace(proof, of="base") for proof in base.proofs)
    ahead = {s.identity: (s, plan) for plan in plans for s in plan.stages if not has_started(s)}
    path = Path(model_path(recipe.model, root)).expanduser()
    check_adapters([planned for planned, _ in ahead.values()], base=path)
    if ahead or not recipe.stages:
        trial.prove(try_rewards(tasksets.values()))
    for planned, _ in ahead.values():
        trial.outside(planned)
    trial.note(notes_of(tasksets))
    for plan in plans:
        trial.read(plan, [s for s in plan.stages if s.identity in ahead])
    drawn = {name for s, _ in ahead.values() for name in s.composition.source.draws_from}
    trial.note(
        overlaps(
            tasksets,
            measured=recipe.measured_tasks if ahead else (),
            drawn=sorted(drawn),
            files=trial.files.values(),
        )
    )
    for planned, plan in ahead.values():
        if planned.spec.budget.steps is None or planned.spec.budget.steps >= rehearse_from:
            trial.rehearse(planned, plan)
    return Checked(
        recipe=recipe,
        root=root,
        plans=tuple(plans),
        policies=trial.policies,
        tasksets=tasksets,
        proofs=tuple(trial.proofs),
        shelf=trial.shelf,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """What was loaded and proved so far."""

    recipe: Recipe
    root: Path
    engine: Engine
    tasksets: Mapping[str, TaskSet]
    observe: Observer
    policies: dict[str, Policy]
    proofs: list[Proof] = field(default_factory=list)
    shelf: Shelf = field(default_factory=Shelf)
    files: dict[tuple[object, ...], DataFile] = field(default_factory=dict)
    lengths: PromptLengths = field(default_factory=PromptLengths)
    seen: set[tuple[str, str, int]] = field(default_factory=set)

    def note(self, notes: Iterable[str]) -> None:
        """Show what a reader should know."""
        for note in notes:
            self.observe(Note(text=note))

    def prove(self, proofs: Iterable[Proof]) -> None:
        """Keep and show proofs."""
        for proof in proofs:
            self.proofs.append(proof)
            self.observe(Proved(proof=proof))

    def outside(self, planned: PlannedStage) -> None:
        """Load the policies that come from outside the recipe."""
        for ref in sorted({planned.init, *planned.references}):
            if ref.startswith("path:") and ref not in self.policies:
                self.observe(Note(text=f"loading {ref.removeprefix('path:')}"))
                self.policies[ref] = policy = self.engine.policy(self._folder(ref))
                self.prove(replace(proof, of=ref) for proof in policy.proofs)

    def read(self, plan: Plan, stages: Sequence[PlannedStage]) -> None:
        """Read all data files, and the prompts, with the tokenizer that their stages have."""
        readers = dict(self.policies)
        for planned in plan.stages:
            reader = readers[planned.init]
            readers[planned.spec.name] = reader
            if planned not in stages:
                continue
            renderer, context = reader.renderer, reader.context
            sampled = sampled_by(planned, self.recipe, self.tasksets)
            self.lengths.check_fit(sampled, renderer=renderer, context=context)
            rows = Reader(root=plan.root, renderer=renderer, context=context, shelf=self.shelf)
            for leaf in planned.composition.source.leaves:
                key = (config.digest(leaf), renderer.digest, context)
                if key in self.seen:  # paths through the gates share their stages' data
                    continue
                self.seen.add(key)
                stream = leaf.rows(rows)
                for file in stream.files if stream is not None else ():
                    self._found(file)

    def _found(self, file: DataFile) -> None:
        """A data file was read; the first time, say what was found."""
        key = (file.name, file.digest, *file.notes)
        if key not in self.files:
            self.files[key] = file
            self.note(f"data set {file.name}: {note}" for note in file.notes)
            self.prove(file.proofs)

    def rehearse(self, planned: PlannedStage, plan: Plan) -> None:
        """Take one draw of a stage."""
        build = StageBuilder(
            root=self.root,
            seed=self.recipe.seed,
            tasksets=self.tasksets,
            policy=self._policy,
            shelf=self.shelf,
        )
        proof = rehearse(
            planned,
            plan,
            build=build,
            learner=lambda: learner_of(
                planned, engine=self.engine, recipe=self.recipe, folder=self._folder
            ),
            observe=self.observe,
        )
        self.prove(() if proof is None else (proof,))

    def _policy(self, ref: str) -> Policy:
        return self.policies[ref if ref in self.policies else "base"]

    def _folder(self, ref: str) -> str:
        name = ref.removeprefix("path:") if ref.startswith("path:") else self.recipe.model
        return model_path(name, self.root)
