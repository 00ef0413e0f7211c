"""Running code that is not ours, so that what it breaks stays its own.

call ──▶ our state saved ──▶ its random state in ──▶ its code ──▶ its random state out ──▶ ours back
                                                       └─ raises, exits, hangs ──▶ Failed

Rewards and packages are written by others. Whatever they raise becomes one error that names the
line; what they change in this process is put back. This is no sandbox: such code can read and
write whatever the user can.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from types import FrameType, TracebackType
from typing import Any, TypeVar, final

import numpy as np

from posttrain.core.errors import PosttrainError

T = TypeVar("T")

_EXITS = ("_exit", "execv", "execve")  # of os: they end the process without an exception
_NUDGE = signal.SIGUSR1  # wakes the main thread; a reward's own time limit uses SIGALRM
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, _NUDGE)
_STREAMS = "the standard streams"
_NUDGES = 10  # times, once a second, that code is asked to stop before the process is ended


class Failed(Exception):
    """Code that is not ours did not return. Callers make an error of the tree of it."""

    def __init__(self, words: str, *, place: str | None, ended: bool) -> None:
        super().__init__(words)
        self.words = words if place is None else f"{words}, at {place}"
        self.ended = ended  # it tried to end the process, or took too long: not to be asked again


class _TooLong(BaseException):
    """The time is over. No Exception, so that ``except Exception`` of others lets it pass."""


@final
@dataclass(slots=True, eq=False)
class Contained:
    """Code from one origin, and what is remembered of it between calls.

    It has random numbers, a working directory and environment variables of its own: what it sets
    in one call it finds in the next, and neither side disturbs the other.

    Args:
        files: its source files, to name the line of an error.
        seconds: default time limit of a call. Only the main thread can be interrupted.

    Example:
        >>> Contained(seconds=1.0).run(lambda: 6 * 7)
        42
        >>> Contained(seconds=1.0).run(lambda: 1 // 0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        posttrain.core.contained.Failed: raised ZeroDivisionError: integer division ...
    """

    files: Container[str] = ()
    seconds: float = 60.0
    changed: dict[str, None] = field(default_factory=dict)
    """What it changed in this process, in words. All of it was put back."""
    _random: Mapping[str, Any] | None = None
    _own: Mapping[str, Any] = field(default_factory=dict)

    def run(self, code: Callable[[], T], *, seconds: float | None = None) -> T:
        """Call it.

        Raises:
            Failed: it raised, tried to end the process, or took too long.
            PosttrainError: it raised an error of ours.
            KeyboardInterrupt: Ctrl-C, and not one that the code itself raised.
        """
        limit = self.seconds if seconds is None else seconds
        pid, saved = os.getpid(), _saved_state()
        mine = _random_state()
        streams = [_Stream(stream) for stream in _streams()]
        sys.stdin, sys.stdout, sys.stderr = streams
        depth = sys.getrecursionlimit()
        try:
            _set_random_state(self._random or _fresh_random_state())
            for name, value in self._own.items():
                _STATE[name][1](value)
            with _exits_refused(pid), _limited(limit) as pressed:
                try:
                    return code()
                except PosttrainError:
                    raise
                except KeyboardInterrupt as error:
                    if pressed or not _in_main_thread():
                        raise
                    raise self._failed(error, limit) from error
                except BaseException as error:  # a user's code may raise anything at all
                    raise self._failed(error, limit) from error
                finally:
                    if os.getpid() != pid:
                        os._exit(1)  # a child that came back must not go on as us
                    self._restore_depth(depth)  # at once: what follows needs room
        finally:
            self._random = _random_state()
            _set_random_state(mine)
            if all(map(is_, _streams(), streams)):  # else they are put back, and named
                _set_streams(saved[_STREAMS])
            self._own = {name: _STATE[name][0]() for name in _OWN}
            self.changed.update(dict.fromkeys(_restore(saved)))

    def _restore_depth(self, depth: int) -> None:
        if sys.getrecursionlimit() != depth:
            sys.setrecursionlimit(depth)
            self.changed["the recursion limit"] = None

    def _failed(self, error: BaseException, seconds: float) -> Failed:
        ended = isinstance(error, SystemExit | KeyboardInterrupt | _TooLong | _Exit)
        if isinstance(error, _TooLong):
            words = f"took longer than {seconds:g} seconds"
        elif isinstance(error, SystemExit | _Exit):
            words = f"tried to end the process with exit code {_shown_code(error)}"
        else:
            words = f"raised {traceback.format_exception_only(type(error), error)[-1].strip()}"
        if isinstance(error, SyntaxError) and type(error.lineno) is int:
            return Failed(words, place=f"{error.filename}:{error.lineno}", ended=False)
        return Failed(_cut(words), place=self._place(error.__traceback__), ended=ended)

    def _place(self, trace: TracebackType | None) -> str | None:
        """The last line of its own files that was running."""
        place = None
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            place = f"{file}:{trace.tb_lineno}" if file in self.files else place
            trace = trace.tb_next
        return place


def _cut(words: str, limit: int = 300) -> str:
    return words if len(words) <= limit else f"{words[: limit - 1]}…"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# --- exits and time --------------------------------------------------------------------------


class _Exit(BaseException):
    """The code called ``os._exit`` or replaced the process."""


def _shown_code(error: BaseException) -> str:
    code = error.args[0] if error.args else 0
    return str(code) if type(code) in (int, str, type(None)) else type(code).__name__


@contextmanager
def _exits_refused(pid: int) -> Iterator[None]:
    """Make the functions that end the process raise. Forked children may end."""
    real = {name: vars(os)[name] for name in _EXITS}

    def refused(name: str) -> Callable[..., Any]:
        def end(*arguments: Any) -> Any:
            if os.getpid() != pid:
                return real[name](*arguments)
            raise _Exit(arguments[0] if arguments and name == "_exit" else name)

        return end

    vars(os).update({name: refused(name) for name in _EXITS})
    try:
        yield
    finally:
        vars(os).update(real)


@contextmanager
def _limited(seconds: float) -> Iterator[list[int]]:
    """Interrupt the code when the time is over; yields the Ctrl-Cs since the start.

    Code that swallows interruptions, or does not come back to Python, would go on for ever: the
    process then ends, and the places of all threads are printed.
    """
    faulthandler.dump_traceback_later(seconds + _NUDGES, exit=True, file=2)
    try:
        if _in_main_thread():
            with _interrupted(seconds) as pressed:
                yield pressed
        else:
            yield []
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _interrupted(seconds: float) -> Iterator[list[int]]:
    pressed: list[int] = []
    done = threading.Event()
    saved = {number: signal.getsignal(number) for number in (signal.SIGINT, _NUDGE)}
    before = saved[signal.SIGINT]

    def interrupted(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if callable(before):
            before(number, frame)

    def too_long(number: int, frame: FrameType | None) -> None:
        if not done.is_set():
            raise _TooLong

    watchdog = threading.Thread(
        target=_watch, args=(done, seconds, threading.get_ident()), daemon=True
    )
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(_NUDGE, too_long)
    watchdog.start()
    try:
        yield pressed
    finally:
        done.set()
        watchdog.join()
        for number, ours in ((signal.SIGINT, interrupted), (_NUDGE, too_long)):
            if signal.getsignal(number) is ours:  # else it is the code's, and is put back later
                _handle(number, saved[number])


def _watch(done: threading.Event, seconds: float, thread: int) -> None:
    if done.wait(seconds):
        return
    for _ in range(_NUDGES):
        signal.pthread_kill(thread, _NUDGE)
        if done.wait(1.0):
            return


# --- what it may change ----------------------------------------------------------------------


def _saved_state() -> dict[str, Any]:
    return {name: read() for name, (read, _) in _STATE.items()}


def _restore(saved: Mapping[str, Any]) -> list[str]:
    """Restore what differs, and name it."""
    changed = []
    for name, (read, write) in _STATE.items():
        if read() != saved[name]:
            write(saved[name])
            changed += [name] if saved[name] is not None else []  # None: it has loaded PyTorch
    return changed


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _to_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _set_environment(saved: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(saved)


def _set_search_path(saved: list[str]) -> None:
    sys.path[:] = saved


class _Stream:
    """A standard stream that code which is not ours cannot close."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def close(self) -> None:
        """Nothing: it is ours."""


def _streams() -> tuple[Any, Any, Any]:
    return sys.stdin, sys.stdout, sys.stderr


def _set_streams(saved: tuple[Any, Any, Any]) -> None:
    sys.stdin, sys.stdout, sys.stderr = saved


def _handle(number: int, handler: Any) -> None:
    if handler is not None and _in_main_thread():  # None: not set from Python
        signal.signal(number, handler)


def _handlers() -> tuple[Any, ...]:
    return tuple(signal.getsignal(number) for number in _SIGNALS)


def _set_handlers(saved: tuple[Any, ...]) -> None:
    for number, handler in zip(_SIGNALS, saved, strict=True):
        _handle(number, handler)


@dataclass(frozen=True, eq=False)
class _Alarm:
    """When the process will be woken, in seconds of the clock; 0 when it will not."""

    at: float

    def __eq__(self, other: object) -> bool:
        # The same alarm looks a little different at every look.
        return isinstance(other, _Alarm) and abs(self.at - other.at) < 0.1


def _alarm() -> _Alarm:
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    return _Alarm(time.monotonic() + left if left else 0.0)


def _set_alarm(saved: _Alarm) -> None:
    left = max(saved.at - time.monotonic(), 0.001) if saved.at else 0
    signal.setitimer(signal.ITIMER_REAL, left)


def _mask() -> int:
    mask = os.umask(0o077)  # it cannot be read without being set
    os.umask(mask)
    return mask


def _set_warnings(saved: list[Any]) -> None:
    warnings.resetwarnings()  # which also forgets what was decided by the filters of before
    warnings.filters[:] = saved  # type: ignore[index]


def _torch_settings() -> tuple[Any, ...] | None:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()


def _set_torch_settings(saved: tuple[Any, ...] | None) -> None:
    torch: Any = sys.modules["torch"]
    if saved is None:  # the code has loaded it: these are its defaults
        saved = True, torch.float32, torch.get_num_threads()
    torch.set_grad_enabled(saved[0])
    torch.set_default_dtype(saved[1])
    torch.set_num_threads(saved[2])


_STATE: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (_folder, _to_folder),
    "environment variables": (lambda: dict(os.environ), _set_environment),
    "the module search path": (lambda: list(sys.path), _set_search_path),
    _STREAMS: (_streams, _set_streams),
    "signal handlers": (_handlers, _set_handlers),
    "an alarm": (_alarm, _set_alarm),
    "the mode of new files": (_mask, os.umask),
    "warning filters": (lambda: list(warnings.filters), _set_warnings),
    "garbage collection": (gc.isenabled, lambda saved: gc.enable() if saved else gc.disable()),
    "logging": (lambda: logging.root.manager.disable, logging.disable),
    "NumPy's error handling": (np.geterr, lambda saved: np.seterr(**saved)),
    "settings of PyTorch": (_torch_settings, _set_torch_settings),
}
"""What is put back, in words: how to read it, and how to set it."""

_OWN = ("the working directory", "environment variables")
"""What it finds again as it left it: files are opened and keys are read in later calls."""


def _random_state() -> dict[str, Any]:
    """Of the global generators. Those that code makes for itself are its own."""
    state: dict[str, Any] = {"random": random.getstate(), "numpy": np.random.get_state()}
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = torch.random.get_rng_state()
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _fresh_random_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "random": random.Random(0).getstate(),
        "numpy": np.random.RandomState(0).get_state(),
    }
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = torch.Generator().manual_seed(0).get_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    torch: Any = sys.modules.get("torch")
    if "torch" in state:
        torch.random.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
