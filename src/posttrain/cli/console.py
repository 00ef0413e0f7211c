"""Progress display of a run: a live line in a terminal, plain lines in a log."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, final

from rich.console import Console as Terminal
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from posttrain.core.clock import seconds_in
from posttrain.core.events import (
    AlarmRaised,
    Event,
    GateDecided,
    Measured,
    Measuring,
    Note,
    Proved,
    StageStarted,
    StepDone,
)

if TYPE_CHECKING:
    from posttrain.run.pipeline import Outcome

PLAIN_EVERY = 10.0
"""Seconds between lines where output is not a terminal."""

SMOOTHING = 0.8
"""Weight of the old value in the moving averages of tokens and seconds per step."""


@final
class Console:
    """Shows events. Use it as a context manager; output goes to standard error."""

    def __init__(self) -> None:
        self._terminal = Terminal(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("  {task.description:<12}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            console=self._terminal,
            transient=True,
        )
        self._bar: TaskID | None = None
        self._seconds_per_step = 0.0
        self._tokens_per_second = 0.0
        self._seconds: dict[str, float] = {}  # of the stage so far, by activity
        self._last_line = 0.0
        self._stage_began = time.monotonic()

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clear()
        self._progress.stop()

    # --- lines -------------------------------------------------------------------------------

    def headline(self, name: str, out: Path) -> None:
        """The first line: the name of the run, and its folder."""
        here = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
        self._terminal.print(
            f"[bold]posttrain[/bold] {escape(name)} → {escape(str(here))}  (loading …)"
        )

    def note(self, text: str) -> None:
        """What is good to know."""
        self._line(text, style="dim")

    def _line(self, text: str, *, indent: int = 2, style: str = "") -> None:
        """A line; what does not fit goes on below it, indented too."""
        self._terminal.print(Padding(Text(text, style), (0, 0, 0, indent), expand=False))

    def summary(self, outcome: Outcome, report: Path) -> None:
        """The last lines: the change from base to final policy, and the report's path."""
        from posttrain.cli.tables import outcome_table

        self._terminal.print()
        print(outcome_table(outcome.out, final=outcome.final))
        if outcome.stopped_by:
            self._terminal.print(f"stopped by a gate: {outcome.stopped_by}", markup=False)
        print(f"\nreport: {report.resolve()}")

    # --- events ------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Show one event."""
        match event:
            case StageStarted():
                self._stage(event)
            case StepDone():
                self._step(event)
            case AlarmRaised():
                self._alarm(event)
            case Measuring():
                self._measuring(event)
            case Measured():
                self._measured(event)
            case GateDecided():
                mark = "✓" if event.passed else "✗"
                self._line(f"{mark} gate  {event.words}")
            case Note():
                self.note(event.text)
            case Proved():
                proof = event.proof
                self.note(f"proved  {proof.subject} of {proof.of}: {proof.words}")

    def _stage(self, event: StageStarted) -> None:
        self._clear()
        self._stage_began = time.monotonic()
        self._seconds_per_step = self._tokens_per_second = 0.0
        self._seconds = {}
        state = "already finished" if event.finished else f"{event.steps} steps"
        if event.step and not event.finished:
            state = f"going on from step {event.step} of {event.steps}"
        self._terminal.print(f"\n[bold]{event.stage}[/bold]  {event.method} · {state}")
        self.note(event.provenance)
        if not event.finished:
            self._bar = self._progress.add_task(
                event.stage, total=event.steps, completed=event.step, words=""
            )

    def _step(self, event: StepDone) -> None:
        rate = event.num_tokens / max(event.seconds, 1e-9)
        keep = SMOOTHING if self._seconds_per_step else 0.0
        self._seconds_per_step = keep * self._seconds_per_step + (1 - keep) * event.seconds
        self._tokens_per_second = keep * self._tokens_per_second + (1 - keep) * rate
        left = self._seconds_per_step * (event.steps - event.step)
        parts = [f"loss {event.metrics.get('loss', 0.0):.3f}"]
        if "reward" in event.metrics:
            parts.append(f"reward {event.metrics['reward']:.2f}")
        if "zero_variance" in event.metrics:
            parts.append(f"no signal {event.metrics['zero_variance']:.0%}")
        parts.append(f"{self._tokens_per_second:,.0f} tok/s")
        for name, seconds in seconds_in(event.metrics).items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if total := sum(self._seconds.values()):
            most = max(self._seconds, key=lambda name: self._seconds[name])
            parts.append(f"{most} {self._seconds[most] / total:.0%}")
        parts.append(f"{_duration(left)} left")
        words = " · ".join(parts)
        if self._bar is not None:
            self._progress.update(self._bar, completed=event.step, words=words)
        last = event.step == event.steps
        due = time.monotonic() - self._last_line > PLAIN_EVERY
        if last or (due and not self._terminal.is_terminal):
            self._last_line = time.monotonic()
            took = f" · {_duration(time.monotonic() - self._stage_began)}" if last else ""
            self._line(f"step {event.step}/{event.steps}  {words}{took}")

    def _alarm(self, event: AlarmRaised) -> None:
        where = f"{event.stage}, step {event.step + 1}"
        self._line(f"! {where}: {event.words}", style="yellow")
        self._line(f"try: {event.advice}", indent=4, style="dim")

    def _measuring(self, event: Measuring) -> None:
        if self._bar is None or event.done == 0:
            self._clear()
            self._bar = self._progress.add_task("measuring", total=event.total, words=event.policy)
        self._progress.update(self._bar, completed=event.done)

    def _measured(self, event: Measured) -> None:
        self._clear()
        values = "  ".join(
            f"{task} {value:.2f} [{low:.2f}, {high:.2f}]"
            for task, (value, low, high) in event.pass_at_1.items()
        )
        again = " (measured before)" if event.cached else ""
        self._line(f"pass@1 of {event.policy}{again}: {values}")

    def _clear(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None


def _duration(seconds: float) -> str:
    """Seconds in human-readable form.

    Example:
        >>> _duration(7.4), _duration(130)
        ('7 s', '2 min 10 s')
    """
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


@contextmanager
def interrupts(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that is True once the process was asked to end; asked again, it raises.

    Ctrl-C, SIGTERM (what a scheduler sends) and SIGHUP (a closed terminal) ask. A signal that is
    ignored already stays so: under ``nohup`` a run goes on without its terminal.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step; Ctrl-C again stops at once (the last checkpoint is safe)")

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    heard = [kind for kind in kinds if before[kind] is not signal.SIG_IGN]
    for kind in heard:
        signal.signal(kind, handle)
    try:
        yield lambda: asked
    finally:
        for kind in heard:
            signal.signal(kind, before[kind])
