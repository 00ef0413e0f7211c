"""The numbers that options hold: finite, and bounded by their type.

Every number of every :class:`~posttrain.core.config.Config` has one of these types, so that its
range is checked where it is read, whether it comes from YAML or from Python. Infinity and NaN are
in no range. What depends on several options is checked by the class that has them.

============ ================== =========================================================
type         range              for
============ ================== =========================================================
Number       −10¹² … 10¹²       rewards, bounds on a metric
Integer      −10¹² … 10¹²       settings of other libraries
NonNegative  0 … 10¹²           weights, clips
Positive     above 0 … 10¹²     what is divided by, scales
Share        0 … 1              shares, probabilities, discounts
Rate         above 0 … 1        shares of which there must be some
Decay        0 … below 1        averages that forget, label smoothing
Inner        between 0 and 1    both ends are another method
Whole        0 … 10⁹            counts that may be none
Count        1 … 10⁹            steps, updates
Size         1 … 65,536         answers to one prompt, ranks of adapters
Tokens       1 … 2²⁴            the length of an answer
Threads      1 … 1,024          CPU threads
Seed         0 … 2⁶³ − 1        what every generator in use takes
============ ================== =========================================================
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

MOST = 1e12
"""The largest number that is read, of an option or of a row."""

MOST_STEPS = 10**9

Number: TypeAlias = Annotated[float, Meta(ge=-MOST, le=MOST)]
NonNegative: TypeAlias = Annotated[float, Meta(ge=0, le=MOST)]
Positive: TypeAlias = Annotated[float, Meta(gt=0, le=MOST)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Rate: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
Decay: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]
Inner: TypeAlias = Annotated[float, Meta(gt=0, lt=1)]

Integer: TypeAlias = Annotated[int, Meta(ge=-(10**12), le=10**12)]
Whole: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_STEPS)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=MOST_STEPS)]
Size: TypeAlias = Annotated[int, Meta(ge=1, le=65_536)]
Tokens: TypeAlias = Annotated[int, Meta(ge=1, le=2**24)]
Threads: TypeAlias = Annotated[int, Meta(ge=1, le=1024)]
Seed: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]


def range_words(bounds: Meta, *, found: float | None = None) -> str:
    """The range of a number in words.

    Limits that only keep numbers finite and sizes sane are left out, unless ``found`` breaks them.

    Example:
        >>> range_words(Meta(gt=0, le=1)), range_words(Meta(ge=1, le=10**9))
        ('above 0, at most 1', '1 or more')
        >>> range_words(Meta(ge=1, le=10**9), found=10**30)
        'from 1 to 1,000,000,000'
    """
    ge, gt, lt = _telling(bounds.ge), bounds.gt, bounds.lt
    le = bounds.le if found is not None and found > (bounds.le or 0) else _telling(bounds.le)
    if ge is not None and le is not None:
        return f"from {_number(ge)} to {_number(le)}"
    words = [f"{_number(ge)} or more"] if ge is not None else []
    words += [f"above {_number(gt)}"] if gt is not None else []
    words += [f"below {_number(lt)}"] if lt is not None else []
    words += [f"at most {_number(le)}"] if le is not None else []
    return ", ".join(words)


def _telling(limit: float | None) -> float | None:
    return limit if limit is not None and abs(limit) <= 1 else None


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
