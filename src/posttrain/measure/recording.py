"""Recording raw data: the decorator that registers a column with the function that fills it.

policy, task set ──measure_policy──▶ TaskSamples ──@raw_column functions──▶ one array per column

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from posttrain.core.provenance import FloatArray
from posttrain.core.task import Task, TaskSet
from posttrain.measure.columns import Per, RawArray, RawColumn, raw_columns, register_column
from posttrain.measure.spec import Measure
from posttrain.protocols import Completion, Policy, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSamples:
    """Everything that was sampled on one task set, for :class:`RawColumn` to record.

    Flat sequences hold the n samples of the first prompt, then those of the second, and so on.
    """

    policy: Policy
    base: Policy | None  # the policy that distances are counted from, if there is one
    taskset: TaskSet
    spec: Measure
    tasks: Sequence[Task]  # [P]
    prompts: Sequence[Prompt]  # [P]
    completions: Sequence[Completion]  # [P·n]
    texts: Sequence[str]  # [P·n]
    answers: Sequence[str]  # [P·n] final answers, as the task set reads them
    scores: FloatArray  # [P, n]

    @property
    def num_samples(self) -> int:
        """n, the samples per prompt."""
        return self.spec.samples

    def rows(self, flat: Sequence[str]) -> list[Sequence[str]]:
        """One sequence of n per prompt."""
        n = self.num_samples
        return [flat[i : i + n] for i in range(0, len(flat), n)]


Record = Callable[[TaskSamples], npt.ArrayLike | None]
_RECORDS: dict[str, Record] = {}


class _ColumnShape(TypedDict):
    dtype: type[np.bool_] | type[np.int32] | type[np.float32]
    per: Per
    absent: str


class ColumnFields(_ColumnShape, total=False):
    """What :func:`raw_column` passes on to :class:`RawColumn`."""

    expected: str
    plain_sampling: bool
    fault: Callable[[RawArray, int], str | None]


def raw_column(name: str, **about: Unpack[ColumnFields]) -> Callable[[Record], RawColumn]:
    """Register raw data under a name, filled by the decorated function.

    It gives the values of the column's shape, or None where there are none.

    Raises:
        ConfigError: the name is taken.
    """

    def decorate(record: Record) -> RawColumn:
        column = register_column(RawColumn(name=name, **about))
        _RECORDS[name] = record
        return column

    return decorate


def record_columns(samples: TaskSamples) -> dict[str, npt.ArrayLike | None]:
    """The values of every registered column, by name."""
    return {name: _RECORDS[name](samples) for name in raw_columns()}
