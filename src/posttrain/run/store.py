"""Parquet files of trajectories and of their uses.

A *trajectory file* has one row per distinct trajectory: the record itself, and optionally its
text. A *usage file* has one row per use of a trajectory by a stage: trained on, discarded (and
why) or evaluated. Usage rows hold ids and no content, so that content can be deleted without
changing the record of its use.

Equal content gives equal bytes (with one version of pyarrow): there are no times or host names in
a file, so a resumed run rewrites its shards with the digests that the ledger already holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from posttrain.core.errors import DataError
from posttrain.core.files import write_atomic
from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
from posttrain.core.trajectory import Array, End, Trajectory

__all__ = [
    "ProducerTokens",
    "Use",
    "UseRole",
    "read_texts",
    "read_trajectories",
    "read_uses",
    "tokens_by_producer",
    "write_trajectories",
    "write_uses",
]

_ROWS: Final = {"trajectories/2": 1 << 12, "uses/1": 1 << 16}  # per group; shapes the bytes

_SPAN: Final = pa.struct(
    [
        pa.field("length", pa.int32(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("producer", pa.string(), nullable=False),
        pa.field("digest", pa.string()),
        pa.field("first_version", pa.int64()),
        pa.field("last_version", pa.int64()),
        pa.field("temperature", pa.float64()),  # null: the sampling is unknown
        pa.field("top_k", pa.int64()),
        pa.field("top_p", pa.float64()),
        pa.field("min_p", pa.float64()),
        pa.field("seed", pa.int64()),
        pa.field("stop", pa.list_(pa.string())),
        pa.field("logprobs", pa.list_(pa.float32())),  # null: unknown, which is not zero
    ]
)
_TRAJECTORIES: Final = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("end", pa.string(), nullable=False),
        pa.field("parent", pa.string()),
        pa.field("spans", pa.list_(_SPAN), nullable=False),
        pa.field("text", pa.string()),
    ],
    metadata={"posttrain": "trajectories/2"},
)
_USES: Final = pa.schema(
    [
        pa.field("trajectory", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("producer", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64()),
        pa.field("prompt_tokens", pa.int64(), nullable=False),
        pa.field("completion_tokens", pa.int64(), nullable=False),
        pa.field("first_version", pa.int64()),
        pa.field("last_version", pa.int64()),
    ],
    metadata={"posttrain": "uses/1"},
)
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "seed", "stop")
# Parquet's dictionary encoding, for columns that repeat themselves.
_REPEATING_SPAN: Final = tuple(
    f"spans.list.element.{name}" for name in ("role", "kind", "producer", "digest")
)
_REPEATING: Final = {
    "trajectories/2": ["task", "end", "parent", *_REPEATING_SPAN],
    "uses/1": ["trajectory", "task", "kind", "producer", "stage", "role", "reason"],
}


_values: Final = attrgetter(*_USES.names)


class UseRole(StrEnum):
    """What a stage did with a trajectory."""

    TRAIN = "train"
    DISCARDED = "discarded"
    EVAL = "eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One use of one trajectory by one stage. ``None`` means unknown or not computed.

    Example:
        >>> Use(trajectory="00ff", task="sums/1", kind=Kind.LEARNER, producer="run-7f3a",
        ...     stage="rl", step=3, role=UseRole.DISCARDED, reason="stale", prompt_tokens=4,
        ...     completion_tokens=9, first_version=1, last_version=1).reason
        'stale'
    """

    trajectory: str  # id of the trajectory
    task: str
    kind: Kind  # of the author of its completion
    producer: str  # that author's name
    stage: str
    step: int
    role: UseRole
    reason: str | None = None  # why it was discarded
    reward: float | None = None
    advantage: float | None = None
    prompt_tokens: int
    completion_tokens: int
    first_version: int | None = None  # learner versions that wrote it
    last_version: int | None = None

    def __post_init__(self) -> None:
        if (self.role is UseRole.DISCARDED) != (self.reason is not None):
            raise DataError(
                f"a use with role={self.role} and reason={self.reason!r}",
                expected="a reason for every discarded trajectory, and for no other",
            )
        if any(x is not None and not math.isfinite(x) for x in (self.reward, self.advantage)):
            raise DataError(
                f"a use with reward={self.reward} and advantage={self.advantage}",
                expected="finite numbers, or None where there is none",
            )
        if min(self.prompt_tokens, self.completion_tokens) < 0:
            raise DataError(
                f"a use of {self.prompt_tokens} + {self.completion_tokens} tokens",
                expected="counts of 0 or more",
            )


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ProducerTokens:
    """Tokens of one producer that a stage used in one role.

    Tokens are summed over uses: a trajectory that was trained on twice counts twice.
    """

    stage: str
    kind: Kind
    producer: str
    role: UseRole
    num_uses: int
    num_trajectories: int  # distinct ones
    prompt_tokens: int
    completion_tokens: int


