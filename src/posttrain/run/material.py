"""What the prompts and rows of a recipe say about each other, before anything is trained.

task sets ──▶ rows left out, prompts that fit the context
data files ──▶ notes of their own
both ──▶ held-out prompts that stand in what is trained on
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from posttrain.core.errors import TaskError
from posttrain.core.rendering import shortened
from posttrain.core.task import ReportsRows, Task, TaskSet
from posttrain.measure.measure import require_prompts
from posttrain.protocols import DataFile, Renderer
from posttrain.recipe import Recipe
from posttrain.run.plan import PlannedStage

MAX_FRAME = 512
"""Tokens that a template is taken to put around a prompt, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledPrompts:
    """Prompts that are sampled, and how many tokens an answer may have."""

    name: str  # of the task set
    tasks: Sequence[Task]
    max_new_tokens: int
    what_for: str  # in words: a stage, or measuring


def sampled_by(
    planned: PlannedStage, recipe: Recipe, tasksets: Mapping[str, TaskSet]
) -> Iterator[SampledPrompts]:
    """What a stage samples, and what measuring its policy samples.

    Raises:
        TaskError: a task that the stage's source cannot draw.
        DataError: a measured task set without held-out prompts.
    """
    stage = f"stage {planned.spec.name}"
    for leaf in planned.composition.source.leaves:
        for name in leaf.draws_from:
            for task in tasksets[name].train:
                leaf.check_task(task)
        for name in leaf.draws_from if leaf.longest is not None else ():
            yield SampledPrompts(
                name=name,
                tasks=tasksets[name].train,
                max_new_tokens=leaf.longest or 0,
                what_for=stage,
            )
    for name in recipe.measured_tasks:
        require_prompts(tasksets[name])
        yield SampledPrompts(
            name=name,
            tasks=tasksets[name].held_out,
            max_new_tokens=recipe.measure.max_new_tokens,
            what_for="measure",
        )


@final
class PromptLengths:
    """Tokens of prompts. Each is rendered once, and only when it might not fit."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], int] = {}

    def check_fit(
        self, sampled: Iterable[SampledPrompts], *, renderer: Renderer, context: int
    ) -> None:
        """Check that every prompt leaves room for its answer.

        Raises:
            TaskError: a prompt and the most tokens of its answer are longer than the context.
            DataError: the template refuses a prompt.
        """
        for one in sampled:
            room = context - one.max_new_tokens
            close = [task for task in one.tasks if _bytes(task) + MAX_FRAME > room]
            # The first is rendered whatever its length: the template may refuse such prompts.
            lengths = [(self._length(task, renderer), task) for task in (*one.tasks[:1], *close)]
            longest, task = max(lengths, key=lambda found: found[0], default=(0, None))
            if task is not None and longest > room:
                raise _too_long(one, task, longest, context)

    def _length(self, task: Task, renderer: Renderer) -> int:
        key = (renderer.digest, task.key)
        if key not in self._known:
            self._known[key] = len(renderer.prompt(task).tokens)
        return self._known[key]


def _bytes(task: Task) -> int:
    """Bytes of a prompt's texts: no tokenizer makes more tokens of them."""
    turns = [task.prompt] if isinstance(task.prompt, str) else [m.content for m in task.prompt]
    return sum(len(text.encode()) for text in turns)


def _too_long(one: SampledPrompts, task: Task, longest: int, context: int) -> TaskError:
    room = context - longest
    return TaskError(
        f"{one.what_for}: the longest prompt of task set {one.name} ({task.key}: "
        f"{shortened(task.text)}) has {longest} tokens, and an answer may have "
        f"{one.max_new_tokens}",
        expected=f"at most {context} together, the model's context",
        fix=f"set max_new_tokens to at most {room}, or shorten the prompt"
        if room > 0
        else "shorten the prompt, or use a model with a longer context",
    )


def notes_of(tasksets: Mapping[str, TaskSet]) -> Iterator[str]:
    """What a reader should know about the rows of task sets."""
    for name, taskset in tasksets.items():
        if isinstance(taskset, ReportsRows):
            yield from (f"task set {name}: {note}" for note in taskset.notes)


def overlaps(
    tasksets: Mapping[str, TaskSet],
    *,
    measured: Iterable[str],
    drawn: Iterable[str],
    files: Iterable[DataFile],
) -> Iterator[str]:
    """Held-out prompts that stand in what is trained on, in words.

    Args:
        tasksets: by name.
        measured: names of those whose held-out prompts are measured.
        drawn: names of those whose training prompts are drawn.
        files: the data files that stages train on.
    """
    trained = {f"the training part of task set {n}": _texts(tasksets[n].train) for n in drawn}
    trained |= {f"data set {file.name}": file.questions for file in files}
    for name in measured:
        held_out = _texts(tasksets[name].held_out)
        for where, texts in trained.items():
            if both := held_out & texts:
                yield (
                    f"{len(both)} of {len(held_out)} held-out prompts of task set {name} also "
                    f"stand in {where} (one: {shortened(min(both))}): what is measured on them "
                    "was trained on"
                )


def _texts(tasks: Iterable[Task]) -> frozenset[str]:
    return frozenset(" ".join(task.text.split()) for task in tasks)
