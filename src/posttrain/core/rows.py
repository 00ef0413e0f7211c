"""Rows of data files from anywhere, read strictly: a file is taken as written, or refused.

JSON leaves much open that libraries settle in silence: a key that stands twice, numbers without
end, half of a character. Each is refused here with the file and the row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Never, TypeVar

from posttrain.core.errors import DataError
from posttrain.core.guard import read_bytes

Row = Mapping[str, object]
_T = TypeVar("_T")

MAX_BYTES = 1 << 40
"""Most bytes of a data file."""

MAX_DEPTH = 100
"""Most brackets inside one another."""

MAX_DIGITS = 300
"""Most digits of a number: as many as a float can hold."""


def read_jsonl(path: Path, *, bad: list[DataError] | None = None) -> list[tuple[int, Row]]:
    """Rows of a JSONL file with their line numbers, counted from 1. Blank lines are skipped.

    Args:
        path: the file.
        bad: receives the errors of lines that cannot be read; None raises the first.

    Raises:
        DataError: no such file, not UTF-8, a line that is not a JSON object, a key that stands
            twice, a number that is not finite, or no row at all.
    """
    try:
        content = read_bytes(path, kind="a JSONL file", at_most=MAX_BYTES)
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}", expected="a JSONL file") from None
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, at_row(path, number, partial(parse_object, line))))
        except DataError as error:
            if bad is None:
                raise
            bad.append(error)
    if not rows and not bad:
        raise DataError(f"{path} is empty", expected="one JSON object per line")
    return rows


def at_row(path: Path, number: int, read: Callable[[], _T]) -> _T:
    """What ``read`` returns; an error of its names the file and the row."""
    try:
        return read()
    except DataError as error:
        raise DataError(
            f"{path}, row {number}: {error.found}", expected=error.expected, fix=error.fix
        ) from error


def parse_object(text: str) -> Row:
    """A JSON object.

    Raises:
        DataError: anything else, or an object that readers would not agree on.

    Example:
        >>> parse_object('{"a": 1}')
        {'a': 1}
        >>> parse_object('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        posttrain.core.errors.DataError: the key 'a' stands twice
          expected: every key once: readers do not agree on which value counts
    """
    try:
        row = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}", expected="one JSON object per line"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(row, dict):
        raise DataError(type(row).__name__, expected="a JSON object")
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
        raise _too_deep()
    if "\\ud" in text.lower() and not _is_text(row):
        raise DataError(
            "half of a surrogate pair, which is no character",
            expected="text that can be written as UTF-8",
            fix="repair the escape (both halves: \\ud83d\\ude00)",
        )
    return row


def _too_deep() -> DataError:
    return DataError(
        f"brackets more than {MAX_DEPTH} deep",
        expected="a row of texts, numbers and messages",
        fix="write what is deeper as text",
    )


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise DataError(
            f"the key {twice!r} stands twice",
            expected="every key once: readers do not agree on which value counts",
        )
    return found


def _no_constant(name: str) -> Never:
    raise DataError(f"the number {name}", expected="finite numbers: JSON has no others")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise DataError(f"a number of {len(digits)} digits", expected=f"at most {MAX_DIGITS}")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DataError(f"the number {text[:40]}", expected="a number that a float can hold")
    return value


_JSON = json.JSONDecoder(
    object_pairs_hook=_distinct,
    parse_constant=_no_constant,
    parse_int=_whole,
    parse_float=_finite,
)


def _depth(value: object) -> int:
    """Brackets inside one another."""
    deepest, left = 0, [(value, 1)]
    while left:
        here, depth = left.pop()
        deepest = max(deepest, depth)
        inner = here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
        left += [(v, depth + 1) for v in inner if isinstance(v, dict | list)]
    return deepest


def _is_text(row: Row) -> bool:
    """False when some string in the row cannot be encoded."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
