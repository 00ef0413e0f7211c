"""A measurement: every score of every sample, so that each statistic can be computed later.

measure_policy ──▶ Measurement ──to_json──▶ run folder ──from_json──▶ metrics, attribution, report

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from posttrain.core.errors import DataError, RunError, nearest
from posttrain.core.guard import reading
from posttrain.core.provenance import FloatArray, IntArray
from posttrain.measure.columns import (
    RawArray,
    RawColumn,
    raw_column_named,
    raw_columns,
    read_only,
)

BoolArray = npt.NDArray[np.bool_]
FORMAT = "posttrain.measurement/1"
_DIGEST = re.compile(r"[0-9a-f]{16,}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskMeasurement:
    """A policy's samples on one task set. Arrays are copied and read-only.

    ``nll`` is the mean negative log-prob per token of each sample under the policy itself, in
    nats: its mean estimates the entropy per token.

    ``raw`` holds what else was recorded, by the name of its column (see columns.py); None where
    nothing was. Files of earlier versions lack some columns.

    Raises:
        DataError: mismatched shapes, no prompt or no sample, a duplicate prompt, or a score that
            is not finite.

    Example:
        >>> m = TaskMeasurement(taskset="sums", prompts=("sums/1", "sums/2"),
        ...     scores=np.array([[1, 0, 1, 1], [0, 0, 0, 0]]), success=1.0,
        ...     lengths=np.full((2, 4), 3), truncated=np.zeros((2, 4)), nll=np.ones((2, 4)),
        ...     distinct=np.array([2, 1]))
        >>> m.counts.tolist(), m.num_samples
        ([3, 0], 4)
    """

    taskset: str
    prompts: tuple[str, ...]  # [P] task keys
    scores: FloatArray  # [P, n]
    success: float  # a score of at least this counts as solved
    lengths: IntArray  # [P, n] completion tokens
    truncated: BoolArray  # [P, n] the budget ended the sample, not the policy
    nll: FloatArray  # [P, n]
    distinct: IntArray  # [P] number of distinct answers
    raw: Mapping[str, npt.ArrayLike | None] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if len(set(self.prompts)) != len(self.prompts):
            raise DataError(
                f"{self.taskset}: {len(self.prompts)} prompts, {len(set(self.prompts))} different",
                expected="every prompt once",
            )
        shape = np.shape(self.scores)
        if len(shape) != 2 or shape[0] != len(self.prompts) or 0 in shape:
            raise DataError(
                f"{self.taskset}: scores of shape {shape} for {len(self.prompts)} prompts",
                expected="[prompts, samples], at least one of each",
            )
        for name, values, dtype, wanted in (
            ("scores", self.scores, np.float32, shape),
            ("lengths", self.lengths, np.int32, shape),
            ("truncated", self.truncated, np.bool_, shape),
            ("nll", self.nll, np.float32, shape),
            ("distinct", self.distinct, np.int32, shape[:1]),
        ):
            array = read_only(values, dtype, wanted, f"{self.taskset}: {name}")
            object.__setattr__(self, name, array)
        whole = (shape[0], shape[1])
        kept = {
            name: raw_column_named(name).frozen(values, shape=whole, where=self.taskset)
            for name, values in self.raw.items()
            if values is not None
        }
        object.__setattr__(self, "raw", MappingProxyType(kept))
        if not np.isfinite(self.scores).all():
            raise DataError(f"{self.taskset}: scores that are not finite", expected="finite scores")

    def find(self, column: RawColumn) -> RawArray | None:
        """The values of a raw column; None when the measurement lacks it."""
        values = self.raw.get(column.name)
        return None if values is None else np.asarray(values)

    def need(self, column: RawColumn) -> RawArray:
        """The values of a raw column.

        Raises:
            ConfigError: the measurement lacks it; with the reason and the fix.
        """
        values = self.find(column)
        if values is None:
            raise column.missing(self.taskset)
        return values

    @property
    def num_samples(self) -> int:
        """n, the samples per prompt."""
        return int(self.scores.shape[1])

    @property
    def successes(self) -> BoolArray:
        """[P, n] True where the score reaches the threshold, compared in float32."""
        return np.asarray(self.scores >= np.float32(self.success))

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[P] successes per prompt."""
        return np.asarray(self.successes.sum(axis=1), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """The samples of one policy on all task sets.

    ``digest`` identifies the policy's weights. ``protocol`` is the hash of prompts, sampling and
    seeds: two measurements can be compared only when theirs are equal. ``parts`` is the protocol
    part by part, as short words or digests, so that an error can name what differs: ``decoding``,
    ``seeds``, ``template``, and ``prompts of T`` and ``verifier of T`` for each task set T. Files
    of earlier versions have none.
    """

    policy: str
    digest: str
    protocol: str
    tasks: tuple[TaskMeasurement, ...]
    parts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))
        names = [t.taskset for t in self.tasks]
        if doubled := sorted({n for n in names if names.count(n) > 1}):
            raise DataError(f"{self.policy}: task sets measured twice: {doubled}")

    def task(self, name: str) -> TaskMeasurement:
        """The measurement of one task set.

        Raises:
            RunError: that task set was not measured.
        """
        for task in self.tasks:
            if task.taskset == name:
                return task
        known = [t.taskset for t in self.tasks]
        raise RunError(f"no measurement of {self.policy} on {name!r}", fix=nearest(name, known))

    def only(self, names: Sequence[str]) -> Measurement:
        """The same policy on some of the task sets, in the order given.

        Its protocol is the hash of the parts that concern them, if the parts are known.

        Raises:
            RunError: a task set was not measured.
        """
        tasks = tuple(self.task(name) for name in dict.fromkeys(names))
        kept = {n for t in tasks for n in (f"prompts of {t.taskset}", f"verifier of {t.taskset}")}
        parts = {k: v for k, v in self.parts.items() if " of " not in k or k in kept}
        protocol = digest_of(parts) if parts else self.protocol
        return replace(self, protocol=protocol, tasks=tasks, parts=parts)

    def to_json(self) -> str:
        """One JSON document that :meth:`from_json` reads back bit for bit.

        Successes and failures are readable strings of 1 and 0, one per prompt; the other arrays
        are zlib-compressed little-endian bytes in base64.
        """
        wire = _Wire(
            format=FORMAT,
            policy=self.policy,
            digest=self.digest,
            protocol=self.protocol,
            tasks=[_to_wire(t) for t in self.tasks],
            parts=dict(self.parts),
        )
        return msgspec.json.format(msgspec.json.encode(wire), indent=1).decode()

    @staticmethod
    def from_json(text: str) -> Measurement:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: the text is not a measurement, or is damaged.
        """
        try:
            wire = msgspec.json.decode(text, type=_Wire)
            if wire.format != FORMAT:
                raise DataError(f"measurement of format {wire.format!r}", expected=FORMAT)
            tasks = tuple(_from_wire(t) for t in wire.tasks)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(
                f"not a measurement: {error}", expected=FORMAT, fix="measure the policy again"
            ) from None
        return Measurement(
            policy=wire.policy,
            digest=wire.digest,
            protocol=wire.protocol,
            tasks=tasks,
            parts=wire.parts,
        )


# --- comparability ---------------------------------------------------------------------------


def require_comparable(before: Measurement, after: Measurement) -> None:
    """Refuse to compare measurements that were not taken in the same way.

    Raises:
        RunError: the protocols differ; the message names the differences that are known.
    """
    found = _task_differences(before, after)
    named = _part_differences(before, after)
    both_named = bool(before.parts and after.parts)  # then the digests add nothing
    if named or (not both_named and before.protocol != after.protocol):
        seen = [*named, *found]
        unseen = "nothing that the measurements show: decoding, seeds, verifier or prompt texts"
        raise RunError(
            f"{before.policy} and {after.policy} were measured in different ways "
            f"(protocols {before.protocol[:8]} and {after.protocol[:8]}); what differs: "
            + "; ".join(seen or [unseen]),
            expected="the same prompts, samples, decoding, seeds and scorer for both",
            fix="measure both policies again with one recipe",
        )
    if found:
        raise RunError(
            f"{before.policy} and {after.policy} claim one protocol, yet differ: "
            + "; ".join(found),
            fix="measure both policies again; one of the files is damaged or edited",
        )


def require_same_task(before: TaskMeasurement, after: TaskMeasurement) -> None:
    """Refuse two task measurements whose prompts, samples or threshold differ.

    Raises:
        RunError: says what differs.
    """
    if found := differences(before, after):
        raise RunError(
            "two measurements of different things: " + "; ".join(found),
            expected="the same task set, prompts in the same order, samples and threshold",
            fix="measure both policies with one recipe",
        )


def differences(before: TaskMeasurement, after: TaskMeasurement) -> list[str]:
    """Why two task measurements cannot be compared, in words. Empty: they can."""
    name = before.taskset
    found = []
    if name != after.taskset:
        found.append(f"task set {name!r} and {after.taskset!r}")
    if before.prompts != after.prompts:
        shared = len(set(before.prompts) & set(after.prompts))
        found.append(
            f"{name}: {len(before.prompts)} and {len(after.prompts)} prompts, {shared} in common"
            + (", in another order" if set(before.prompts) == set(after.prompts) else "")
        )
    if before.num_samples != after.num_samples:
        found.append(f"{name}: {before.num_samples} and {after.num_samples} samples per prompt")
    if before.success != after.success:
        found.append(f"{name}: success from a score of {before.success} and {after.success}")
    return found


def _part_differences(before: Measurement, after: Measurement) -> list[str]:
    """Which named parts of the protocol differ; none when one side is of an earlier version."""
    found = []
    for name in before.parts:
        old, new = before.parts[name], after.parts.get(name)
        if new is None or old == new:  # task sets of one side only: _task_differences
            continue
        opaque = _DIGEST.fullmatch(old) and _DIGEST.fullmatch(new)
        found.append(f"the {name}" if opaque else f"the {name} ({old!r} and {new!r})")
    return found


def digest_of(parts: Mapping[str, str]) -> str:
    """The protocol digest of these parts."""
    return hashlib.sha256(json.dumps(dict(sorted(parts.items()))).encode()).hexdigest()


def _task_differences(before: Measurement, after: Measurement) -> list[str]:
    first, second = ({t.taskset: t for t in m.tasks} for m in (before, after))
    found = [f"only {before.policy} was measured on {n!r}" for n in first if n not in second]
    found += [f"only {after.policy} was measured on {n!r}" for n in second if n not in first]
    for name in first:
        if name in second:
            found += differences(first[name], second[name])
    return found


# --- the file format -------------------------------------------------------------------------


class _Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    zlib64: str


class _WireTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fixed fields of a task measurement; each raw column adds one."""

    taskset: str
    success: float
    prompts: list[str]
    scores: list[str] | _Array
    truncated: list[str]
    distinct: list[int]
    lengths: _Array
    nll: _Array


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str
    policy: str
    digest: str
    protocol: str
    tasks: list[dict[str, Any]]
    parts: dict[str, str] = {}


