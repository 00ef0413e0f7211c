"""How each member of a group begins: what its policy reads, and what the record says.

    task ──▶ Opening: prompt │ given ──policy reads──▶ completion ──▶ prompt │ given │ completion

The code of ``composition/company.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.composition.company import Company, Guided, Hinted, Rival
from posttrain.core.errors import TaskError
from posttrain.core.protocols import Prompt, Renderer
from posttrain.core.provenance import IntArray, Producer, Role, Span
from posttrain.core.task import Task, with_context

NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opening:
    """Where one member of a group starts from."""

    prompt: Prompt  # in the record
    reads: IntArray  # [T] what the policy is given to go on from
    given: tuple[IntArray, Producer] | None = None  # somebody else's start of the answer
    learn: bool = False  # what is given is trained too
    by_rival: bool = False
    whole: bool = False  # nothing is left to write
    told: bool = False  # the policy read another prompt than the record's


def openings(
    company: Company | None, task: Task, renderer: Renderer, *, size: int, draw: int, seed: int
) -> list[Opening]:
    """One per member of a group, those of the company last.

    Args:
        company: how the last members differ.
        task: the question.
        renderer: of the policy that answers.
        size: members of the group.
        draw: its number, for what moves over a stage.
        seed: of the group's own choices.
    """
    prompt = renderer.prompt(task)
    plain = Opening(prompt=prompt, reads=prompt.tokens)
    if company is None:
        return [plain] * size
    number = size if company.members is None else company.members
    match company:
        case Guided():
            other = _guided(company, task, renderer, prompt, draw=draw, seed=seed)
        case Rival():
            other = Opening(prompt=prompt, reads=prompt.tokens, by_rival=True)
        case Hinted():
            told = renderer.prompt(with_context(task, company.context))
            other = Opening(prompt=prompt, reads=told.tokens, told=True)
    return [plain] * (size - number) + [other] * number


def demonstration(task: Task, column: str) -> str:
    """The text that guides.

    Raises:
        TaskError: the task has none.
    """
    text = task.answer if column == "answer" else task.columns.get(column)
    if not isinstance(text, str) or not text:
        raise TaskError(
            f"task {task.key} has no text under {column!r} to guide with: {text!r}",
            expected="a demonstration in every task",
            fix="name the column that holds one, or drop the guidance",
        )
    return text


def check_tasks(company: Company | None, tasks: Sequence[Task]) -> None:
    """Find a task without what the company needs before anything is drawn.

    Raises:
        TaskError: as said.
    """
    if isinstance(company, Guided | Hinted):
        column = company.column if isinstance(company, Guided) else "answer"
        for task in tasks:
            demonstration(task, column)


def num_given(spec: Guided, num_tokens: int, *, draw: int, seed: int) -> int:
    """How many of a demonstration's tokens are given.

    Example:
        >>> num_given(Guided(start=0.5, end=0.5), 9, draw=3, seed=0)
        4
    """
    share, rng = spec.share(draw), np.random.default_rng(seed)
    if spec.length == "binomial":
        share = int(rng.binomial(spec.slices, share)) / spec.slices
    elif spec.length == "uniform":
        share = float(rng.uniform(share, spec.start))
    # A hair up: 0.3 * 10 must not become 2 by rounding.
    most = num_tokens if spec.learn else num_tokens - 1
    return min(int(share * num_tokens + 1e-9), most)


def _guided(
    spec: Guided, task: Task, renderer: Renderer, prompt: Prompt, *, draw: int, seed: int
) -> Opening:
    tokens = renderer.answer(task, demonstration(task, spec.column))
    given = tokens[: num_given(spec, len(tokens), draw=draw, seed=seed)]
    author = Producer(kind=spec.author, name=f"{task.taskset}/{spec.column}")
    return Opening(
        prompt=prompt,
        reads=np.concatenate([prompt.tokens, given]).astype(np.int32),
        given=(given, author) if len(given) else None,
        learn=spec.learn,
        whole=len(given) == len(tokens),
    )


def spans_of(opening: Opening, completion: Span | None) -> tuple[Span, ...]:
    """Who wrote what, from the prompt to the end."""
    spans = list(opening.prompt.spans)
    if opening.given is not None:
        tokens, author = opening.given
        spans.append(Span(length=len(tokens), role=Role.ASSISTANT, producer=author))
    return (*spans, completion) if completion is not None else tuple(spans)
