"""Prompts that only measuring may use, to find them in what is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from posttrain.core.provenance import Role
from posttrain.core.task import Message, TaskSet

Asked = tuple[Message, ...] | str
"""A prompt: a conversation, or plain text."""


@final
@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out prompts of task sets, by what they ask.

    Spaces, line breaks and system turns do not tell prompts apart.

    Example:
        >>> from posttrain.core.task import Message
        >>> held = HeldOut(MappingProxyType({"1 + 1?": "sums"}))
        >>> held.owner(" 1 +  1?"), held.owner((Message(Role.USER, "1 + 1?"),)), held.owner("2?")
        ('sums', 'sums', None)
    """

    owners: Mapping[str, str]  # the name of a task set, by question

    @classmethod
    def of(cls, tasksets: Iterable[TaskSet]) -> HeldOut:
        """Those of some task sets."""
        owners = {
            question(task.prompt): taskset.name for taskset in tasksets for task in taskset.held_out
        }
        return cls(MappingProxyType(owners))

    def owner(self, prompt: Asked) -> str | None:
        """The task set that holds a prompt out; None when none does."""
        return self.owners.get(question(prompt))

    def among(self, prompts: Iterable[Asked]) -> Mapping[str, list[str]]:
        """The distinct questions among some prompts that are held out, by task set."""
        found: dict[str, dict[str, None]] = {}
        if self.owners:
            for asked in map(question, prompts):
                if (name := self.owners.get(asked)) is not None:
                    found.setdefault(name, {})[asked] = None
        return {name: list(asked) for name, asked in found.items()}


def question(prompt: Asked) -> str:
    """What a prompt asks: its turns without system turns, with single spaces."""
    if isinstance(prompt, str):
        return " ".join(prompt.split())
    turns = [m.content for m in prompt if m.role is not Role.SYSTEM]
    return "\n".join(" ".join(turn.split()) for turn in turns)
