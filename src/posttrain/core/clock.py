"""Wall time of a step by activity, each second counted once, and counts of work avoided.

    with clock.timed("score"):            score     ██    ██
        with clock.timed("reference"):    reference   ████        nested time is subtracted

    clock.drain()  ──▶  {"score": 0.2, "reference": 0.4, "idle": 0.1}    sums to the wall time

The code that does the work times it. The stage loop drains the clock once per step, into the
metrics ``seconds/<name>``. A row of metrics therefore holds the time since the previous row:
writing a row, and a checkpoint after it, count to the next one. Each thread has its own clock, and
only the thread of the stage loop is drained. On a GPU, time is counted where the program waits for
the device.

Work that was *not* done is counted with :func:`count`, and drained with the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal, final, get_args

Name = Literal[
    "draw",  # sources: tasks, rows of data, a rollout's time outside prefill and decode
    "prefill",  # reading prompts before the first sampled token
    "decode",  # sampling tokens
    "score",  # signals, without the next three
    "verify",  # verifiers and reward functions
    "reference",  # log-probs under a frozen reference
    "teacher",  # log-probs and distributions of teachers
    "pack",  # legality and packing
    "forward",  # the loss of the micro-batches
    "backward",  # their gradients
    "optimizer",  # clipping and the update
    "journal",  # metrics, shards, checkpoints
    "idle",  # the rest of the wall time
]
"""Activities that are timed separately. Stable: reports and ``metrics.jsonl`` use these names."""

NAMES: tuple[str, ...] = get_args(Name)
PREFIX = "seconds/"
"""Prefix of the metrics that hold these times."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "sampling": ("draw", "prefill", "decode"),
    "judging": ("score", "verify", "reference", "teacher"),
    "training": ("pack", "forward", "backward", "optimizer"),
    "the rest": ("journal", "idle"),
}
"""The names in four groups, for summaries."""


@final
class Clock:
    """Seconds by name. Not shared between threads.

    Example:
        >>> ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
        >>> clock = Clock(lambda: next(ticks))
        >>> with clock.measure("score"):  # from 1 to 10
        ...     with clock.measure("teacher"):  # from 3 to 6
        ...         pass
        >>> clock.drain()
        {'score': 6.0, 'teacher': 3.0, 'idle': 6.0}
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._open: list[str] = []
        self._since = self._drained = now()

    @contextmanager
    def measure(self, name: Name) -> Iterator[None]:
        """Count the time inside to ``name``, without the time of nested measurements."""
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def drain(self) -> dict[str, float]:
        """Seconds by name since the last drain, and ``idle`` for the time not measured."""
        self._credit()
        seconds, self._seconds = self._seconds, {}
        wall, self._drained = self._since - self._drained, self._since
        return {**seconds, "idle": max(wall - sum(seconds.values()), 0.0)}

    def count(self, name: str, number: float) -> None:
        """Add to a count that the next row of metrics shows."""
        self._counts[name] = self._counts.get(name, 0.0) + number

    def drain_counts(self) -> dict[str, float]:
        """The counts since the last drain."""
        counts, self._counts = self._counts, {}
        return counts

    def _credit(self) -> None:
        now = self._now()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)


def _current() -> Clock:
    clock = _CLOCK.get()
    if clock is None:
        clock = Clock()
        _CLOCK.set(clock)
    return clock


def timed(name: Name) -> AbstractContextManager[None]:
    """Count the time inside a ``with`` to ``name``, without the time of nested measurements."""
    return _current().measure(name)


def drain() -> dict[str, float]:
    """Seconds by name since this thread's last drain; time not measured is ``idle``."""
    return _current().drain()


def count(name: str, number: float) -> None:
    """Add to a count that the next row of metrics shows."""
    _current().count(name, number)


def drain_counts() -> dict[str, float]:
    """This thread's counts since the last drain."""
    return _current().drain_counts()


def seconds_in(metrics: Mapping[str, float]) -> dict[str, float]:
    """The times in a row of metrics, by name.

    Example:
        >>> seconds_in({"loss": 0.1, "seconds/decode": 2.0})
        {'decode': 2.0}
    """
    return {k.removeprefix(PREFIX): v for k, v in metrics.items() if k.startswith(PREFIX)}
