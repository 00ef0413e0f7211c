"""Terms, signals and methods from installed packages, found through their entry points.

    [project.entry-points."posttrain.terms"]          object                 what it bundles
    focal = "posttrain_focal:TERM"                    TermExtension          spec, reads, values
    [project.entry-points."posttrain.signals"]
    median_advantage = "posttrain_focal:SIGNAL"       SignalExtension        spec, build
    [project.entry-points."posttrain.methods"]
    focal_sft = "posttrain_focal:FocalSft"            the method class       compose()

Packages are looked for when the first recipe is read, not when posttrain is imported: an
extension may therefore import posttrain freely, and costs nothing until it could matter.
``AnyTerm``, ``AnySignal`` and ``AnyMethod`` are the unions of what we ship and what is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.composition import Composition, SignalSpec, TermSpec
    from posttrain.core.protocols import Policy, Renderer, Signal
    from posttrain.core.task import TaskSet
    from posttrain.methods import Method

    AnyTerm: TypeAlias = TermSpec
    AnySignal: TypeAlias = SignalSpec
    AnyMethod: TypeAlias = Method


@dataclass(frozen=True, slots=True)
class TermExtension:
    """A term: its specification, and the code behind it.

    ``values(term, stats, batch)`` returns the loss per unit, [N] tokens or [P] pairs; or a
    :class:`~posttrain.objectives.values.Values`, to show numbers beside it. It finds the
    statistics it ``reads`` in ``stats`` by name, and the columns its specification ``needs`` in
    ``batch.columns``.
    """

    spec: type[Config]
    reads: frozenset[str]  # names of posttrain.numerics.head.Stat
    values: Callable[..., object]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SignalTools:
    """What a signal may use of the stage that it is built for."""

    tasksets: Mapping[str, TaskSet]
    renderer: Renderer
    policies: Mapping[str, Policy]  # frozen, by the references that the extension names


def no_references(spec: Any) -> Iterable[str]:
    """A signal that asks no policy."""
    return ()


@dataclass(frozen=True, slots=True)
class SignalExtension:
    """A signal: its specification, and what builds the object with ``score(groups)``.

    ``references(spec)`` names the policies that the signal asks. They are planned with the stage,
    count in its identity, and are handed to ``build`` in ``tools.policies``.
    """

    spec: type[Config]
    build: Callable[[Any, SignalTools], Signal]
    references: Callable[[Any], Iterable[str]] = no_references


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What the installed packages add, by name; ``packages`` says whose each class is."""

    terms: Mapping[str, TermExtension]
    signals: Mapping[str, SignalExtension]
    methods: Mapping[str, type[Config]]
    packages: Mapping[type[Config], str]


NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "terms": (
            *("limit", "weight_schedule"),  # both come with posttrain.composition.Term
            *("weight", "where", "aggregate", "unit", "needs", "accepts"),
        ),
        "signals": ("needs", "provides"),
        "methods": ("provenance", "interface", "tendency", "formula", "paper", "compose"),
    }
)
"""What a class of each group must declare, as a field or on the class."""


@functools.cache
def installed() -> Installed:
    """Load and check every extension, once.

    Raises:
        ConfigError: an extension cannot be imported or breaks a rule; names its package.
    """
    found = entry_points()
    loaded = {g: _group(g, found.select(group=f"posttrain.{g}")) for g in NEEDED}
    return Installed(
        terms={n: t for n, (t, _) in loaded["terms"].items() if isinstance(t, TermExtension)},
        signals={n: t for n, (t, _) in loaded["signals"].items() if isinstance(t, SignalExtension)},
        methods={n: _spec(t) for n, (t, _) in loaded["methods"].items()},
        packages={_spec(t): package for g in loaded.values() for t, package in g.values()},
    )


def package_of(spec: type[Config]) -> str | None:
    """``"<package> <version>"`` of an extension's class; None for what we ship."""
    return installed().packages.get(spec)


def used_by(composition: Composition) -> dict[str, str]:
    """The extensions of a composition, by name, with the version that decides what they compute."""
    parts: Sequence[Config] = (*composition.signals, *composition.terms)
    return {
        str(p.__struct_config__.tag): package
        for p in parts
        if (package := package_of(type(p))) is not None
    }


def references(signal: Config) -> Iterable[str]:
    """Policies that a signal of an extension asks; none for any other signal."""
    found = signal_extension(signal)
    return found.references(signal) if found else ()


