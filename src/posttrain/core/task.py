"""A task: one prompt, and what a verifier needs to score a completion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from posttrain.core.provenance import Role


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt. ``prompt`` is a conversation, or plain text without a chat template.

    Example:
        >>> Task(taskset="sums", prompt="1+1=", answer="2").key
        'sums/f5ee968b8893e73e'
    """

    taskset: str
    prompt: tuple[Message, ...] | str
    answer: str | None = None
    columns: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def text(self) -> str:
        """The question: the last turn's content, or the plain prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1].content

    @property
    def key(self) -> str:
        """``<task set>/<content hash>``: the same question has the same key in every run."""
        turns = (
            self.prompt
            if isinstance(self.prompt, str)
            else [[m.role, m.content] for m in self.prompt]
        )
        content = json.dumps([turns, self.answer], ensure_ascii=False)
        return f"{self.taskset}/{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def with_context(task: Task, context: str, **shown: str) -> Task:
    """The task with privileged context: its last turn is replaced by a filled-in template.

    Args:
        task: question and answer.
        context: a template with ``{question}``, and ``{answer}`` or a name in ``shown``.
        shown: further texts by name.

    Example:
        >>> sums = Task(taskset="sums", prompt="1+1=", answer="2")
        >>> with_context(sums, "The answer is {answer}. {question}").prompt
        'The answer is 2. 1+1='
    """
    content = context.format(question=task.text, answer=task.answer, **shown)
    if isinstance(task.prompt, str):
        return replace(task, prompt=content)
    *before, last = task.prompt
    return replace(task, prompt=(*before, Message(role=last.role, content=content)))


class TaskSet(Protocol):
    """A named set of prompts with a scorer. Deterministic: same configuration, same tasks."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sequence[Task]:
        """Tasks a source may draw. Never holds a prompt of ``held_out``."""
        ...

    @property
    def held_out(self) -> Sequence[Task]:
        """Tasks for probes only, never for training."""
        ...

    @property
    def success(self) -> float:
        """A score of at least this counts as solved."""
        ...

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        """One finite score per completion.

        Raises:
            TaskError: the scorer raised, or returned the wrong number of scores or a NaN.
        """
        ...


@runtime_checkable
class ReportsRows(Protocol):
    """Optional property of a task set: what a reader should know about its rows, in words."""

    @property
    def notes(self) -> Sequence[str]: ...


@runtime_checkable
class ReadsAnswers(Protocol):
    """Optional method of a task set: the final answer in a completion, as its scorer reads it.

    Probes count distinct answers with it. Without it, two completions have the same answer when
    their texts are equal up to whitespace.
    """

    def final_answer(self, completion: str) -> str: ...
