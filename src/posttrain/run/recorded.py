"""What the ledger says of every file of a run folder, and whether the files are still that.

A row with ``files`` records files by their path in the run folder::

    {"files": {"stages/sft-0f3a9c2e/stage.json": {"bytes": 412, "digest": "<sha256>"},
               "measurements/old.json": null}}

The last row that names a file counts; ``null`` says that it is gone. An entry that ``grows``
covers the first ``bytes`` of a file that is appended to.

A ``file`` row goes *before* the files it names. A kill in between leaves them as they were, and the
row is then the ledger's last: so a file may differ from the ledger only if the last row names it,
and then only by being what it was. Every other difference is a :class:`Fault`. The next writer puts
such a row right (:meth:`RecordedFiles.undone`) before it does anything else.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.core.errors import FileChanged
from posttrain.core.files import write_atomic
from posttrain.run.ledger import Ledger, Record, RecordKind

Row = tuple[str, Mapping[str, object]]
"""A row that is not in the ledger yet: kind and body."""

PIECE = 1 << 20
SETTLED = 2 * 10**9
"""Nanoseconds after which a file's times would show another write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file as the ledger records it."""

    bytes: int
    digest: str  # sha256
    grows: bool = False  # lines may follow
    row: int = field(default=0, compare=False)  # of the ledger

    @property
    def plain(self) -> dict[str, object]:
        """As it stands in a ledger row."""
        return {
            "bytes": self.bytes,
            "digest": self.digest,
            **({"grows": True} if self.grows else {}),
        }

    @property
    def words(self) -> str:
        """Short, for a message."""
        return f"{self.bytes} bytes, sha256 {self.digest[:8]}…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A file that is not what the ledger records."""

    path: str  # in the run folder
    words: str  # what is wrong, in words
    found: FileEntry | None = None  # None: there is no such file

    def __str__(self) -> str:
        """The path and what is wrong with it."""
        return f"{self.path} {self.words}"


def entry_of(content: bytes | str) -> FileEntry:
    """The entry of a file with this content.

    Example:
        >>> entry_of("a").bytes, entry_of("a").digest[:8]
        (1, 'ca978112')
    """
    raw = content.encode() if isinstance(content, str) else content
    return FileEntry(bytes=len(raw), digest=hashlib.sha256(raw).hexdigest())


def entry_at(path: Path, *, first: int | None = None) -> FileEntry | None:
    """The entry of a file as it is, or of its ``first`` bytes; None when it is no regular file.

    A file whose times show that it did not change since is not read twice in one process.
    """
    try:
        at = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(at.st_mode):
        return None
    size = at.st_size if first is None else min(first, at.st_size)
    key = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns, size)
    if key not in _SEEN:
        digest = _sha256(path, size)
        if time.time_ns() - max(at.st_mtime_ns, at.st_ctime_ns) < SETTLED:
            return FileEntry(bytes=size, digest=digest)
        _SEEN[key] = digest
    return FileEntry(bytes=size, digest=_SEEN[key])


_SEEN: dict[tuple[int, ...], str] = {}


def _sha256(path: Path, size: int) -> str:
    total, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(PIECE, left))):
            total.update(piece)
            left -= len(piece)
    return total.hexdigest()


def plain_files(root: Path, files: Mapping[Path, FileEntry | None]) -> dict[str, object]:
    """The ``files`` of a ledger row."""
    return {
        path.relative_to(root).as_posix(): entry.plain if entry else None
        for path, entry in files.items()
    }


