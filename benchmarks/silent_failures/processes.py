"""Processes forked from one that has imported everything: a run starts in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
LIMIT = 60
"""Seconds of the processor after which a run hangs; of a clock ten times as many."""


def preload(modules: Sequence[str]) -> None:
    """Import these once, in the process that all others are forked from."""
    SERVER.set_forkserver_preload(list(modules))
    first = SERVER.Process(target=nothing)
    first.start()
    first.join()


def nothing() -> None:
    """What the first process does, when the imports are done."""


def in_process(work: Callable[..., None], *arguments: Any, log: Path, home: Path) -> int | None:
    """Do ``work`` in a process of its own; returns its exit code, or None if it hung.

    Output goes to ``log``; the process's folder is ``home``.
    """
    process = SERVER.Process(target=_begin, args=(work, arguments, log, home))
    process.start()
    process.join(10 * LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return None if process.exitcode == -signal.SIGXCPU else process.exitcode


def _begin(work: Callable[..., None], arguments: Sequence[Any], log: Path, home: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.chdir(home)
    os.environ["COLUMNS"] = "400"  # no line is wrapped
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, 2 * LIMIT))
    import torch

    torch.set_num_threads(1)
    try:
        work(*arguments)
    except SystemExit as leaving:
        sys.stdout.flush()
        sys.stderr.flush()
        code = leaving.code
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
    except BaseException:  # noqa: BLE001  # a crash is a result here
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
