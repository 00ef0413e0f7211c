"""A task: one prompt, and what a verifier needs to judge an answer to it."""

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
    """One prompt. ``prompt`` is a conversation, or plain text that no template touches.

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
        """The last user turn, or the plain prompt: what a person would read as the question."""
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
    """The task as somebody reads it who knows more: its last turn told through a template.

    Args:
        task: question and answer.
        context: a template with ``{question}``, and ``{answer}`` or a name in ``shown``.
        shown: further texts by name.

    Example:
        >>> sums = Task(taskset="sums", prompt="1+1=", answer="2")
        >>> with_context(sums, "The answer is {answer}. {question}").prompt
        'The answer is 2. 1+1='
    """
    told = context.format(question=task.text, answer=task.answer, **shown)
    if isinstance(task.prompt, str):
        return replace(task, prompt=told)
    *before, last = task.prompt
    return replace(task, prompt=(*before, Message(role=last.role, content=told)))


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
        """Tasks that only probes may use."""
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
class ReadsAnswers(Protocol):
    """What a task set may offer besides: the final answer in a completion, as its scorer sees it.

    Probes count answers with it. Without it, two completions hold the same answer when their texts
    are equal apart from space.
    """

    def final_answer(self, completion: str) -> str: ...
