"""The ledger: the events of a run in order, in a tamper-evident file.

One JSON object per line, appended by one writer and never changed::

    {"n":1,"t":"2026-11-22T09:00:00.000Z","kind":"run","body":{...},"prev":"000...0"}
    {"n":2,"t":"...","kind":"model","body":{...},"prev":"<sha256 of line 1>"}

``n`` counts from 1, so record ``n`` is line ``n``. ``prev`` is the sha256 of the raw bytes of the
previous line, without its newline; 64 zeros (:data:`GENESIS`) on the first. The hash is over raw
bytes, so that it does not depend on a JSON library. The digest of the last line is the *head*.

The number and the digest of the last record also stand in ``<ledger>.head`` beside it. It is
written after the record, so a kill leaves it behind, never ahead: a ledger that was deleted, or cut
at its end, no longer holds the record that its head names.

Chain and head show every partial edit. They do not show a rewrite of both, unless the head is known
from elsewhere: a child run, a signature, a published document.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final, final

from posttrain.core.errors import DataError, LedgerBroken, nearest
from posttrain.core.files import sync_folder, write_all, write_atomic, writing

__all__ = ["GENESIS", "Ledger", "Record", "RecordKind", "Verified", "head_file", "read", "verify"]

GENESIS: Final = "0" * 64  # the head of an empty ledger

_KEYS = frozenset({"n", "t", "kind", "body", "prev"})
_RESTORE = (
    "put back a copy of the file made before the change; without one, keep this folder as it is "
    "and choose another --out"
)


class RecordKind(StrEnum):
    """The kinds of records."""

    RUN = "run"  # identity, parent ledger head, versions, seed, hardware
    MODEL = "model"  # a model that was used: base, teacher, reference, reward, judge
    SOURCE = "source"  # a source of trajectories: origin, author, licence
    FILTER = "filter"  # a curation rule with counts in and out
    SHARD = "shard"  # a file of trajectories or of their uses, with its digest
    UPDATE = "update"  # optimiser steps: objective, policy in and out, shards, cost
    SAVED = "saved"  # a checkpoint to resume from: the digests of its files
    CHECKPOINT = "checkpoint"  # an exported model: digest and parents
    FILE = "file"  # files of the run folder as they are about to be written
    EVAL = "eval"  # one measured value with its uncertainty
    SAY = "say"  # a statement by a person
    SIGN = "sign"  # a signature over a head
    GATE = "gate"  # a gate on a stage's result, and its decision
    STAGE = "stage"  # a stage started, ended, was skipped or was set aside
    ACCEPT = "accept"  # a change that the user accepted by name: what was, and what is
    PROOF = "proof"  # a comparison that held: what, and what came out


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of a ledger. ``digest`` is the sha256 of its raw bytes: the next line's ``prev``."""

    n: int  # from 1: also its line number
    time: str  # ISO 8601, UTC
    kind: RecordKind
    body: Mapping[str, object]
    prev: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A valid chain: its length, its head and the number of records of each kind."""

    num_records: int
    head: str
    kinds: Mapping[RecordKind, int]
    torn_bytes: int = 0  # of an unfinished last line, which does not count as a record


def utc_now() -> datetime:
    """The time now, in UTC."""
    return datetime.now(UTC)


@final
class Ledger:
    """The only writer of a ledger file. It keeps no open file, so it needs no close.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ledger = Ledger.open(Path(folder, "ledger.jsonl"))
        ...     first = ledger.append(RecordKind.RUN, {"seed": 7})
        ...     second = ledger.append(RecordKind.STAGE, {"name": "warm-up"})
        ...     second.prev == first.digest, verify(ledger.path).num_records
        (True, 2)
    """

    def __init__(
        self,
        path: Path,
        *,
        records: list[Record],
        size: int,
        clock: Callable[[], datetime],
        torn: Path | None,
    ) -> None:
        """Use :meth:`open`, which checks the chain first."""
        self._path, self._records, self._size = path, records, size
        self._clock, self._torn = clock, torn
        self._first: tuple[RecordKind, Mapping[str, object]] | None = None

    @classmethod
    def open(cls, path: Path, *, clock: Callable[[], datetime] = utc_now) -> Ledger:
        """Open a ledger to append to it; it is created if missing. Checks the whole chain.

        An unfinished last line does not count as a record: it is moved to ``<path>.torn-<k>``,
        and the chain continues from the line before it.

        Args:
            path: the ledger file.
            clock: gives the time of each record, in UTC.

        Raises:
            LedgerBroken: the chain is broken, or was cut at its end; the message has the line.
        """
        known = _known_head(path)
        if not path.exists() and (known is None or known[0] == 0):
            write_atomic(head_file(path), _head_line(0, GENESIS))
            write_atomic(path, b"")
        records, torn, size = _checked(path, known)
        kept = _free_name(path) if torn else None
        if kept is not None:
            write_atomic(kept, torn)
            with writing(path):
                os.truncate(path, size)
                _sync_file(path)
        return cls(path, records=records, size=size, clock=clock, torn=kept)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def head(self) -> str:
        """Digest of the last record; :data:`GENESIS` while there is none."""
        return self._records[-1].digest if self._records else GENESIS

    @property
    def num_records(self) -> int:
        """Number of records."""
        return len(self._records)

    @property
    def records(self) -> Sequence[Record]:
        """Every record so far."""
        return self._records

    @property
    def torn(self) -> Path | None:
        """Where :meth:`open` moved an unfinished last line; None when there was none."""
        return self._torn

    def introduce(self, kind: RecordKind, body: Mapping[str, object]) -> None:
        """Put this record before the next one; without a next one it is not written."""
        self._first = (kind, body)

    def begin(self) -> None:
        """Write the introduction now, if there is one that is not written."""
        if self._first is not None:
            first, self._first = self._first, None
            self.append(*first)

    def append(self, kind: RecordKind, body: Mapping[str, object]) -> Record:
        """Append a record. When this returns, it is on disk.

        Args:
            kind: of the record.
            body: plain data: mappings with text keys, lists, text, finite numbers, booleans and
                None. Keys are written in sorted order.

        Raises:
            DataError: the body holds something that is not plain data; the message has its path.
            DiskFull: the disk is full; the ledger is unchanged.
            LedgerBroken: another process wrote to the file since it was opened.
        """
        content = {key: _plain(value, f"body.{key}") for key, value in _items(body, "body")}
        self.begin()
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
        number, time = self.num_records + 1, time.replace("+00:00", "Z")
        line = _line(number, time, kind, content, self.head)
        self._write(line + b"\n")
        record = Record(
            n=number,
            time=time,
            kind=kind,
            body=MappingProxyType(content),
            prev=self.head,
            digest=_sha256(line),
        )
        self._records.append(record)
        self._size += len(line) + 1
        self._note_head()
        return record

    def _note_head(self) -> None:
        """Write the head beside the ledger: one write in place, which a kill cannot divide."""
        line = _head_line(self.num_records, self.head)
        if not head_file(self._path).is_file():
            write_atomic(head_file(self._path), line)
            return
        with writing(head_file(self._path)):
            fd = os.open(head_file(self._path), os.O_WRONLY)
            try:
                os.pwrite(fd, line, 0)
            finally:
                os.close(fd)

    def _write(self, content: bytes) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)  # no O_CREAT: a lost file is an error
        try:
            self._check_sole_writer(os.fstat(fd).st_size)
            try:
                with writing(self._path):
                    write_all(fd, content)
                    os.fsync(fd)
            except BaseException:  # Ctrl-C too: a row is there whole, or not at all
                with suppress(OSError):  # then the line stays, torn or whole, for the next process
                    os.ftruncate(fd, self._size)
                raise
        finally:
            os.close(fd)

    def _check_sole_writer(self, size: int) -> None:
        if size != self._size:
            raise LedgerBroken(
                f"{self._path} has {size} bytes, and had {self._size} after our last record",
                expected="one writer per ledger",
                fix="see which other process works in this folder, then run the command again",
            )


def read(path: Path) -> list[Record]:
    """Every record of a ledger, its chain checked. An unfinished last line is left out.

    Safe while another process appends.

    Raises:
        LedgerBroken: the file is missing, its chain is broken, or it was cut at its end.
    """
    return _checked(path, _known_head(path))[0]


def verify(path: Path, *, head: str | None = None) -> Verified:
    """Check a ledger without changing it.

    Args:
        path: the ledger file.
        head: a digest known from elsewhere (a signature, a child run). It must be the digest of
            some record: the records up to it are then unchanged since the head was taken. Compare
            with ``Verified.head`` to check that no record came after.

    Raises:
        LedgerBroken: the chain is broken, or ``head`` or the head beside it is not in it.
    """
    records, torn, _ = _checked(path, _known_head(path))
    last = records[-1].digest if records else GENESIS
    if head is not None and head != GENESIS and all(r.digest != head for r in records):
        raise _cut(path, records, head)
    return Verified(
        num_records=len(records),
        head=last,
        kinds=MappingProxyType(dict(Counter(r.kind for r in records))),
        torn_bytes=len(torn),
    )


def head_file(path: Path) -> Path:
    """The file beside a ledger that names its last record: its number and its digest."""
    return path.with_name(f"{path.name}.head")


def _head_line(n: int, digest: str) -> bytes:
    return f"{n:>12} {digest}\n".encode()


def _known_head(path: Path) -> tuple[int, str] | None:
    """The (number, digest) beside a ledger; None when there is no such file.

    Raises:
        LedgerBroken: the file holds something else. It is made whole and written in one piece.
    """
    beside = head_file(path)
    if not beside.is_file():
        return None
    n, _, digest = beside.read_bytes()[:128].decode("ascii", "replace").strip().partition(" ")
    if not n.isdecimal() or len(digest) != 64:
        raise LedgerBroken(
            f"{beside} does not name the last record of the ledger beside it",
            expected="the record's number and digest, without which a cut would not show",
            fix=_RESTORE,
        )
    return int(n), digest


def _checked(path: Path, known: tuple[int, str] | None) -> tuple[list[Record], bytes, int]:
    """Records, unfinished last line, and bytes without it. ``known`` was read before the file."""
    if not path.is_file():
        raise LedgerBroken(
            f"{path} is missing" + (f", and held {known[0]} records" if known else ""),
            expected="the ledger beside the files that it records",
            fix=_RESTORE,
        )
    raw = path.read_bytes()
    records, torn = _parse(path, raw)
    n, digest = known or (0, GENESIS)
    if n > 0 and (n > len(records) or records[n - 1].digest != digest):
        raise _cut(path, records, digest)
    return records, torn, len(raw) - len(torn)


def _cut(path: Path, records: Sequence[Record], head: str) -> LedgerBroken:
    last = records[-1].digest if records else GENESIS
    return LedgerBroken(
        f"{path} holds {len(records)} records up to {last}, and none with digest {head}",
        expected=f"the record whose digest is {head}: it was there when that head was taken",
        fix=f"records at the end were changed or removed since: {_RESTORE}",
    )


def _line(n: int, time: str, kind: RecordKind, body: Mapping[str, object], prev: str) -> bytes:
    # _items has sorted the keys of the body, at every depth.
    content = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    text = f'{{"n":{n},"t":"{time}","kind":"{kind}","body":{content},"prev":"{prev}"}}'
    return text.encode()


def _parse(path: Path, raw: bytes) -> tuple[list[Record], bytes]:
    """All finished lines as records, and the bytes of an unfinished one."""
    *lines, torn = raw.split(b"\n")
    records: list[Record] = []
    prev = GENESIS
    for n, line in enumerate(lines, start=1):
        record = _record(path, n, line)
        if record.prev != prev:
            raise _broken(
                f"{path}, line {n}: prev is {record.prev}",
                expected=f"{prev}, " + (f"the digest of line {n - 1}" if n > 1 else "64 zeros"),
                because=f"line {n - 1} was changed, or lines were added, removed or moved"
                if n > 1
                else "lines before it were removed",
            )
        records.append(record)
        prev = record.digest
    return records, torn


def _record(path: Path, n: int, line: bytes) -> Record:
    where = f"{path}, line {n}"
    try:
        fields = json.loads(line.decode())
    except ValueError as error:  # bad UTF-8 and bad JSON alike
        raise _broken(f"{where} is not JSON: {error}", expected="one JSON object") from None
    if not isinstance(fields, dict) or set(fields) != _KEYS:
        raise _broken(f"{where} has other keys", expected=f"exactly {', '.join(sorted(_KEYS))}")
    number, time, kind, body, prev = (fields[k] for k in ("n", "t", "kind", "body", "prev"))
    if type(number) is not int or number != n:
        raise _broken(
            f"{where} holds record {number!r}",
            expected=f"record {n}",
            because="lines were added, removed or moved",
        )
    if not (isinstance(time, str) and isinstance(body, dict) and isinstance(prev, str)):
        raise _broken(f"{where} has a field of another type", expected="t, prev: text; body: {}")
    if not isinstance(kind, str) or kind not in set(RecordKind):
        raise LedgerBroken(
            f"{where} is of kind {kind!r}; {nearest(str(kind), [k.value for k in RecordKind])}",
            expected="a kind that this version knows",
            fix="read it with the version of posttrain that wrote it, or a later one",
        )
    return Record(
        n=n,
        time=time,
        kind=RecordKind(kind),
        body=MappingProxyType(body),
        prev=prev,
        digest=_sha256(line),
    )


def _broken(
    found: str, *, expected: str, because: str = "the line was changed after it was written"
) -> LedgerBroken:
    return LedgerBroken(found, expected=expected, fix=f"{because}: {_RESTORE}")


def _items(mapping: Mapping[str, object], at: str) -> list[tuple[str, object]]:
    for key in mapping:
        if not isinstance(key, str):
            raise DataError(f"{at} has the key {key!r}", expected="text keys")
    return sorted((_plain_text(str(k), f"a key of {at}"), v) for k, v in mapping.items())


def _plain(value: object, at: str) -> object:
    """A copy that consists of JSON's types, so that it equals what is read back."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _plain_text(str(value), at)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{at}.{k}") for k, v in _items(value, at)}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{at}[{i}]") for i, v in enumerate(value)]
    raise DataError(
        f"{at} is {value!r}, a {type(value).__name__}",
        expected="text, a finite number, a boolean, None, a list or a mapping with text keys",
        fix="write None for a value that is not known; turn arrays into lists, paths into text",
    )


def _plain_text(value: str, at: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{at} is {value!r}", expected="text that UTF-8 can hold") from None
    return value


def _free_name(path: Path) -> Path:
    k = 1
    while (torn := path.with_name(f"{path.name}.torn-{k}")).exists():
        k += 1
    return torn


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(path.parent)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
