"""Raw data of a measurement: what is recorded of every sample while measuring.

samples of a task set ──recording.py──▶ TaskMeasurement.raw ──▶ metrics
                                                  └──▶ JSON: one field per column

Scores, lengths and log-probs are part of every measurement. Everything else that a metric needs is
a raw column, registered beside the metric. A column may be missing: files of earlier versions
lack some, or the policy does not provide it. Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError, DataError, nearest
from posttrain.measure.discovery import import_every_module

RawArray = npt.NDArray[Any]


Per = Literal["prompt", "sample", "first samples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawColumn:
    """One kind of raw data: its name, type and shape.

    ``per`` is "prompt" for [P], "sample" for [P, n] and "first samples" for [P, R] with R <= n.
    ``absent`` is the message when a measurement lacks the column. A file holds booleans as strings
    of 0 and 1, and numbers as compressed bytes.
    """

    name: str
    dtype: type[np.bool_] | type[np.int32] | type[np.float32]
    per: Per
    absent: str  # such as "answers were not kept"
    expected: str | None = None  # how to measure it, where measuring again is not enough
    plain_sampling: bool = False  # recorded at temperature 1 without truncation only
    # None, or the error of an array of the right shape, given n
    fault: Callable[[RawArray, int], str | None] = lambda array, num_samples: None

    def frozen(self, values: npt.ArrayLike, *, shape: tuple[int, int], where: str) -> RawArray:
        """A read-only copy of the right type.

        Args:
            values: what was recorded.
            shape: (P, n) of the measurement.
            where: the task set, for messages.

        Raises:
            DataError: another shape, or invalid values.
        """
        wanted: tuple[int, ...] = shape[:1] if self.per == "prompt" else shape
        given = np.shape(values)
        if self.per == "first samples" and len(given) == 2 and 1 <= given[1] <= shape[1]:
            wanted = (shape[0], given[1])
        array = read_only(values, self.dtype, wanted, f"{where}: {self.name}")
        if wrong := self.fault(array, shape[1]):
            raise DataError(f"{where}: {self.name} {wrong}", expected=self.expected)
        return array

    def missing(self, where: str) -> ConfigError:
        """The error for a measurement without this column."""
        fix = None if self.expected else "measure the policy again"
        return ConfigError(f"{where}: {self.absent}", expected=self.expected, fix=fix)


def read_only(
    values: npt.ArrayLike, dtype: type[np.generic], shape: tuple[int, ...], what: str
) -> RawArray:
    """A read-only copy of this type.

    Raises:
        DataError: another shape.
    """
    array = np.array(values, dtype)
    if array.shape != shape:
        raise DataError(f"{what} of shape {array.shape}", expected=f"shape {shape}")
    array.flags.writeable = False
    return array


# --- the table -------------------------------------------------------------------------------

_COLUMNS: dict[str, RawColumn] = {}


def register_column(column: RawColumn) -> RawColumn:
    """Add a column to the table.

    Raises:
        ConfigError: its name is taken, or ``per`` is none of those above.
    """
    if column.per not in get_args(Per):
        raise ConfigError(
            f"raw column {column.name!r} per {column.per!r}", fix=nearest(column.per, get_args(Per))
        )
    if column.name in _COLUMNS:
        raise ConfigError(f"raw column {column.name!r} is registered twice", expected="a new name")
    _COLUMNS[column.name] = column
    return column


def raw_columns() -> Mapping[str, RawColumn]:
    """Every registered column by name, in alphabetical order."""
    import_every_module()
    return dict(sorted(_COLUMNS.items()))


def raw_column_named(name: str) -> RawColumn:
    """The column of that name.

    Raises:
        DataError: no metric registered it; names the nearest.
    """
    known = raw_columns()
    if name not in known:
        raise DataError(f"no raw column {name!r}", fix=nearest(name, known))
    return known[name]