def _to_wire(task: TaskMeasurement) -> dict[str, Any]:
    signs = np.signbit(task.scores)
    binary = bool(np.isin(task.scores, (0.0, 1.0)).all()) and not bool(signs.any())
    core = _WireTask(
        taskset=task.taskset,
        success=float(task.success),
        prompts=list(task.prompts),
        scores=_bits(task.scores == 1.0) if binary else _pack(task.scores),
        truncated=_bits(task.truncated),
        distinct=[int(d) for d in task.distinct],
        lengths=_pack(task.lengths),
        nll=_pack(task.nll),
    )
    return {
        **msgspec.to_builtins(core),
        **{n: _column_out(task.find(c)) for n, c in raw_columns().items()},
    }


def _from_wire(fields: dict[str, Any]) -> TaskMeasurement:
    columns = raw_columns()
    wire = msgspec.convert({k: v for k, v in fields.items() if k not in columns}, _WireTask)
    where = wire.taskset
    return TaskMeasurement(
        taskset=where,
        success=wire.success,
        prompts=tuple(wire.prompts),
        scores=_unbits(wire.scores, where=where).astype(np.float32)
        if isinstance(wire.scores, list)
        else _unpack(wire.scores, np.float32, where=where),
        truncated=_unbits(wire.truncated, where=where),
        distinct=np.array(wire.distinct, np.int32),
        lengths=_unpack(wire.lengths, np.int32, where=where),
        nll=_unpack(wire.nll, np.float32, where=where),
        raw={
            name: _column_in(fields[name], column, where=where)
            for name, column in columns.items()
            if fields.get(name) is not None
        },
    )


