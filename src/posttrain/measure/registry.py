"""The vocabulary of measures: every number that there is a name for, registered once.

decorated functions (estimators.py) ─┐
probes with samples of their own ────┴──▶ Metric ──▶ take, gates, rules, tables, cards

A new metric is a decorated function in a file of this folder; what it needs besides scores,
lengths and log-probs is a raw column beside it (columns.py). Nothing else lists names. A number in
a name, as in ``pass@64``, is registered as a letter: ``pass@k``.

Shape legend: ``P`` prompts, ``n`` samples per prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol, TypedDict, Unpack

from posttrain.core.errors import ConfigError, nearest
from posttrain.measure.bootstrap import Interval
from posttrain.measure.columns import RawColumn
from posttrain.measure.discovery import import_every_module
from posttrain.measure.measurement import TaskMeasurement


class Topic(StrEnum):
    """What a metric is about. Tables are in this order."""

    SUCCESS = "success"
    SUPPORT = "support"
    SIGNAL = "signal for learning from own samples"
    DIVERSITY = "diversity"
    TRUST = "whether the numbers can be trusted"
    FORM = "form and cost"
    CHANGE = "change since an earlier policy"
    CHAIN = "a chain of stages"
    DISTANCE = "distance from the base"
    STATES = "own against correct prefixes"


class Better(StrEnum):
    """Which way is good."""

    HIGHER = "higher is better"
    LOWER = "lower is better"
    NEITHER = "neither is better by itself"


@dataclass(frozen=True, slots=True)
class Parameter:
    """The number in a metric's name: its letter, and what it may be."""

    letter: str
    whole: bool  # a whole number from 1 on; otherwise a share from 0 to 1

    def allows(self, digits: str) -> bool:
        """True for the digits of a number within range."""
        number = float(digits)
        return (digits.isdigit() and number >= 1) if self.whole else 0 <= number <= 1

    @property
    def words(self) -> str:
        """Its range, in words."""
        kind = "a whole number" if self.whole else "0 to 1"
        return f"{kind} for {self.letter}" + (f", {self.letter} >= 1" if self.whole else "")


PARAMETERS = MappingProxyType({c: Parameter(c, whole=c in "kg") for c in "kgtf"})
"""k tries, g samples of a group, t a success rate, f a share of an answer."""


@dataclass(frozen=True, slots=True)
class Estimation:
    """With which confidence intervals hold, and from which success rate a prompt is in reach."""

    confidence: float = 0.95
    seed: int = 0  # of the bootstrap
    epsilon: float = 0.05


USUAL = Estimation()


@dataclass(frozen=True, slots=True)
class Found:
    """A number with its interval, and one plain sentence. ``samples`` if other than n."""

    interval: Interval
    words: str
    samples: int | None = None


class Estimator(Protocol):
    """How the numbers of a metric come from measurements."""

    @property
    def looks_back(self) -> bool:
        """True when it is a change itself, and so needs an earlier policy."""
        ...

    @property
    def pairs(self) -> bool:
        """True when its own change since another policy can be had."""
        ...

    def read(
        self, now: TaskMeasurement, since: TaskMeasurement | None, k: float, how: Estimation
    ) -> Found | None:
        """The number; None when there is nothing to tell it from."""
        ...

    def change(
        self, now: TaskMeasurement, since: TaskMeasurement, k: float, how: Estimation
    ) -> Interval:
        """The number less that of the earlier policy, paired by prompt."""
        ...


