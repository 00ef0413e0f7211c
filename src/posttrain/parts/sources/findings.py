"""What was found in a data file: rows left out, duplicates, columns not read, changed text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.core.errors import DataError
from posttrain.core.proofs import Proof, Subject
from posttrain.core.rendering import Change, DifferenceKind, meaning, shortened

_ADDED = frozenset({DifferenceKind.ADDED, DifferenceKind.UNOPENED})


@dataclass(slots=True)
class _Count:
    """Rows with a finding, and the first of them."""

    first: int
    words: str
    rows: int = 0


@dataclass(slots=True, eq=False)
class Findings:
    """Collected while the rows of a file are rendered, in order."""

    path: Path
    bad: list[DataError] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    questions: set[str] = field(default_factory=set)  # what users say, with single spaces
    unread: tuple[str, ...] = ()  # columns that the stage does not read
    turns: bool = False  # some row is a conversation
    number: int = 0  # of the row that is rendered now
    _changes: dict[DifferenceKind, _Count] = field(default_factory=dict)
    _pending: list[Change] = field(default_factory=list)  # of the row that is rendered now
    _changed: int = 0  # rows whose text is not as it was written
    _tasks: dict[str, int] = field(default_factory=dict)
    _twice: list[int] = field(default_factory=list)

    def begin(self, number: int) -> None:
        """The row with this number is rendered."""
        self.number = number
        self._pending.clear()

    def changed(self, change: Change) -> None:
        """A rendering differs from its messages, and that is accepted."""
        self._pending.append(change)

    def asked(self, text: str) -> None:
        """A prompt, or a user's turn."""
        self.questions.add(" ".join(text.split()))

    def used(self, task: str) -> None:
        """The row is used."""
        for change in {c.kind: c for c in reversed(self._pending)}.values():
            where = f" (message {change.message})" if self.turns else ""
            first = _Count(self.number, f"{shortened(change.text)}{where}")
            self._changes.setdefault(change.kind, first).rows += 1
        self._changed += any(c.kind not in _ADDED for c in self._pending)
        if self._tasks.setdefault(task, self.number) != self.number:
            self._twice.append(self.number)

    def left_out(self) -> list[str]:
        """Rows that are not used, in words."""
        words = []
        if self.too_long:
            words.append(
                f"{_rows(len(self.too_long))} left out, longer than the context (the first: row "
                f"{self.too_long[0]})"
            )
        if self.bad:
            words.append(f"{_rows(len(self.bad))} left out (the first: {self.bad[0].found})")
        return words

    def notes(self) -> tuple[str, ...]:
        """Everything that a reader should know, most important first."""
        words = self.left_out()
        words += [
            f"{_rows(found.rows)}: {meaning(kind)}: {found.words}; the first: row {found.first}"
            for kind, found in sorted(self._changes.items())
        ]
        if self._twice:
            first = self._twice[0]
            words.append(f"{_rows(len(self._twice))} duplicate others (the first: row {first})")
        if self.unread:
            words.append(f"columns that are not read: {', '.join(self.unread)}")
        return tuple(words)

    def proofs(self, name: str, num_rows: int, *, remarks: Sequence[str]) -> tuple[Proof, ...]:
        """That every row was read or named, and that its tokens are what was written."""
        as_changed = (
            "text as written in all"
            if not self._changed
            else f"text as written in {num_rows - self._changed:,}, changes of the others named"
        )
        out = len(self.too_long) + len(self.bad)
        used = "all used" if not out else f"{out:,} of them left out and named"
        figures: Mapping[str, float] = {"rows": num_rows, "left_out": out}
        return (
            Proof(subject=Subject.DATA, of=name, words=f"{num_rows + out:,} rows: {used}"),
            Proof(
                subject=Subject.RENDERING,
                of=name,
                words="; ".join([f"{num_rows:,} rows: {as_changed}", *remarks]),
                figures={**figures, "changed": self._changed},
            ),
        )


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"