@dataclass(frozen=True, slots=True)
class RecordedFiles:
    """The files that the ledger of a run folder records."""

    root: Path
    entries: Mapping[str, FileEntry]
    before: Mapping[str, FileEntry | None]  # of what the last row announced

    @classmethod
    def of(
        cls, root: Path, records: Sequence[Record], *, late: Sequence[Row] = ()
    ) -> RecordedFiles:
        """Read the records in order.

        Args:
            root: the run folder.
            records: of its ledger.
            late: rows that come after them and are not in the file yet.
        """
        entries = dict[str, FileEntry]()
        before = dict[str, FileEntry | None]()
        rows = [(r.kind.value, r.body) for r in records]
        for n, (kind, body) in enumerate([*rows, *late], start=1):
            before = {}
            files = body.get("files")
            for name, value in files.items() if isinstance(files, Mapping) else ():
                if kind == RecordKind.FILE and "undone" not in body:
                    before[name] = entries.get(name)
                if value is None:
                    entries.pop(name, None)
                elif isinstance(value, Mapping):
                    entries[name] = _entry(value, n)
        return cls(root, entries, before)

    def fault(self, name: str, *, content: bool = True) -> Fault | None:
        """What is wrong with a file; None when it is what the ledger records.

        Args:
            name: its path in the run folder.
            content: False looks at its size only.
        """
        known = self.entries.get(name)
        fault = self._compare(name, known, content=content)
        if fault is None or name not in self.before:
            return fault
        was = self._compare(name, self.before[name], content=content)
        return None if was is None else fault

    def _compare(self, name: str, known: FileEntry | None, *, content: bool) -> Fault | None:
        path = self._place(name)
        first = known.bytes if known and known.grows else None
        if known is None:
            if not path.exists():
                return None
            return Fault(path=name, words="is not in the ledger", found=entry_at(path))
        if not path.is_file():
            words = "is no regular file" if path.exists() else "is missing"
            return Fault(path=name, words=f"{words} (row {known.row}: {known.words})")
        size = path.stat().st_size
        if (size < known.bytes) if known.grows else (size != known.bytes):
            words = f"holds {size} bytes, and had {known.bytes} (row {known.row})"
            return Fault(path=name, words=words, found=entry_at(path) if content else None)
        found = entry_at(path, first=first) if content else None
        if found is None or found.digest == known.digest:
            return None
        words = f"was changed: sha256 {found.digest[:8]}…, row {known.row} has {known.digest[:8]}…"
        return Fault(path=name, words=words, found=found)

    def _place(self, name: str) -> Path:
        """Where a file is: beside its folder's place, while a kill left the old one there."""
        path = self.root / name
        for folder in path.parents:
            if folder == self.root:
                break
            old = folder.with_name(f".{folder.name}.old")
            if not folder.exists() and old.is_dir():
                return old / path.relative_to(folder)
        return path

    def require(self, *paths: Path) -> None:
        """Check files, or every file of folders, before they are used.

        Raises:
            FileChanged: one is not what the ledger records; the message has the first.
        """
        for path in paths:
            at = path.relative_to(self.root).as_posix()
            inside = [n for n in self.names if n.startswith(f"{at}/")]
            here = [p.relative_to(self.root).as_posix() for p in files_below(path)]
            for name in dict.fromkeys([*inside, *here] or [at]):
                if (fault := self.fault(name)) is not None:
                    raise changed(self.root, [fault])

    @property
    def names(self) -> list[str]:
        """Every file that the ledger records or has just announced."""
        return sorted({*self.entries, *self.before})

    def undone(self) -> dict[str, object] | None:
        """What the last row announced and a kill kept from being written, as it was before.

        None when all was written.
        """
        late = {
            name: was.plain if was else None
            for name, was in self.before.items()
            if self._compare(name, self.entries.get(name), content=True) is not None
            and self._compare(name, was, content=True) is None
        }
        return {"files": late, "undone": True} if late else None


def _entry(value: Mapping[str, object], row: int) -> FileEntry:
    size, digest = value.get("bytes"), value.get("digest")
    assert isinstance(size, int)
    return FileEntry(bytes=size, digest=str(digest), grows=bool(value.get("grows")), row=row)


def files_below(folder: Path) -> Iterable[Path]:
    """Every file below a folder but partial ones, in order; nothing when it is no folder."""
    for here, folders, names in sorted(os.walk(folder)):
        folders[:] = [f for f in folders if not _is_partial(f)]
        if not any(_is_partial(part) for part in Path(here).relative_to(folder).parts):
            yield from (Path(here, name) for name in sorted(names) if not _is_partial(name))


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith((".partial", ".old"))


def changed(root: Path, faults: Sequence[Fault]) -> FileChanged:
    """The error for files of a run folder that are not what the ledger records."""
    shown = "; ".join(str(fault) for fault in faults[:5])
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return FileChanged(
        f"{root}: {shown}{more}",
        expected="every file as the ledger recorded it",
        fix="put the file back; or set the stage aside and start it again (run --restart STAGE); "
        "or go on with the files as they are now, entered in the ledger (run --accept files); "
        "or choose another --out",
    )


def write_recorded(ledger: Ledger, path: Path, content: bytes | str) -> None:
    """Write a file of a run folder, its row first. What is there already is not written again.

    Raises:
        DiskFull: the disk is full.
    """
    new = entry_of(content)
    announce(ledger, {path: new})
    if entry_at(path) != new:
        write_atomic(path, content)


def announce(ledger: Ledger, files: Mapping[Path, FileEntry | None]) -> None:
    """Append the row of files that are about to be written or removed, unless it says that now."""
    root = ledger.path.parent
    known = RecordedFiles.of(root, ledger.records).entries
    news = {p: e for p, e in files.items() if known.get(p.relative_to(root).as_posix()) != e}
    if news:
        ledger.append(RecordKind.FILE, {"files": plain_files(root, news)})