def write_trajectories(
    path: Path, trajectories: Sequence[Trajectory], texts: Mapping[str, str] | None = None
) -> str:
    """Write one row per distinct trajectory id, in order of first appearance.

    An id does not cover log-probs: of trajectories with equal ids the first is written.

    Args:
        path: the file to write, atomically.
        trajectories: what to write.
        texts: readable text by trajectory id, stored beside the tokens.

    Returns:
        sha256 of the file, 64 hex digits.

    Raises:
        DataError: a trajectory that could not be read back exactly, or a text without one.
        DiskFull: the disk is full; the old file is intact.
    """
    ordered: dict[str, Trajectory] = {}
    for trajectory in trajectories:
        ordered.setdefault(trajectory.id, trajectory)
    texts = texts or {}
    for unknown in sorted(set(texts) - set(ordered))[:1]:
        raise DataError(f"a text for {unknown}", expected="texts of the trajectories given")
    for trajectory in ordered.values():
        _check_types(trajectory)
    try:
        table = _table(ordered, texts)
    except (pa.ArrowInvalid, OverflowError) as error:
        raise DataError(
            f"{path}: a value does not fit its column: {error}",
            expected="lengths below 2^31; versions, top_k and seeds below 2^63",
        ) from error
    for name, found in zip(ordered, _decode(table), strict=True):
        if found.id != name:
            raise DataError(
                f"trajectory {name} of task {ordered[name].task} would be read back as {found.id}",
                expected="plain int and float in its versions and its sampling",
                fix="convert numpy scalars, and write temperature=1.0 instead of 1",
            )
    return _write(path, table)


def read_trajectories(path: Path) -> list[Trajectory]:
    """Read what :func:`write_trajectories` wrote: equal in every field, ids included.

    Raises:
        DataError: not such a file, or a row whose content does not match its id.
    """
    table = _read(path, _TRAJECTORIES, [n for n in _TRAJECTORIES.names if n != "text"])
    with _as_data_error(path):
        trajectories = _decode(table)
    for row, (name, found) in enumerate(zip(table["id"].to_pylist(), trajectories, strict=True)):
        if found.id != name:
            raise DataError(
                f"{path}, row {row}: the content has id {found.id}, the row says {name}",
                expected="a file as write_trajectories left it",
                fix="put back a copy of the file, or let the stage that wrote it run again",
            )
    return trajectories


def read_texts(path: Path) -> dict[str, str]:
    """Texts by trajectory id, for the rows of a trajectory file that have one."""
    table = _read(path, _TRAJECTORIES, ["id", "text"])
    rows = zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)
    return {name: text for name, text in rows if text is not None}


def write_uses(path: Path, uses: Sequence[Use]) -> str:
    """Write one row per use, in order.

    Returns:
        sha256 of the file, 64 hex digits.

    Raises:
        DiskFull: the disk is full; the old file is intact.
    """
    rows = [_values(use) for use in uses]
    columns = zip(*rows, strict=True) if rows else [[] for _ in _USES]
    arrays = [pa.array(v, column.type) for v, column in zip(columns, _USES, strict=True)]
    return _write(path, pa.table(arrays, schema=_USES))


