"""One trial: a call that may only finish, or raise an error of the tree, within a minute."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from posttrain.cli.ends import explained
from posttrain.core.errors import PosttrainError

LIMIT = 60
"""Seconds after which a trial counts as a hang, on a machine that is not overloaded."""

COMMAND_LIMIT = 180
"""Seconds of a command: a process begins with importing PyTorch."""


class Hang(BaseException):
    """The time is up. Not an Exception, so that nothing under test catches it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One input: its number, what was done to a valid one, and the call that reads it."""

    number: int
    words: str
    call: Callable[[], object]  # returns what was done; nothing is a fault
    command: tuple[str, ...] = ()  # the same through the command line, in the working folder


@dataclass(slots=True)
class Tally:
    """Outcomes of many trials."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, trial: Trial, outcome: str, words: str, seconds: float) -> None:
        """Count one outcome; keep what is a fault."""
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, seconds)
        if outcome not in ("done", "refused"):
            self.faults.append(f"{outcome} {trial.number}: {trial.words}: {words}")
            print(f"  {self.faults[-1]}", flush=True)

    def line(self, kind: str) -> str:
        """The figures of one kind."""
        parts = [f"{count} {name}" for name, count in sorted(self.outcomes.items())]
        return f"{kind}: {', '.join(parts)}; slowest {self.slowest:.1f} s"


def run_trials(trials: Iterable[Trial], tally: Tally, *, loud: bool = False) -> None:
    """Call every trial in this process."""
    for trial in trials:
        began = time.monotonic()
        outcome, words = _outcome(trial, loud=loud)
        tally.add(trial, outcome, words, time.monotonic() - began)


class Caught:
    """Keeps what a block raises, of any kind: what is under test may raise anything."""

    error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error
        return True


def _outcome(trial: Trial, *, loud: bool) -> tuple[str, str]:
    before, done = os.getcwd(), None
    with (
        Caught() as caught,
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stderr(nothing),
        _time_limit(_patience(LIMIT)),
    ):
        done = trial.call()
    os.chdir(before)
    error = caught.error
    if error is None:
        return ("done", "") if done else ("nothing", "success, with nothing done")
    if loud:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, Hang):
        return "hang", f"over {_patience(LIMIT)} s"
    told = error if isinstance(error, PosttrainError) else explained(error)
    if told is not None and not isinstance(error, SystemExit):
        return "refused", str(told)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.filename}:{place.lineno}"
    return "traceback", f"{type(error).__name__}: {error!s:.200} at {where}"


def _patience(seconds: int) -> int:
    """A time limit on a machine that others use too: longer by as much as it is overloaded."""
    return math.ceil(seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def over(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_commands(trials: Iterable[Trial], tally: Tally, *, where: Path) -> None:
    """Run trials as commands, in processes of their own.

    A success must leave something: a command that ends with 0 prints what it did.
    """
    for trial in trials:
        began = time.monotonic()
        limit = _patience(COMMAND_LIMIT)
        command = [sys.executable, "-m", "posttrain", *trial.command]
        try:
            ran = subprocess.run(
                command, cwd=where, capture_output=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            tally.add(trial, "hang", f"over {limit} s", limit)
            continue
        said = (ran.stdout + ran.stderr).decode(errors="replace")
        outcome = {0: "done", 2: "refused", 3: "done"}.get(ran.returncode, "traceback")
        if "Traceback (most recent call last)" in said:
            outcome = "traceback"
        if outcome == "done" and not ran.stdout.strip():
            outcome = "nothing"
        tally.add(trial, outcome, " ".join(said[-300:].split()), time.monotonic() - began)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed again, whatever was put into it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
