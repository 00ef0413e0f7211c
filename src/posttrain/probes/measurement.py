"""What a probe saw: every score of every sample, so that each statistic can be worked out later.

measure(policy) ──▶ Measurement ──to_json──▶ run folder ──from_json──▶ attribution, curves, report

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from posttrain.errors import DataError, RunError, nearest
from posttrain.provenance import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
FORMAT = "posttrain.measurement/1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskMeasurement:
    """A policy's samples on one task set. Arrays are copied and read-only.

    ``nll`` is the mean negative log-prob per token of each sample under the policy itself, in
    nats: its mean estimates the entropy per token. ``kl_base`` holds, for the first K <= n samples
    of each prompt, the sum over tokens of log π − log π_base on the policy's own sample, in nats:
    its mean estimates KL(π ‖ π_base) without bias, though single values may be negative.

    Raises:
        DataError: shapes that do not fit, no prompt or no sample, a prompt named twice, or a
            score that is not finite.

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
    kl_base: FloatArray | None = None  # [P, K], K <= n

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
        self._freeze("scores", self.scores, np.float32, shape)
        self._freeze("lengths", self.lengths, np.int32, shape)
        self._freeze("truncated", self.truncated, np.bool_, shape)
        self._freeze("nll", self.nll, np.float32, shape)
        self._freeze("distinct", self.distinct, np.int32, shape[:1])
        if self.kl_base is not None:
            asked = np.shape(self.kl_base)
            used = asked[1] if len(asked) == 2 and 1 <= asked[1] <= shape[1] else shape[1]
            self._freeze("kl_base", self.kl_base, np.float32, (shape[0], used))
        if not np.isfinite(self.scores).all():
            raise DataError(f"{self.taskset}: scores that are not finite", expected="finite scores")

    def _freeze(
        self, name: str, values: npt.ArrayLike, dtype: type[np.generic], shape: tuple[int, ...]
    ) -> None:
        array = np.array(values, dtype)
        if array.shape != shape:
            raise DataError(
                f"{self.taskset}: {name} of shape {array.shape}", expected=f"shape {shape}"
            )
        array.flags.writeable = False
        object.__setattr__(self, name, array)

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
    """Everything a probe saw of one policy.

    ``digest`` names the policy's weights. ``protocol`` is the hash of prompts, sampling and seeds:
    two measurements can be compared only when theirs are equal.
    """

    policy: str
    digest: str
    protocol: str
    tasks: tuple[TaskMeasurement, ...]

    def __post_init__(self) -> None:
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

    def to_json(self) -> str:
        """One JSON document that :meth:`from_json` reads back bit for bit.

        Successes and failures are strings of 1 and 0, one per prompt, which people can read;
        the other arrays are zlib-compressed little-endian bytes in base64.
        """
        wire = _Wire(
            format=FORMAT,
            policy=self.policy,
            digest=self.digest,
            protocol=self.protocol,
            tasks=[_to_wire(t) for t in self.tasks],
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
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(
                f"not a measurement: {error}", expected=FORMAT, fix="measure the policy again"
            ) from None
        if wire.format != FORMAT:
            raise DataError(f"measurement of format {wire.format!r}", expected=FORMAT)
        tasks = tuple(_from_wire(t) for t in wire.tasks)
        return Measurement(
            policy=wire.policy, digest=wire.digest, protocol=wire.protocol, tasks=tasks
        )


# --- comparability ---------------------------------------------------------------------------


def require_comparable(before: Measurement, after: Measurement) -> None:
    """Refuse to compare measurements that were not taken in the same way.

    Raises:
        RunError: the protocols differ; the message says in what, as far as the measurements show.
    """
    found = _task_differences(before, after)
    if before.protocol != after.protocol:
        seen = found or ["nothing that the measurements show: sampling, seeds or prompt texts"]
        raise RunError(
            f"{before.policy} and {after.policy} were measured in different ways "
            f"(protocols {before.protocol[:8]} and {after.protocol[:8]}); what differs: "
            + "; ".join(seen),
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
    """What keeps two task measurements from being compared, in words. Empty: nothing."""
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
    taskset: str
    success: float
    prompts: list[str]
    scores: list[str] | _Array
    truncated: list[str]
    distinct: list[int]
    lengths: _Array
    nll: _Array
    kl_base: _Array | None


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str
    policy: str
    digest: str
    protocol: str
    tasks: list[_WireTask]


def _to_wire(task: TaskMeasurement) -> _WireTask:
    signs = np.signbit(task.scores)
    binary = bool(np.isin(task.scores, (0.0, 1.0)).all()) and not bool(signs.any())
    return _WireTask(
        taskset=task.taskset,
        success=float(task.success),
        prompts=list(task.prompts),
        scores=_bits(task.scores == 1.0) if binary else _pack(task.scores),
        truncated=_bits(task.truncated),
        distinct=[int(d) for d in task.distinct],
        lengths=_pack(task.lengths),
        nll=_pack(task.nll),
        kl_base=None if task.kl_base is None else _pack(task.kl_base),
    )


def _from_wire(wire: _WireTask) -> TaskMeasurement:
    def floats(stored: _Array) -> FloatArray:
        return _unpack(stored, "<f4", where=wire.taskset)

    scores = (
        floats(wire.scores)
        if isinstance(wire.scores, _Array)
        else _unbits(wire.scores, where=wire.taskset)
    )
    return TaskMeasurement(
        taskset=wire.taskset,
        success=wire.success,
        prompts=tuple(wire.prompts),
        scores=scores.astype(np.float32),
        truncated=_unbits(wire.truncated, where=wire.taskset),
        distinct=np.array(wire.distinct, np.int32),
        lengths=_unpack(wire.lengths, "<i4", where=wire.taskset),
        nll=floats(wire.nll),
        kl_base=None if wire.kl_base is None else floats(wire.kl_base),
    )


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


def _unpack(stored: _Array, dtype: str, *, where: str) -> npt.NDArray[Any]:
    try:
        raw = zlib.decompress(base64.b64decode(stored.zlib64, validate=True))
    except (zlib.error, binascii.Error):
        raise DataError(f"{where}: a damaged array", fix="measure the policy again") from None
    size = int(np.prod(stored.shape)) * np.dtype(dtype).itemsize
    if stored.dtype != dtype or len(raw) != size or min(stored.shape, default=0) < 0:
        raise DataError(
            f"{where}: {len(raw)} bytes for an array {stored.dtype}{stored.shape}",
            expected=f"{dtype}, {size} bytes",
            fix="measure the policy again",
        )
    native = np.dtype(dtype).newbyteorder("=")
    return np.frombuffer(raw, dtype).reshape(stored.shape).astype(native)