def read_uses(path: Path) -> list[Use]:
    """Read what :func:`write_uses` wrote.

    Raises:
        DataError: not such a file.
    """
    table = _read(path, _USES, _USES.names)
    columns = {name: table[name].to_pylist() for name in _USES.names}
    with _as_data_error(path):
        columns["kind"] = [Kind(k) for k in columns["kind"]]
        columns["role"] = [UseRole(r) for r in columns["role"]]
    return [
        Use(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
    ]


def tokens_by_producer(paths: Iterable[Path]) -> list[ProducerTokens]:
    """Token counts of usage files: one entry per (stage, kind, producer, role), sorted.

    Raises:
        DataError: a path that is not a usage file.
    """
    keys = ["stage", "kind", "producer", "role"]
    wanted = [*keys, "trajectory", "prompt_tokens", "completion_tokens"]
    tables = [_read(path, _USES, wanted) for path in paths]
    if not tables:
        return []
    sums = (
        pa.concat_tables(tables)
        .group_by(keys, use_threads=False)
        .aggregate(
            [
                ("trajectory", "count"),
                ("trajectory", "count_distinct"),
                ("prompt_tokens", "sum"),
                ("completion_tokens", "sum"),
            ]
        )
    )
    return sorted(
        ProducerTokens(
            stage=row["stage"],
            kind=Kind(row["kind"]),
            producer=row["producer"],
            role=UseRole(row["role"]),
            num_uses=row["trajectory_count"],
            num_trajectories=row["trajectory_count_distinct"],
            prompt_tokens=row["prompt_tokens_sum"],
            completion_tokens=row["completion_tokens_sum"],
        )
        for row in sums.to_pylist()
    )


def _check_types(trajectory: Trajectory) -> None:
    """Check dtypes: arrays of another type would be read back rounded, or as another type."""
    arrays: list[tuple[Array, type[np.generic]]] = [(trajectory.tokens, np.int32)]
    arrays += [(s.logprobs, np.float32) for s in trajectory.spans if s.logprobs is not None]
    for array, wanted in arrays:
        if array.dtype != wanted:
            raise DataError(
                f"an array of {array.dtype} in a trajectory of task {trajectory.task}",
                expected="tokens as int32 and log-probs as float32",
            )


def _table(trajectories: Mapping[str, Trajectory], texts: Mapping[str, str]) -> pa.Table:
    ts = list(trajectories.values())
    spans = _span_array([s for t in ts for s in t.spans])
    columns = [
        pa.array(list(trajectories), pa.string()),
        pa.array([t.task for t in ts], pa.string()),
        _list_array([t.tokens for t in ts], np.int32),
        pa.array([t.prompt_length for t in ts], pa.int32()),
        pa.array([t.end for t in ts], pa.string()),
        pa.array([t.parent for t in ts], pa.string()),
        pa.ListArray.from_arrays(_offsets([len(t.spans) for t in ts]), spans),
        pa.array([texts.get(name) for name in trajectories], pa.string()),
    ]
    return pa.table(columns, schema=_TRAJECTORIES)


def _span_array(spans: Sequence[Span]) -> pa.StructArray:
    drawn = [s.sampling for s in spans]
    versions = [s.versions or (None, None) for s in spans]
    columns: dict[str, list[object]] = {
        "length": [s.length for s in spans],
        "role": [s.role for s in spans],
        "kind": [s.producer.kind for s in spans],
        "producer": [s.producer.name for s in spans],
        "digest": [s.producer.digest for s in spans],
        "first_version": [first for first, _ in versions],
        "last_version": [last for _, last in versions],
    }
    for name in _SAMPLING:
        read = attrgetter(name)
        columns[name] = [None if d is None else read(d) for d in drawn]
    arrays = [pa.array(values, _SPAN.field(name).type) for name, values in columns.items()]
    arrays.append(_list_array([s.logprobs for s in spans], np.float32))
    return pa.StructArray.from_arrays(arrays, fields=list(_SPAN))


def _list_array(arrays: Sequence[Array | None], dtype: type[np.generic]) -> pa.ListArray:
    known = [a for a in arrays if a is not None]
    values = np.concatenate([np.empty(0, dtype), *known])
    missing = pa.array([a is None for a in arrays], pa.bool_())
    offsets = _offsets([0 if a is None else len(a) for a in arrays])
    return pa.ListArray.from_arrays(offsets, pa.array(values), mask=missing)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int32())


