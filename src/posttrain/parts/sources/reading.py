"""Data files as rows of plain values, each with its number in the file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.core.errors import DataError
from posttrain.core.guard import read_bytes, reading
from posttrain.core.rows import MAX_BYTES, Row, read_jsonl

MAX_ROWS = 20_000_000
"""Most rows of a Parquet file: a small file of equal values can claim any number."""

_SUFFIXES = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class DataRows:
    """The rows of a file. Columns without a value in a row are absent."""

    path: Path
    digest: str  # sha256 of the file, 64 hex digits
    rows: Sequence[tuple[int, Row]]
    bad: Sequence[DataError]  # rows that cannot be read, when those are left out


def digest_of(path: Path) -> str:
    """sha256 of a data file, 64 hex digits.

    Raises:
        DataError: no such file, one that cannot be read, or of another kind.
    """
    if path.suffix not in _SUFFIXES:
        raise DataError(f"data file {path}", expected="a .jsonl or .parquet file")
    return hashlib.sha256(_content(path)).hexdigest()


def _content(path: Path) -> bytes:
    return read_bytes(path, kind="a .jsonl or .parquet file", at_most=MAX_BYTES)


def read_rows(path: Path, *, ignore: frozenset[str], skip_bad: bool) -> DataRows:
    """Read a JSONL or Parquet file.

    Args:
        path: the file.
        ignore: columns that are left out unread.
        skip_bad: collect the errors of rows that cannot be read, and go on.

    Raises:
        DataError: a file or a row that cannot be read, or no row at all.
    """
    digest = digest_of(path)
    bad: list[DataError] = []
    if path.suffix == ".parquet":
        rows = list(_parquet(path, ignore=ignore, bad=bad if skip_bad else None))
    else:
        found = read_jsonl(path, bad=bad if skip_bad else None)
        rows = [(n, _given(row, ignore)) for n, row in found]
    if not rows:
        first = f"; the first error: {bad[0].found}" if bad else ""
        raise DataError(f"{path} is empty{first}", expected="at least one row")
    return DataRows(path, digest, rows, bad)


def _given(row: Row, ignore: frozenset[str]) -> Row:
    return {k: v for k, v in row.items() if k not in ignore} if ignore else row


def _parquet(
    path: Path, *, ignore: frozenset[str], bad: list[DataError] | None
) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    content = _content(path)
    with reading(
        path,
        kind="a whole Parquet file, not encrypted",
        fix="write it again, or convert it to JSONL",
    ):
        file = pq.ParquetFile(io.BytesIO(content))
        names = [str(name) for name in file.schema_arrow.names]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise DataError(f"{path}: two columns named {twice!r}", expected="one of each name")
        if file.metadata.num_rows > MAX_ROWS:
            raise DataError(
                f"{path}: {file.metadata.num_rows:,} rows", expected=f"at most {MAX_ROWS:,}"
            )
        table = file.read([n for n in names if n not in ignore])
    columns = {name: table.column(name) for name in table.column_names}
    values = {name: _values(column) for name, column in columns.items()}
    for at in range(table.num_rows):
        try:
            row = {
                name: _cell(path, at, name, columns[name]) if whole is None else whole[at]
                for name, whole in values.items()
            }
        except DataError as error:
            if bad is None:
                raise
            bad.append(error)
            continue
        # A column that only other rows have is null in Parquet, and absent in JSONL.
        yield at + 1, {name: value for name, value in row.items() if value is not None}


def _values(column: Any) -> list[object] | None:
    """The column as plain values; None when some cell has none, and each must be tried."""
    try:
        with reading("the column", kind="plain values"):
            whole: list[object] = column.to_pylist()
    except DataError:
        return None
    return whole


def _cell(path: Path, at: int, name: str, column: Any) -> object:
    """One cell as a plain value.

    Raises:
        DataError: it has none; names the file and the row.
    """
    with reading(
        path,
        row=at + 1,
        kind=f"a text, a number, a list or a structure in column {name!r} ({column.type})",
        fix=f"mend the column, or leave it out with `ignore: [{name}]` on the data set",
    ):
        value: object = column[at].as_py()
    return value