_NAME = re.compile(r"^[a-z0-9_]+(?:[@^]([a-z]))?$")
_ASKED = re.compile(r"^([a-z0-9_]+)([@^])(\d+(?:\.\d+)?)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What a name stands for, and how its number is had.

    Raises:
        ConfigError: a name that cannot be parsed, or nothing said about what it means.

    Example:
        >>> asked = find_metric("pass@64")
        >>> asked.metric.meaning, asked.k, asked.metric.can_be_asked
        ('at least one of k tries succeeds', 64.0, True)
    """

    name: str  # with a letter for its number
    topic: Topic
    meaning: str
    unit: str
    better: Better
    source: str  # an arXiv id, or in a word
    estimator: Estimator | None = None  # None: a probe with samples of its own gives it
    columns: tuple[RawColumn, ...] = ()  # raw data that it needs
    # Why it cannot be told from a measurement, besides a missing column; None: it can.
    lacks: Callable[[TaskMeasurement], str | None] = lambda task: None
    routine: bool = True  # reported wherever samples are read
    usual: Callable[[int], Sequence[float]] = lambda num_samples: ()  # its routine numbers, by n
    unknown: tuple[float, float, float] | None = None  # value, low, high when nothing can be told
    phrase: str | Callable[[float], str] = ""  # in its place, for people who do not know the name
    overview: tuple[str, str] | None = None  # a column of the overview: (name, heading)
    in_changes: bool = False  # a column of the table of changes
    formerly: Mapping[str, str] = field(default_factory=dict)  # retired name: name to use

    def __post_init__(self) -> None:
        found = _NAME.match(self.name)
        if not found or (found.group(1) or "k") not in PARAMETERS:
            raise ConfigError(
                f"metric {self.name!r}",
                expected=f"small letters, and at the end @ or ^ with one of {list(PARAMETERS)}",
            )
        if silent := [f for f in ("meaning", "unit", "source") if not getattr(self, f)]:
            raise ConfigError(f"metric {self.name!r} without {', '.join(silent)}", fix="say it")

    @property
    def parameter(self) -> Parameter | None:
        """What the number in its name may be; None when there is none."""
        return PARAMETERS[self.name[-1]] if self.name[-2:-1] in ("@", "^") else None

    @property
    def stem(self) -> str:
        """The name without its number."""
        return self.name if self.parameter is None else self.name[:-2]

    @property
    def can_be_asked(self) -> bool:
        """True when a gate may ask for it: it is read off samples that a run takes anyway."""
        return self.estimator is not None

    @property
    def looks_back(self) -> bool:
        """True when it is itself a change since an earlier policy."""
        return self.estimator is not None and self.estimator.looks_back

    @property
    def pairs(self) -> bool:
        """True when a gate may ask for its change."""
        return self.estimator is not None and self.estimator.pairs

    def at(self, k: float) -> str:
        """Its name with this number.

        Example:
            >>> find_metric("cover@0.5").metric.at(0.25)
            'cover@0.25'
        """
        return self.name if self.parameter is None else f"{self.name[:-1]}{k:.12g}"

    def routine_numbers(self, num_samples: int) -> tuple[float, ...]:
        """The numbers in its name under which it is reported; (0,) without one."""
        if self.parameter is None:
            return (0.0,) if self.routine else ()
        return tuple(dict.fromkeys(self.usual(num_samples)))

    def missing(self, task: TaskMeasurement, k: float) -> str | None:
        """Why it cannot be told from a measurement; None when it can."""
        for column in self.columns:
            if task.find(column) is None:
                return column.absent
        if self.parameter is not None and self.parameter.whole and k > task.num_samples:
            return f"{task.num_samples} samples per prompt"
        return self.lacks(task)


class _Meaning(TypedDict):
    topic: Topic
    meaning: str
    unit: str
    better: Better
    source: str


class MetricFields(_Meaning, total=False):
    """What :func:`declare` and the decorators pass on to :class:`Metric`."""

    columns: tuple[RawColumn, ...]
    lacks: Callable[[TaskMeasurement], str | None]
    routine: bool
    usual: Callable[[int], Sequence[float]]
    unknown: tuple[float, float, float]
    phrase: str | Callable[[float], str]
    overview: tuple[str, str]
    in_changes: bool
    formerly: Mapping[str, str]


# --- the table -------------------------------------------------------------------------------

_METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Add a metric to the table.

    Raises:
        ConfigError: its name is taken.
    """
    if metric.name in _METRICS:
        raise ConfigError(f"metric {metric.name!r} is registered twice", expected="a new name")
    _METRICS[metric.name] = metric
    return metric


def declare(name: str, **about: Unpack[MetricFields]) -> Metric:
    """Register a name whose number is given by a probe with samples of its own."""
    return register(Metric(name=name, **about))


def metrics() -> tuple[Metric, ...]:
    """Every metric, by topic and then by name."""
    import_every_module()
    topics = list(Topic)
    return tuple(sorted(_METRICS.values(), key=lambda m: (topics.index(m.topic), m.name)))


@dataclass(frozen=True, slots=True)
class Asked:
    """A name as it was written: the metric, and the number in the name (0 without one)."""

    metric: Metric
    k: float


def find_metric(name: str) -> Asked:
    """The metric that a name with its number stands for.

    Raises:
        ConfigError: no such name, or its number is missing or out of range; names the nearest.

    Example:
        >>> find_metric("pass@64").metric.meaning
        'at least one of k tries succeeds'
        >>> find_metric("cover@0.5").metric.unit
        'share'
    """
    import_every_module()
    found = _ASKED.match(name)
    stem, mark, digits = found.groups() if found else (name, "", "")
    for metric in _METRICS.values():
        if metric.stem != stem:
            continue
        parameter = metric.parameter
        if parameter is None:
            if not mark:
                return Asked(metric, 0.0)
            raise ConfigError(f"no reading {name!r}", expected=f"{stem}, without a number")
        if mark and mark != metric.name[-2]:
            continue
        if mark and parameter.allows(digits):
            return Asked(metric, float(digits))
        raise ConfigError(f"no reading {name!r}", expected=f"{metric.name} with {parameter.words}")
    raise _unknown(name, f"{stem}{mark}k" if mark else name, digits)


def _unknown(name: str, pattern: str, digits: str) -> ConfigError:
    for metric in _METRICS.values():
        if (new := metric.formerly.get(pattern)) is not None:
            called = re.sub(r"(?<=[@^])k$", digits, new) if digits else new
            return ConfigError(f"no reading {name!r}", fix=f"its name is {called!r}")
    return ConfigError(f"no reading {name!r}", fix=nearest(pattern, [m.name for m in metrics()]))


def plain_words(text: str) -> str:
    """A sentence with what names of metrics mean, for people who do not know them.

    Example:
        >>> plain_words("efficiency_gap is 0.78 [0.61, 0.87], at least 0.15")
        'success within all tries minus pass@1 is 0.78 [0.61, 0.87], at least 0.15'
    """
    for metric in metrics():
        if not metric.phrase:
            continue
        stem = re.escape(metric.name if metric.parameter is None else metric.name[:-1])
        number = r"(\d+(?:\.\d+)?)" if metric.parameter else "()"
        phrase = metric.phrase

        def said(found: re.Match[str], phrase: str | Callable[[float], str] = phrase) -> str:
            return phrase if isinstance(phrase, str) else phrase(float(found.group(1)))

        text = re.sub(rf"(?<![\w@^]){stem}{number}(?![\w@^])", said, text)
    return text
