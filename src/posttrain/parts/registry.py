"""The registry of parts: lookup by role and name, never by class.

    @part                                       known("term") ──▶ {"exo": Exo, ...}
    class Exo(PairTerm): ...    ──registers──▶  unions.AnyTerm ──▶ what a recipe may name

Our own parts are in the modules below ``HOMES``; those of installed packages are in the modules
that packages name as entry points of the group ``posttrain.parts``. All are imported when the first
recipe is read, not earlier, so that a package may import posttrain.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, overload

import msgspec

from posttrain.core.config import Config, digest
from posttrain.core.errors import ConfigError, nearest

HOMES = ("posttrain.parts", "posttrain.tasks")
"""Our packages with parts."""

GROUP = "posttrain.parts"
"""Entry point group of installed packages with parts."""

OURS = "posttrain."

P = TypeVar("P", bound=Config)

_parts: dict[str, dict[str, type[Any]]] = {}  # by role, then by tag
_loaded: list[str] = []  # what load() has imported; parts registered later are refused


def snake_case(name: str) -> str:
    """The tag of a class of this name.

    Example:
        >>> snake_case("KLPenalty"), snake_case("FDpo"), snake_case("TeacherSortedL1")
        ('kl_penalty', 'f_dpo', 'teacher_sorted_l1')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def tag_of(part: Config | type[Config]) -> str:
    """The name by which recipes know a part."""
    return str(part.__struct_config__.tag)


class MakesMethods(Protocol):
    """A shape that makes a method of a single term."""

    @classmethod
    def of(cls, term: type[Any]) -> type[Any]: ...


@overload
def part(cls: type[P]) -> type[P]: ...
@overload
def part(*, method: type[MakesMethods]) -> Callable[[type[P]], type[P]]: ...
def part(
    cls: type[P] | None = None, *, method: type[MakesMethods] | None = None
) -> type[P] | Callable[[type[P]], type[P]]:
    """Register a class under a name for recipes.

    Args:
        cls: a frozen configuration with a docstring; its base class sets the role.
        method: for a term that is a whole method, the shape of that method. Recipes can then
            name it under both ``terms`` and ``method``.

    Raises:
        ConfigError: the name is taken, the class breaks a rule, or it registers too late.
    """

    def register(made: type[P]) -> type[P]:
        if method is None:
            _register(made)
            return made
        if getattr(made, "role", "") != "term" or not getattr(made, "formula", ""):
            raise ConfigError(
                f"{made.__name__} cannot be a method by itself",
                expected="a term with a formula",
                fix="write a Method that composes it, or @part alone",
            )
        _register(made)
        _register(method.of(made))
        return made

    return register if cls is None else register(cls)


def _register(cls: type[Config]) -> None:
    role, tag = _check(cls), tag_of(cls)
    taken = _parts.setdefault(role, {}).get(tag)
    if taken is not None and (taken.__module__, taken.__name__) != (cls.__module__, cls.__name__):
        # A script may import a package before ours is loaded; the name is ours all the same.
        later, first = (taken, cls) if cls.__module__.startswith(OURS) else (cls, taken)
        raise ConfigError(
            f"{role} {tag} of {later.__module__} takes a name that {first.__module__} has",
            expected="a name of its own: the tag is the class's name in snake case",
        )
    if _loaded and taken is None:
        raise ConfigError(
            f"{role} {tag} of {cls.__module__} is registered after the first recipe was read",
            expected="parts that are imported before",
            fix="import the module first, or name it as an entry point of posttrain.parts",
        )
    _parts[role][tag] = cls


def _check(cls: type[Config]) -> str:
    """The role of a class; refuses one that recipes could not name or stages could not use."""
    bases = list(cls.__mro__)
    first = next((i for i, base in enumerate(bases) if "role" in vars(base)), None)
    if first is None:
        raise ConfigError(
            f"{cls.__name__} has no role",
            expected="a subclass of Term, Signal, Source, Method or TaskSetSpec",
        )
    base: Any = bases[first]
    role, config = str(base.role), cls.__struct_config__
    if not config.frozen or not config.forbid_unknown_fields or not (cls.__doc__ or "").strip():
        raise ConfigError(
            f"{role} {cls.__name__} is not frozen, allows unknown options, or has no docstring",
            expected="a frozen Config with a docstring that says what it computes",
        )
    if config.tag_field != base.__struct_config__.tag_field or not isinstance(config.tag, str):
        raise ConfigError(
            f"{role} {cls.__name__} has tag {config.tag!r} under {config.tag_field!r}",
            expected=f"a text under {base.__struct_config__.tag_field!r}, as its base has",
        )
    _check_values(role, cls, base)
    own = {name for between in bases[:first] for name in vars(between)}
    if missing := [name for name in base.declares if name not in own]:
        raise ConfigError(
            f"{role} {cls.__name__} lacks {', '.join(missing)}",
            expected=f"{', '.join(base.declares)}, as options or on the class",
        )
    return role


