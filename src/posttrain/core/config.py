"""The base of every configuration: frozen, typed, strict, hashable by content.

A configuration is plain data (msgspec structs). YAML and Python build the same tree, so they
have the same digest. An unknown option is an error that names the nearest known one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import msgspec
import yaml
from msgspec import inspect

from posttrain.core.errors import ConfigError, nearest

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Reads ``1e-5`` as a float, as JSON does. YAML 1.1 requires a dot and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class ConfigMeta(msgspec.StructMeta):
    """Makes every configuration class frozen and keyword-only by default."""

    def __new__(
        mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any
    ) -> ConfigMeta:
        """A class with ``kw_only=True`` by default; ``frozen`` is inherited."""
        return super().__new__(mcls, name, bases, namespace, **{"kw_only": True, **options})


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
        value: what YAML or JSON gave.
        to: the configuration class.
        origin: where it came from (a file name), for the message.

    Raises:
        ConfigError: an unknown, missing or ill-typed option; the message has its path and the
            nearest valid name.
    """
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error}", fix=_hint(str(error), to, value)) from None


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"no file {path}", fix="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}", expected="a mapping")
    return content


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


def _hint(message: str, to: object, value: object) -> str | None:
    """The nearest valid name, for msgspec's "unknown field" and "invalid tag" messages."""
    place = r"(?: - at `\$(.*)`)?"
    if unknown := re.search(rf"unknown field `(\w+)`{place}", message):
        path = unknown.group(2) or ""
        structs = _chosen(_structs(_type_at(to, path)), value, path)
        names = {f.encode_name for s in structs for f in s.fields}
        # Another member of the union may have an option of the same name.
        return nearest(unknown.group(1), names - {unknown.group(1)})
    if tag := re.search(rf"Invalid value '(.+?)'{place}", message):
        where = (tag.group(2) or "").rpartition(".")[0]
        options = {str(s.tag) for s in _structs(_type_at(to, where)) if s.tag is not None}
        return nearest(tag.group(1), options) if options else None
    return None


def _chosen(
    structs: Sequence[inspect.StructType], written: object, path: str
) -> Sequence[inspect.StructType]:
    """Of the members of a union, the one whose tag is written at the path; else all."""
    for field, item in re.findall(r"\.(\w+)|\[(\.\.\.|\d+)\]", path):
        if isinstance(written, Mapping) and field in written:
            written = written[field]
        elif isinstance(written, Sequence) and item.isdigit():
            written = written[int(item)]
        else:
            return structs
    if not isinstance(written, Mapping):
        return structs
    return [s for s in structs if s.tag == written.get(s.tag_field or "")] or structs


def _structs(node: inspect.Type) -> list[inspect.StructType]:
    """The structs a type may stand for (a union has several)."""
    if isinstance(node, inspect.StructType):
        return [node]
    if isinstance(node, inspect.UnionType):
        return [struct for member in node.types for struct in _structs(member)]
    return []


def _type_at(to: object, path: str) -> inspect.Type:
    """The type found along a msgspec path such as ``.stages[0].method`` or ``.tasks[...]``."""
    node = inspect.type_info(to)
    for field, item in re.findall(r"\.(\w+)|\[(\.\.\.|\d+)\]", path):
        if field:
            fields = {f.encode_name: f.type for s in _structs(node) for f in s.fields}
            node = fields.get(field, node)
        elif item and isinstance(node, inspect.VarTupleType | inspect.ListType):
            node = node.item_type
        elif isinstance(node, inspect.DictType):
            node = node.value_type
    return node
