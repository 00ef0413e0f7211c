"""Numbers for a drawing: what is missing or not finite is None, and is never drawn as zero."""

from __future__ import annotations

import math

from posttrain.measure.bootstrap import Bounded


def known(value: float | None) -> float | None:
    """The number itself, or None when it is missing or not finite.

    Example:
        >>> known(0.5), known(float("nan")), known(None)
        (0.5, None, None)
    """
    return value if value is not None and math.isfinite(value) else None


def value_of(of: Bounded | None) -> float | None:
    """The number, where there is one."""
    return None if of is None else known(of.value)


def bounds_of(of: Bounded | None) -> tuple[float, float] | None:
    """(low, high), where the number and both bounds are known."""
    if of is None or not all(math.isfinite(x) for x in (of.value, of.low, of.high)):
        return None
    return of.low, of.high


def amount(of: Bounded | None) -> float:
    """How long to draw it: nothing for a number that is not known."""
    return value_of(of) or 0.0
