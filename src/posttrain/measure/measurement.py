"""What a probe saw: every score of every sample, so that each statistic can be worked out later.

measure(policy) ──▶ Measurement ──to_json──▶ run folder ──from_json──▶ attribution, curves, report

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
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
from posttrain.core.provenance import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
FORMAT = "posttrain.measurement/1"
_DIGEST = re.compile(r"[0-9a-f]{16,}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskMeasurement:
    """A policy's samples on one task set. Arrays are copied and read-only.

    ``nll`` is the mean negative log-prob per token of each sample under the policy itself, in
    nats: its mean estimates the entropy per token. ``kl_base`` holds, for the first K <= n samples
    of each prompt, the sum over tokens of log π − log π_base on the policy's own sample, in nats:
    its mean estimates KL(π ‖ π_base) without bias, though single values may be negative.

    Fields that default to None are missing in files of earlier versions; probes that need them
    say so. ``answers`` numbers the different final answers to a prompt from 0, in the order in
    which they first came. ``recheck`` holds, for the first R <= n samples of each prompt, True
    where scoring the same answer once more gave another score.

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
    answers: IntArray | None = None  # [P, n], numbers of the prompt's distinct answers
    self_bleu: FloatArray | None = None  # [P], 0 to 1, see texts.py
    repetition: FloatArray | None = None  # [P, n], 0 to 1, see texts.py
    recheck: BoolArray | None = None  # [P, R], R <= n

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
        for name, dtype, extra in (
            ("kl_base", np.float32, self.kl_base),
            ("recheck", np.bool_, self.recheck),
        ):
            if extra is not None:
                asked = np.shape(extra)
                used = asked[1] if len(asked) == 2 and 1 <= asked[1] <= shape[1] else shape[1]
                self._freeze(name, extra, dtype, (shape[0], used))
        if self.answers is not None:
            self._freeze("answers", self.answers, np.int32, shape)
            if self.answers.min() < 0 or self.answers.max() >= shape[1]:
                raise DataError(
                    f"{self.taskset}: answers numbered outside 0 to {shape[1] - 1}",
                    expected="numbers of the distinct answers of one prompt",
                )
        if self.self_bleu is not None:
            self._freeze("self_bleu", self.self_bleu, np.float32, shape[:1])
        if self.repetition is not None:
            self._freeze("repetition", self.repetition, np.float32, shape)
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
    two measurements can be compared only when theirs are equal. ``parts`` says the same part by
    part, as short words or digests, so that a refusal can name what differs: ``decoding``,
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

        Its protocol names the parts that concern them, if the parts are known.

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

        Successes and failures are strings of 1 and 0, one per prompt, which people can read;
        the other arrays are zlib-compressed little-endian bytes in base64.
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
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(
                f"not a measurement: {error}", expected=FORMAT, fix="measure the policy again"
            ) from None
        if wire.format != FORMAT:
            raise DataError(f"measurement of format {wire.format!r}", expected=FORMAT)
        tasks = tuple(_from_wire(t) for t in wire.tasks)
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
        RunError: the protocols differ; the message says in what, as far as the measurements show.
    """
    found = _task_differences(before, after)
    named = _part_differences(before, after)
    told = bool(before.parts and after.parts)  # then the digests say nothing more
    if named or (not told and before.protocol != after.protocol):
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


def _part_differences(before: Measurement, after: Measurement) -> list[str]:
    """Which named parts of the protocol differ; none when one side is of an earlier version."""
    found = []
    for name in before.parts:
        old, new = before.parts[name], after.parts.get(name)
        if new is None or old == new:  # a task set of one side only is told elsewhere
            continue
        opaque = _DIGEST.fullmatch(old) and _DIGEST.fullmatch(new)
        found.append(f"the {name}" if opaque else f"the {name} ({old!r} and {new!r})")
    return found


def digest_of(parts: Mapping[str, str]) -> str:
    """The protocol that consists of these parts."""
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
    taskset: str
    success: float
    prompts: list[str]
    scores: list[str] | _Array
    truncated: list[str]
    distinct: list[int]
    lengths: _Array
    nll: _Array
    kl_base: _Array | None
    answers: _Array | None = None
    self_bleu: _Array | None = None
    repetition: _Array | None = None
    recheck: list[str] | None = None


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str
    policy: str
    digest: str
    protocol: str
    tasks: list[_WireTask]
    parts: dict[str, str] = {}


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
        kl_base=_packed(task.kl_base),
        answers=_packed(task.answers),
        self_bleu=_packed(task.self_bleu),
        repetition=_packed(task.repetition),
        recheck=None if task.recheck is None else _bits(task.recheck),
    )


def _from_wire(wire: _WireTask) -> TaskMeasurement:
    def floats(stored: _Array) -> FloatArray:
        return _unpack(stored, "<f4", where=wire.taskset)

    def known(stored: _Array | None) -> FloatArray | None:
        return None if stored is None else floats(stored)

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
        kl_base=known(wire.kl_base),
        answers=None if wire.answers is None else _unpack(wire.answers, "<i4", where=wire.taskset),
        self_bleu=known(wire.self_bleu),
        repetition=known(wire.repetition),
        recheck=None if wire.recheck is None else _unbits(wire.recheck, where=wire.taskset),
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


def _packed(array: npt.NDArray[Any] | None) -> _Array | None:
    return None if array is None else _pack(array)


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
