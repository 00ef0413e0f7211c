"""The one guard for what others wrote: files and texts whose content nothing vouches for.

Parsers raise what their authors thought of: ValueError, RecursionError, OverflowError,
struct.error, ArrowInvalid, a panic of compiled code. A list of them is never complete, so
:func:`reading` catches every exception and turns it into found / expected / to mend. It never
swallows one: no result, no default, always an error of the tree that keeps its cause.

    with reading(path, kind="a JSONL file"):      any exception ──▶ DataError naming path and kind
        rows = parse(read_bytes(path, ...))       an error of the tree passes through unchanged

:func:`regular_file` comes first: opening a named pipe waits for ever, and a device has no end.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.core.errors import DataError, PosttrainError

__all__ = ["read_bytes", "read_text", "reading", "regular_file"]

MEGABYTE = 1 << 20

_WORDS: tuple[tuple[type[Exception], str], ...] = (
    (RecursionError, "it is nested too deeply"),
    (MemoryError, "it needs more memory than there is"),
    (OverflowError, "a number is too large"),
    (ZeroDivisionError, "it divides by zero"),
)

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


@contextmanager
def reading(
    source: Path | str,
    *,
    kind: str,
    row: int | None = None,
    error: type[PosttrainError] = DataError,
    fix: str | None = None,
) -> Iterator[None]:
    """Turn any exception that reading raises into an error of the tree.

    Args:
        source: the file, or what it is called.
        kind: what it should be, such as ``a JSONL file``.
        row: counted from 1, when it is known.
        error: the class to raise.
        fix: what to do about it.

    Raises:
        PosttrainError: of the class ``error``; one raised in the block passes through.

    Example:
        >>> with reading("x.json", kind="a list of numbers", row=3):
        ...     float("1,5")
        Traceback (most recent call last):
        ...
        posttrain.core.errors.DataError: x.json, row 3: could not convert string to float: '1,5'
          expected: a list of numbers
    """
    try:
        yield
    except PosttrainError:
        raise
    except Exception as cause:  # see the top of this file: always an error of the tree
        where = f"{source}" if row is None else f"{source}, row {row}"
        if isinstance(cause, ImportError):
            fix = "install the package that it names"
        raise error(f"{where}: {_cause_words(cause)}", expected=kind, fix=fix) from cause


def _cause_words(cause: Exception) -> str:
    """What happened, in a line: parsers may quote whole files."""
    for kind, words in _WORDS:
        if isinstance(cause, kind):
            return words
    if isinstance(cause, OSError):
        return cause.strerror or type(cause).__name__
    if isinstance(cause, UnicodeDecodeError):
        return f"not UTF-8 text, at byte {cause.start}"
    text = " ".join(str(cause).split()).encode(errors="backslashreplace").decode()
    text = text if len(text) <= 300 else f"{text[:297]}..."
    named = isinstance(cause, ValueError) and type(cause) is ValueError and text
    return text if named else f"{type(cause).__name__}{': ' if text else ''}{text}"


def regular_file(
    path: Path, *, kind: str = "a file", error: type[PosttrainError] = DataError
) -> os.stat_result:
    """The facts about a file, after making sure that it is one, itself or through a link.

    Raises:
        PosttrainError: of the class ``error``: nothing is there, or something that is no file.

    Example:
        >>> regular_file(Path("/dev/null"))
        Traceback (most recent call last):
        ...
        posttrain.core.errors.DataError: /dev/null is a device
          expected: a file
          to mend:  check the path
    """
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        raise error(f"no file {path}", expected=kind, fix="check the path") from None
    except (OSError, ValueError) as cause:  # ValueError: a NUL byte or half a surrogate pair
        words = cause.strerror if isinstance(cause, OSError) else str(cause)
        shown = str(path).encode(errors="backslashreplace").decode()
        raise error(f"{shown!r}: {words}", expected=kind, fix="check the path") from None
    for is_kind, words in _KINDS:
        if is_kind(facts.st_mode):
            raise error(f"{path} is {words}", expected=kind, fix="check the path")
    return facts


def read_bytes(
    path: Path, *, kind: str, at_most: int, error: type[PosttrainError] = DataError
) -> bytes:
    """The bytes of a regular file of a bounded size.

    Args:
        path: the file.
        kind: what it should be, for the message.
        at_most: bytes; a larger file is refused before it is read.
        error: the class to raise.

    Raises:
        PosttrainError: of the class ``error``: no file, not a regular one, too large, unreadable.
    """
    size = regular_file(path, kind=kind, error=error).st_size
    if size > at_most:
        raise error(
            f"{path} holds {size / MEGABYTE:,.0f} MiB",
            expected=f"{kind} of at most {at_most / MEGABYTE:,.0f} MiB",
        )
    with reading(path, kind=kind, error=error):
        return path.read_bytes()


def read_text(
    path: Path, *, kind: str, at_most: int, error: type[PosttrainError] = DataError
) -> str:
    """The text of a regular UTF-8 file of a bounded size, as :func:`read_bytes`."""
    content = read_bytes(path, kind=kind, at_most=at_most, error=error)
    with reading(path, kind=kind, error=error, fix="save it as UTF-8"):
        return content.decode("utf-8-sig")
