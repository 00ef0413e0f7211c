"""How a command ends: few exit codes, and any error in words.

    0    done
    2    a mistake that the message explains: of a recipe, a file, an option, the machine
    3    a gate stopped the run
    70   a defect of posttrain
    130  stopped, by Ctrl-C, SIGTERM or SIGHUP; what was committed stays
    141  the reader of the output went away

A command that fails in a way that nobody thought of never ends with 0 and never shows a traceback,
unless ``--debug`` asks for it.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable

import click

from posttrain.core.errors import Interrupted, PosttrainError
from posttrain.core.files import as_disk_full

DONE, MISTAKE, STOPPED_BY_GATE, DEFECT, INTERRUPTED, UNREAD = 0, 2, 3, 70, 130, 141

CODES = (
    "Exit codes: 0 done; 2 a mistake that the message explains; 3 a gate stopped the run; "
    "70 a defect of posttrain (--debug shows where); 130 stopped by Ctrl-C, SIGTERM or SIGHUP, "
    "and what was committed stays."
)
"""For ``--help``."""

GOES_ON = "stopped. The same command goes on from the last checkpoint."

_REMEDIES = {
    errno.EACCES: "check its permissions, or choose another place with --out",
    errno.EPERM: "check its permissions, or choose another place with --out",
    errno.EROFS: "the disk is read-only: choose another place with --out",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.EMFILE: "too many open files: raise `ulimit -n`, or close other programs",
    errno.EIO: "the disk reports a fault: check it, or choose another one with --out",
    errno.ESTALE: "a network disk went away: mount it again, then run the same command",
}
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def end(command: Callable[[], object], *, debug: bool) -> int:
    """Run a command; its exit code.

    Args:
        command: returns an exit code, or anything else when it is done.
        debug: show the traceback of an error.

    Raises:
        SystemExit: with the exit code of an error that was told on standard error.
    """
    _print_anything()
    try:
        code = command()
    except SystemExit as error:  # ours are click's Exit: this one is of code from elsewhere
        return _report(error, debug=debug)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped.", err=True)
        return INTERRUPTED
    except Exception as error:  # the last guard: told in words, and the process ends
        raise SystemExit(_report(error, debug=debug)) from error
    return code if isinstance(code, int) and not isinstance(code, bool) else DONE


def unread() -> int:
    """The reader of the output went away, as with `posttrain … | head`: say nothing more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNREAD


def _print_anything() -> None:
    """Show what a stream cannot encode as escapes, such as arrows in an ASCII terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _report(error: BaseException, *, debug: bool) -> int:
    """Say what happened; the exit code."""
    if isinstance(error, BrokenPipeError):
        return unread()
    if debug:
        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        error.show()
        return MISTAKE
    if isinstance(error, Interrupted):
        click.echo(GOES_ON, err=True)
        return INTERRUPTED
    told = error if isinstance(error, PosttrainError) else explained(error)
    if told is not None:
        name = type(told).__name__ if type(told) is not PosttrainError else "Error"
        click.echo(f"{name}: {told}", err=True)
        return MISTAKE
    click.echo(f"{type(error).__name__}: {_short(error)}", err=True)
    click.echo("  this is a defect of posttrain: nothing should end like this", err=True)
    click.echo("  to mend:  `posttrain --debug ...` shows where; please report it", err=True)
    return DEFECT


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else f"{text[:497]}..."


def explained(error: BaseException) -> PosttrainError | None:
    """An error of the machine, or of code from elsewhere, in words; None for a defect of ours.

    Example:
        >>> print(explained(PermissionError(errno.EACCES, "Permission denied", "/root/x")))
        Permission denied: /root/x
          to mend:  check its permissions, or choose another place with --out
    """
    if isinstance(error, SystemExit):
        return PosttrainError(
            f"code that this command called ended the process (SystemExit: {error.code})",
            expected="rewards, task sets and extensions that return",
            fix="take sys.exit out of them; `posttrain --debug ...` shows where",
        )
    if full := as_disk_full(error):
        return full
    if _is_out_of_memory(error):
        return PosttrainError(
            f"out of memory: {_short(error) or 'an allocation failed'}",
            expected="room for the model, its optimiser and one micro-batch",
            fix="turn down micro_batch_tokens, groups_per_step, group_size or max_new_tokens; "
            "or use dtype: bfloat16, activation_checkpointing: true, or lora",
        )
    if isinstance(error, OSError):
        paths = (error.filename, error.filename2)
        where = " -> ".join(os.fsdecode(p) for p in paths if isinstance(p, str | bytes))
        return PosttrainError(
            f"{error.strerror or _short(error)}{': ' if where else ''}{where:.500}",
            fix=_REMEDIES.get(error.errno or 0, "`posttrain --debug ...` shows what was done"),
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """True for Python's, PyTorch's and CUDA's ways to say it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    text = str(error).lower()
    return named or (isinstance(error, RuntimeError) and any(t in text for t in _NO_MEMORY))