def _check_values(role: str, cls: type[Any], base: Any) -> None:
    """Refuse class variables with values that nothing knows: a column, a statistic, a unit.

    What a property returns depends on options, and is not looked at here.
    """
    for name, allowed in getattr(base, "vocabulary", {}).items():
        value = inspect.getattr_static(cls, name, None)
        if isinstance(value, str) and name != "unit":
            raise ConfigError(
                f"{role} {cls.__name__}: {name} is the text {value!r}",
                expected="a frozenset",
                fix=f"write frozenset({{{value!r}}})",
            )
        given = {value} if isinstance(value, str) else value
        if not isinstance(given, frozenset | set):
            continue
        if wrong := {str(v) for v in given if isinstance(v, str) and v not in allowed}:
            raise ConfigError(
                f"{role} {cls.__name__}: {name} has {', '.join(sorted(map(repr, wrong)))}",
                expected="names that exist",
                fix=nearest(min(wrong), map(str, allowed)),
            )


def known(role: str) -> Mapping[str, type[Any]]:
    """Every part of a role by its tag: ours, then those of installed packages, module by module.

    The order does not depend on what was imported first.

    Example:
        >>> "verify" in known("signal"), "dataset" in known("source")
        (True, True)
    """
    load()
    # Sorting is stable: within a module, parts stay in the order of their definition.
    named = sorted(_parts.get(role, {}).items(), key=lambda item: _place(item[1]))
    return MappingProxyType(dict(named))


def _place(cls: type[Config]) -> tuple[bool, str]:
    return not cls.__module__.startswith(OURS), cls.__module__


def find(role: str, tag: str) -> type[Any]:
    """The part of that name.

    Raises:
        ConfigError: no such part; names the nearest.
    """
    found = known(role)
    if tag not in found:
        raise ConfigError(f"no {role} {tag!r}", fix=nearest(str(tag), found))
    return found[tag]


@functools.cache
def load() -> None:
    """Import every module with parts, once.

    Raises:
        ConfigError: an installed package cannot be imported or breaks a rule; names it.
    """
    for name in HOMES:
        for module in pkgutil.walk_packages(import_module(name).__path__, f"{name}."):
            import_module(module.name)
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, _package(p))):
        _load(point)
    for cls in (c for by_tag in _parts.values() for c in by_tag.values()):
        if not cls.__module__.startswith(OURS):
            _check_options(cls)  # those of scripts too
    _loaded.append(GROUP)


def _load(point: EntryPoint) -> None:
    """Import a package's module with parts; every error names the package."""
    root = point.module.partition(".")[0]
    try:
        point.load()
        mine = [c for by_tag in _parts.values() for c in by_tag.values() if _root(c) == root]
        for cls in mine:
            _check_options(cls)
    except ConfigError as error:
        raise _broken(point, error.found, error.expected) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an import may fail or exit, and the package must be named
        found = f"cannot be loaded: {type(error).__name__}: {error}"
        raise _broken(point, found, "a module that imports, and registers its parts") from error
    if not mine:
        raise _broken(point, "registers no part", "classes under @part")


def _check_options(cls: type[Config]) -> None:
    """Refuse a part whose options have types that a recipe cannot have."""
    try:
        msgspec.inspect.type_info(cls)
    except (Exception, SystemExit) as error:  # an annotation is code: it may fail in any way
        raise ConfigError(
            f"the options of {cls.__name__} in {cls.__module__}: {type(error).__name__}: {error}",
            expected="types that a recipe can have",
            fix="correct the annotation, and import its names where the class is",
        ) from error


def _root(cls: type[Config]) -> str:
    return cls.__module__.partition(".")[0]


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"


def _broken(point: EntryPoint, found: str, expected: str | None) -> ConfigError:
    return ConfigError(
        f"package {_package(point)}: entry point {point.name} = {point.value} of {GROUP}: {found}",
        expected=expected,
        fix="mend the package, or uninstall it",
    )


def package_of(cls: type[Config]) -> str | None:
    """Identity of the code of an external part; None for our own.

    ``"<package> <version>"`` of an installed package. A class from anywhere else, such as a
    script, is identified by the hash of its file.
    """
    if cls.__module__.startswith(OURS):
        return None
    for point in entry_points(group=GROUP):
        if point.module.partition(".")[0] == _root(cls):
            return _package(point)
    try:
        source = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # defined in an interpreter: no source file
        source = repr(cls.__dict__.keys())
    return f"{cls.__module__} {digest(source)[:16]}"


def code_of(parts: Iterable[Config]) -> dict[str, str]:
    """Identity of the code of the external parts among these, by tag."""
    return {tag_of(p): name for p in parts if (name := package_of(type(p))) is not None}
