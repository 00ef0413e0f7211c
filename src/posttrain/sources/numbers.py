"""Numbers beside an answer in a data file: its logged reward, its weight."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np
import numpy.typing as npt

from posttrain.composition import Dataset
from posttrain.core.errors import DataError
from posttrain.core.trajectory import Column


def row_numbers(
    spec: Dataset, row: Mapping[str, object]
) -> Mapping[Column, npt.NDArray[np.float64]]:
    """The row's reward, weight and margin, where the specification names their columns.

    Raises:
        DataError: a missing or unusable number.
    """
    out: dict[Column, npt.NDArray[np.float64]] = {}
    named = {Column.REWARD: spec.reward, Column.WEIGHT: spec.weight, Column.MARGIN: spec.margin}
    for column, name in named.items():
        if name is None:
            continue
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise DataError(f"{column} {name}={value!r}", expected="a finite number in every row")
        if column is Column.WEIGHT and value < 0:
            raise DataError(
                f"{column} {name}={value!r}",
                expected="0 or more: a negative weight would push the answer away without bound",
            )
        if column is Column.MARGIN and value < 0:
            raise DataError(f"{column} {name}={value!r}", expected="0 or more")
        out[column] = np.asarray(float(value))
    return out
