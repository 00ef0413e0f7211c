"""The base of every configuration: frozen, typed, strict, hashable by content.

A configuration is plain data (msgspec structs). YAML and Python build the same tree, so they
have the same digest: a configuration that is built in Python passes through the same conversion as
one that is read, and cannot exist with an ill-typed or an out-of-range option. An unknown option is
an error that names the nearest known one.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import msgspec

from posttrain.core.errors import ConfigError
from posttrain.core.explaining import explained
from posttrain.core.guard import reading

T = TypeVar("T")


def _asks(cls: msgspec.StructMeta) -> bool:
    """True when some option has no default."""
    return len(cls.__struct_defaults__) < len(cls.__struct_fields__)


class ConfigMeta(msgspec.StructMeta):
    """Makes every configuration class frozen, keyword-only by default, and checked when built."""

    def __new__(
        mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any
    ) -> ConfigMeta:
        """A class with ``kw_only=True`` by default; ``frozen`` is inherited."""
        return super().__new__(mcls, name, bases, namespace, **{"kw_only": True, **options})

    if not TYPE_CHECKING:  # type checkers read the signature from the fields

        def __call__(cls, *positional: object, **options: object) -> Config:
            """A configuration whose options have their types and ranges.

            Raises:
                ConfigError: as :func:`convert`.
            """
            if positional:
                raise ConfigError(
                    f"{cls.__name__} with {len(positional)} options without a name",
                    expected=f"name=value, of {', '.join(cls.__struct_fields__) or 'none'}",
                )
            if not options and not _asks(cls):
                return super().__call__()
            names = dict(zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True))
            return convert(
                {names.get(k, k): v for k, v in options.items()}, cls, origin=cls.__name__
            )


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Config(msgspec.Struct, metaclass=ConfigMeta, frozen=True, forbid_unknown_fields=True):
    """Base class of all configuration. Subclass it with typed, documented fields.

    Example:
        >>> class Pen(Config):
        ...     colour: str
        ...     width: float = 0.5
        >>> Pen(colour="red")
        Pen(colour='red', width=0.5)
    """


def digest(value: object) -> str:
    """sha256 over the canonical JSON of a configuration or of plain data, as 64 hex digits.

    Example:
        >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
        True
    """
    if isinstance(value, Config):
        value = checked(value)
    canonical = msgspec.json.encode(msgspec.to_builtins(value), order="sorted")
    return hashlib.sha256(canonical).hexdigest()


def plain(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data, every default filled in."""
    built: dict[str, Any] = msgspec.to_builtins(config)
    return built


def brief(value: object) -> Any:
    """The configuration as plain data, without options that have their default value.

    It converts back to an equal configuration.

    Example:
        >>> class Pen(Config):
        ...     colour: str
        ...     width: float = 0.5
        >>> brief(Pen(colour="red", width=0.5)), brief(Pen(colour="red", width=2.0))
        ({'colour': 'red'}, {'colour': 'red', 'width': 2.0})
    """
    if isinstance(value, msgspec.Struct):
        shape = value.__struct_config__
        built: dict[str, Any] = {} if shape.tag is None else {str(shape.tag_field): shape.tag}
        for option in msgspec.structs.fields(value):
            usual = option.default
            if option.default_factory is not msgspec.NODEFAULT:
                usual = option.default_factory()
            if (found := getattr(value, option.name)) != usual:
                built[option.encode_name] = brief(found)
        return built
    if isinstance(value, Mapping):
        return {key: brief(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [brief(entry) for entry in value]
    return msgspec.to_builtins(value)


C = TypeVar("C", bound=Config)


def checked(config: C) -> C:
    """The same configuration with every type checked, as when it is read from a file.

    Python lets ``lr=1`` and ``lr="fast"`` pass where a float is declared. This turns the first
    into 1.0, so that it is the same recipe as its YAML, and refuses the second.

    Raises:
        ConfigError: an ill-typed option.
    """
    return convert(msgspec.to_builtins(config), type(config), origin=type(config).__name__)


def convert(value: object, to: type[T], *, origin: str) -> T:
    """Turn plain data into a configuration.

    Args:
        value: what YAML, JSON or a script gave.
        to: the configuration class.
        origin: where it came from (a file name), for the message.

    Raises:
        ConfigError: an unknown, missing or ill-typed option, or a number out of its range; the
            message has its path and the nearest valid name.
    """
    written = _plain_data(value, origin)
    try:
        with reading(origin, kind=f"what {to.__name__} describes", error=ConfigError):
            return msgspec.convert(written, to)
    except ConfigError as error:
        if isinstance(error.__cause__, msgspec.ValidationError):
            raise explained(str(error.__cause__), to, written, origin=origin) from None
        raise


_AS_THEY_ARE = (bytes, bytearray, memoryview, datetime.date, datetime.time, datetime.timedelta)
"""What msgspec would write as text, so that it would pass for text."""


def _plain_data(value: object, origin: str) -> object:
    """The value as text, numbers, lists and mappings, all of which JSON can hold.

    Raises:
        ConfigError: another object, NaN, infinity, or text that is no Unicode.
    """
    try:
        built: object = msgspec.to_builtins(value, builtin_types=_AS_THEY_ARE)
        msgspec.json.encode(built)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        words = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f"{origin}: {words}",
            expected="text, numbers, lists, mappings and configurations",
            fix="write a path as text: str(path)" if "Path" in words else None,
        ) from None
    for at, leaf in _leaves(built, ""):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ConfigError(f"{origin}: {at or 'it'} is {leaf}", expected="a finite number")
    return built


def _leaves(value: object, at: str) -> Iterator[tuple[str, object]]:
    """(path, value) of everything that holds nothing else."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            yield from _leaves(entry, f"{at}[{place}]")
    else:
        yield at, value


def differences(old: object, new: object, at: str = "") -> list[str]:
    """Readable list of what differs between two plain trees: ``path: old -> new``.

    Example:
        >>> differences({"lr": 1, "x": [1]}, {"lr": 2, "x": [1]})
        ['lr: 1 -> 2']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new}, key=str)
        missing = "(absent)"
        return [
            line
            for k in keys
            for line in differences(
                old.get(k, missing), new.get(k, missing), f"{at}.{k}" if at else str(k)
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{at}[{i}]")]
    return [] if old == new else [f"{at}: {old} -> {new}"]