def term_extension(spec: type[Config]) -> TermExtension | None:
    """The extension behind a term's specification; None for what we ship."""
    found = installed().terms.get(str(spec.__struct_config__.tag))
    return found if found is not None and found.spec is spec else None


def signal_extension(signal: Config) -> SignalExtension | None:
    """The extension behind a signal's specification; None for what we ship."""
    found = installed().signals.get(str(signal.__struct_config__.tag))
    return found if found is not None and isinstance(signal, found.spec) else None


Extension = TermExtension | SignalExtension | type[Config]


def _spec(extension: Extension) -> type[Config]:
    return extension if isinstance(extension, type) else extension.spec


def _group(group: str, points: Iterable[EntryPoint]) -> dict[str, tuple[Extension, str]]:
    """The extensions of one group by name, each with its package."""
    owners = {str(s.__struct_config__.tag): "posttrain" for s in _ours(group)}
    loaded: dict[str, tuple[Extension, str]] = {}
    for point in sorted(points, key=lambda p: (p.name, _package(p))):
        extension = _load(point, group)
        _check(_spec(extension), point, group)
        if (owner := owners.get(point.name)) is not None:
            raise _broken(point, f"takes a name that {owner} has", "a name of its own")
        owners[point.name] = _package(point)
        loaded[point.name] = (extension, owners[point.name])
    return loaded


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"


def _broken(point: EntryPoint, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"package {_package(point)}: entry point {point.name} = {point.value} of {point.group} "
        f"{found}",
        expected=expected,
        fix="mend the package, or uninstall it",
    )


def _load(point: EntryPoint, group: str) -> Extension:
    try:
        loaded = point.load()
    except Exception as error:  # an import may fail in any way, and the package must be named
        words = f"cannot be loaded: {type(error).__name__}: {error}"
        raise _broken(point, words, "a module that imports, with that name in it") from error
    if group == "terms" and isinstance(loaded, TermExtension):
        return loaded
    if group == "signals" and isinstance(loaded, SignalExtension):
        return loaded
    if group == "methods" and isinstance(loaded, type) and issubclass(loaded, Config):
        return loaded
    expected = {
        "terms": "a posttrain.extensions.TermExtension",
        "signals": "a posttrain.extensions.SignalExtension",
        "methods": "a method class, a subclass of posttrain.core.config.Config",
    }[group]
    raise _broken(point, f"is a {type(loaded).__name__}", expected)


def _check(spec: type[Config], point: EntryPoint, group: str) -> None:
    """Refuse a class that recipes could not name, or that the rest could not use."""
    if not issubclass(spec, Config):
        raise _broken(point, f"holds {spec.__name__}", "a subclass of posttrain.core.config.Config")
    config = spec.__struct_config__
    tag_field = "name" if group == "methods" else "type"
    if (config.tag, config.tag_field) != (point.name, tag_field):
        raise _broken(
            point,
            f"has tag {config.tag!r} under {config.tag_field!r}",
            f"class {spec.__name__}(..., tag={point.name!r}, tag_field={tag_field!r})",
        )
    if not config.frozen or not config.forbid_unknown_fields or not (spec.__doc__ or "").strip():
        raise _broken(
            point,
            f"holds {spec.__name__}, which is not frozen, allows unknown options, or has no "
            "docstring",
            "a frozen Config with a docstring that says what it computes",
        )
    declared = {name for base in spec.__mro__ for name in vars(base)}
    if missing := [n for n in NEEDED[group] if n not in declared]:
        raise _broken(
            point,
            f"holds {spec.__name__}, which lacks {', '.join(missing)}",
            f"{', '.join(NEEDED[group])}, as fields or on the class",
        )


def _ours(group: str) -> tuple[type[Config], ...]:
    """The classes that posttrain ships. Imported here: those modules import this one."""
    from posttrain.composition import SignalSpec, TermSpec
    from posttrain.methods import Method

    union = {"terms": TermSpec, "signals": SignalSpec, "methods": Method}[group]
    return get_args(union)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """The open unions. msgspec asks for them when it first converts a recipe."""
        group = {"AnyTerm": "terms", "AnySignal": "signals", "AnyMethod": "methods"}.get(name)
        if group is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        have = installed()
        theirs = {
            "terms": [t.spec for t in have.terms.values()],
            "signals": [s.spec for s in have.signals.values()],
            "methods": list(have.methods.values()),
        }[group]
        return Union[(*_ours(group), *theirs)]