def _column_out(values: RawArray | None) -> object:
    if values is None:
        return None
    return _bits(values) if values.dtype == np.bool_ else msgspec.to_builtins(_pack(values))


def _column_in(stored: object, column: RawColumn, *, where: str) -> RawArray:
    if column.dtype is np.bool_:
        return _unbits(msgspec.convert(stored, list[str]), where=where)
    return _unpack(msgspec.convert(stored, _Array), column.dtype, where=where)


def _bits(flags: npt.NDArray[Any]) -> list[str]:
    return ["".join("1" if f else "0" for f in row) for row in flags]


def _unbits(rows: list[str], *, where: str) -> BoolArray:
    if not rows or len({len(r) for r in rows}) != 1 or set("".join(rows)) - {"0", "1"}:
        raise DataError(f"{where}: damaged strings of 0 and 1", fix="measure the policy again")
    return np.array([[c == "1" for c in row] for row in rows])


def _pack(array: npt.NDArray[Any]) -> _Array:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    coded = base64.b64encode(zlib.compress(little.tobytes(), 9)).decode()
    return _Array(dtype=little.dtype.str, shape=list(array.shape), zlib64=coded)


_AGAIN = "measure the policy again"
_MOST_BYTES = 1 << 30


def _unpack(stored: _Array, kind: type[np.generic], *, where: str) -> npt.NDArray[Any]:
    dtype = np.dtype(kind).newbyteorder("<").str
    size = math.prod(stored.shape) * np.dtype(dtype).itemsize
    with reading(f"{where}: a damaged array", kind="compressed bytes", fix=_AGAIN):
        packed = base64.b64decode(stored.zlib64, validate=True)
        # Never more than the shape says, and never more than a measurement holds.
        raw = zlib.decompressobj().decompress(packed, min(max(size, 0), _MOST_BYTES) + 1)
    if stored.dtype != dtype or len(raw) != size or min(stored.shape, default=0) < 0:
        raise DataError(
            f"{where}: {len(raw)} bytes for an array {stored.dtype}{stored.shape}",
            expected=f"{dtype}, {size} bytes",
            fix="measure the policy again",
        )
    native = np.dtype(dtype).newbyteorder("=")
    return np.frombuffer(raw, dtype).reshape(stored.shape).astype(native)
