"""A renderer whose tokens are characters, so that everything about them can be worked out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from posttrain.core.provenance import IntArray, Kind, Producer, Role, Span
from posttrain.core.rendering import STRICT, Rules
from posttrain.core.task import Message, Task
from posttrain.core.trajectory import Trajectory
from posttrain.protocols import Prompt


@final
@dataclass(frozen=True, slots=True, eq=False)
class CharRenderer:
    """One token per character (its code point); token 0 ends a turn."""

    has_template: bool = False

    def prompt(self, task: Task) -> Prompt:
        """The task's text, written by the environment."""
        tokens = np.array([ord(c) for c in task.text], np.int32)
        if not len(tokens):
            return Prompt(tokens=tokens, spans=())
        author = Producer(kind=Kind.ENVIRONMENT, name=task.taskset)
        return Prompt(
            tokens=tokens, spans=(Span(length=len(tokens), role=Role.USER, producer=author),)
        )

    def answer(self, task: Task, text: str, *, rules: Rules = STRICT) -> IntArray:
        """The text's characters, then token 0."""
        return np.array([*map(ord, text), 0], np.int32)

    def text(self, tokens: IntArray) -> str:
        """Characters up to the end token."""
        return "".join(chr(t) for t in tokens if t)

    def token_text(self, token: int) -> str:
        """The character; the end token by name."""
        return chr(token) if token else "<end>"

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token 0."""
        return frozenset({0})

    @property
    def digest(self) -> str:
        """All such renderers are alike."""
        return "characters"

    @property
    def remarks(self) -> tuple[str, ...]:
        """Nothing is added."""
        return ()

    def completion(
        self,
        prompt: str,
        completion: str,
        *,
        producer: Producer,
        task: str,
        rules: Rules = STRICT,
    ) -> Trajectory:
        """Two texts, the second by its author and trained."""
        asked = self.prompt(Task(taskset="text", prompt=prompt))
        written = self.answer(Task(taskset="text", prompt=prompt), completion)
        span = Span(length=len(written), role=Role.ASSISTANT, producer=producer)
        return Trajectory(
            task=task,
            tokens=np.concatenate([asked.tokens, written]).astype(np.int32),
            prompt_length=len(asked.tokens),
            spans=(*asked.spans, span),
        )

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        producer: Producer,
        task: str,
        assistant_mask: Literal["template", "prefix"] = "template",
        num_prompt: int | None = None,
        rules: Rules = STRICT,
    ) -> Trajectory:
        """The last message after all others, without a template."""
        *before, last = messages
        prompt = "".join(m.content for m in before)
        return self.completion(prompt, last.content, producer=producer, task=task)

    def show(self, trajectory: Trajectory) -> str:
        """Trained characters in ⟦ ⟧."""
        pairs = zip(trajectory.tokens, trajectory.trainable, strict=True)
        marked = (
            f"⟦{self.token_text(int(t))}⟧" if on else self.token_text(int(t)) for t, on in pairs
        )
        return "".join(marked).replace("⟧⟦", "")