def _decode(table: pa.Table) -> list[Trajectory]:
    return [t for batch in table.combine_chunks().to_batches() for t in _decode_batch(batch)]


def _decode_batch(batch: pa.RecordBatch) -> list[Trajectory]:
    spans = _decode_spans(batch["spans"].values)
    rows = zip(
        batch["task"].to_pylist(),
        _pieces(batch["tokens"]),
        batch["prompt_length"].to_pylist(),
        batch["end"].to_pylist(),
        batch["parent"].to_pylist(),
        pairwise(batch["spans"].offsets.to_pylist()),
        strict=True,
    )
    return [
        Trajectory(
            task=task,
            tokens=tokens,
            prompt_length=prompt_length,
            spans=tuple(spans[start:stop]),
            end=End(end),
            parent=parent,
        )
        for task, tokens, prompt_length, end, parent, (start, stop) in rows
    ]


def _decode_spans(array: pa.StructArray) -> list[Span]:
    columns = dict(zip(_SPAN.names, array.flatten(), strict=True))
    logprobs = columns.pop("logprobs")
    known = logprobs.is_valid().to_pylist()
    values = [piece if k else None for k, piece in zip(known, _pieces(logprobs), strict=True)]
    rows = zip(*(c.to_pylist() for c in columns.values()), strict=True)
    return [
        _span(dict(zip(columns, row, strict=True)), v) for row, v in zip(rows, values, strict=True)
    ]


def _span(row: Mapping[str, Any], logprobs: Array | None) -> Span:
    first = row["first_version"]
    return Span(
        length=row["length"],
        role=Role(row["role"]),
        producer=Producer(kind=Kind(row["kind"]), name=row["producer"], digest=row["digest"]),
        versions=None if first is None else (first, row["last_version"]),
        sampling=None if row["temperature"] is None else _sampling(row),
        logprobs=logprobs,
    )


def _sampling(row: Mapping[str, Any]) -> Sampling:
    read = {name: row[name] for name in _SAMPLING}
    return Sampling(**{**read, "stop": tuple(read["stop"])})


def _pieces(array: pa.ListArray) -> list[Array]:
    """A numpy copy of each list, empty for null; a view would keep the whole column alive."""
    values = array.values.to_numpy()
    return [values[start:stop].copy() for start, stop in pairwise(array.offsets.to_pylist())]


def _write(path: Path, table: pa.Table) -> str:
    layout = table.schema.metadata[b"posttrain"].decode()
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=3,
        use_dictionary=_REPEATING[layout],
        row_group_size=_ROWS[layout],
        version="2.6",
        data_page_version="1.0",
    )
    raw: bytes = sink.getvalue().to_pybytes()
    write_atomic(path, raw)
    return hashlib.sha256(raw).hexdigest()


def _read(path: Path, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    wanted = schema.metadata[b"posttrain"]
    with _as_data_error(path), pq.ParquetFile(path) as file:
        found = (file.schema_arrow.metadata or {}).get(b"posttrain")
        if found != wanted:
            raise DataError(
                f"{path} holds {found.decode() if found else 'some other table'}",
                expected=wanted.decode(),
                fix="check the path, or read it with the version of posttrain that wrote it",
            )
        return file.read(columns=list(columns), use_threads=False)


@contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged file into DataError; a missing one stays FileNotFoundError."""
    try:
        yield
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path} cannot be read: {error}",
            expected="a Parquet file as posttrain left it",
            fix="put back a copy of the file, or let the stage that wrote it run again",
        ) from error
