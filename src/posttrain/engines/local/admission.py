"""Which requests enter the decoding batch, and when. No tensors here.

    requests ──by prompt, short ones first──▶ Queue ──admit()──▶ prompts to prefill, rows to start

A prompt whose rows do not all fit at once stays *open*: it was prefilled, and its further rows
enter, without another prefill, as others leave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from posttrain.core.provenance import IntArray
from posttrain.protocols import Request

FRESH_SHARE = 8
"""A new prompt enters when all its rows fit, or one eighth of the batch is free: small prefills
cost more per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of the decoding batch.

    ``tokens`` bounds all stored keys and values; a prompt counts once for all its rows. A row
    counts with its maximum number of tokens, so an admitted row is never evicted.
    """

    rows: int
    tokens: int
    prefill_tokens: int
    row_tokens: int  # most tokens that one row can sample

    def room(self, *, prompts: int, width: int) -> int:
        """Rows that fit beside ``prompts`` prompts padded to ``width`` tokens; at least one."""
        by_memory = (self.tokens - prompts * width) // self.row_tokens
        return max(1, min(self.rows, by_memory))


@dataclass(slots=True, eq=False)
class QueuedPrompt:
    """A distinct prompt, its waiting requests, and its slot while it is stored."""

    tokens: IntArray
    waiting: deque[int]
    live: int = 0
    slot: int = -1

    @property
    def is_open(self) -> bool:
        """Whether its keys and values are still needed."""
        return self.live > 0 or bool(self.waiting)


@final
@dataclass(slots=True, eq=False)
class Queue:
    """Waiting prompts, and those whose keys and values are stored (``held``)."""

    limits: Limits
    waiting: deque[QueuedPrompt]
    held: list[QueuedPrompt] = field(default_factory=list)

    @classmethod
    def of(cls, requests: Sequence[Request], limits: Limits) -> Queue:
        """Distinct prompts, sorted by length, so that prompts stored together need less padding."""
        by_tokens: dict[bytes, QueuedPrompt] = {}
        for index, request in enumerate(requests):
            key = request.prompt.tobytes()
            by_tokens.setdefault(key, QueuedPrompt(request.prompt, deque())).waiting.append(index)
        return cls(limits, deque(sorted(by_tokens.values(), key=lambda p: len(p.tokens))))

    @property
    def live(self) -> int:
        """Rows being decoded."""
        return sum(p.live for p in self.held)

    @property
    def num_waiting(self) -> int:
        """Requests that have not entered."""
        return sum(len(p.waiting) for p in (*self.held, *self.waiting))

    def admit(self) -> tuple[list[QueuedPrompt], list[tuple[QueuedPrompt, int]]]:
        """Prompts to prefill now, and (prompt, request) for every row to start now."""
        rows: list[tuple[QueuedPrompt, int]] = []
        for prompt in self.held:
            rows += self._start(prompt, self._free())
        fresh: list[QueuedPrompt] = []
        num_tokens = 0
        while self.waiting:
            prompt = self.waiting[0]
            free = self._free(prompt)
            enough = min(len(prompt.waiting), max(1, self.limits.rows // FRESH_SHARE))
            num_tokens += len(prompt.tokens)
            full = fresh and num_tokens > self.limits.prefill_tokens
            if full or free <= 0 or (free < enough and self.live):
                break
            self.held.append(self.waiting.popleft())
            fresh.append(prompt)
            rows += self._start(prompt, free)
        return fresh, rows

    def _free(self, *more: QueuedPrompt) -> int:
        """Rows that may still enter, given the held prompts and ``more``."""
        prompts = [*self.held, *more]
        width = max((len(p.tokens) for p in prompts), default=0)
        return self.limits.room(prompts=len(prompts), width=width) - self.live

    def _start(self, prompt: QueuedPrompt, most: int) -> list[tuple[QueuedPrompt, int]]:
        num = min(max(most, 0), len(prompt.waiting))
        prompt.live += num
        return [(prompt, prompt.waiting.popleft()) for _ in range(num)]

    def leave(self, prompt: QueuedPrompt) -> None:
        """One row of a prompt has finished."""
        prompt.live -= 1

    def drop_closed(self) -> list[QueuedPrompt]:
        """Drop prompts without live or waiting rows; returns them."""
        closed = [p for p in self.held if not p.is_open]
        if closed:
            self.held = [p for p in self.held if p.is_open]
        return closed
