"""Results that took hours, a row each, kept beside the code: a table may grow over many days.

run ──add──▶ benchmarks/results/NAME.jsonl ──rows──▶ the table
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

Row = TypeVar("Row", bound=msgspec.Struct)
RESULTS = Path(__file__).parent / "results"


class ResultsFile(Generic[Row]):
    """A file with a JSON row per result. Of two rows with one key the later one counts."""

    def __init__(self, path: Path, kind: type[Row], key: Callable[[Row], Hashable]) -> None:
        self._path, self._kind, self._key = path, kind, key

    def rows(self) -> dict[Hashable, Row]:
        """Every result, by key."""
        if not self._path.is_file():
            return {}
        lines = self._path.read_text("utf-8").splitlines()
        found = [msgspec.json.decode(line, type=self._kind) for line in lines]
        return {self._key(row): row for row in found}

    def add(self, row: Row) -> None:
        """Append one line. Several processes may: a short line is written in one piece."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
