"""What is wrong with a configuration: found, expected, and the nearest name, for a message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from msgspec import Meta, inspect

from posttrain.core.bounds import range_words
from posttrain.core.errors import ConfigError, nearest

_PLACE = re.compile(r" - at `(?:key in )?\$(?P<path>.*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\.\.\.|\d+)\]")
_MISSING = object()


def explained(message: str, to: object, written: object, *, origin: str) -> ConfigError:
    """The error for a message of msgspec.

    Args:
        message: such as ``Expected `int`, got `str` - at `$.stages[0].max_age```.
        to: the class that was asked for.
        written: the plain data that did not fit.
        origin: where it came from.
    """
    place = _PLACE.search(message)
    path = place["path"] if place else ""
    fix = _unknown(message, to, written, path) or _choice(message, to, path)
    found = _value_at(written, path)
    kind = _type_at(to, path)
    if (numbers := _numbers(kind)) and _is_number(found):
        words = " or ".join(_number_words(number, found) for number in numbers)
        words += ", or null" if _may_be_null(kind) else ""
        at = path.lstrip(".") or "it"
        return ConfigError(f"{origin}: {at} is {_short(found)}", expected=words, fix=fix)
    return ConfigError(f"{origin}: {message}", fix=fix)


def _short(value: object) -> str:
    """A number, which may have thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number above 10^30" if value > 0 else "a number below -10^30"
    return repr(value)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(kind: inspect.Type) -> list[inspect.IntType | inspect.FloatType]:
    """The bounded numbers that a type may stand for."""
    members = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return [m for m in members if isinstance(m, inspect.IntType | inspect.FloatType)]


def _may_be_null(kind: inspect.Type) -> bool:
    members = kind.types if isinstance(kind, inspect.UnionType) else ()
    return any(isinstance(m, inspect.NoneType) for m in members)


def _number_words(kind: inspect.IntType | inspect.FloatType, found: float) -> str:
    what = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
    bounds: dict[str, Any] = {"ge": kind.ge, "gt": kind.gt, "le": kind.le, "lt": kind.lt}
    words = range_words(Meta(**bounds), found=found)
    return f"{what}{', ' if words else ''}{words}"


def _unknown(message: str, to: object, written: object, path: str) -> str | None:
    """The nearest option for one that does not exist."""
    unknown = re.search(r"unknown field `(.*)`", message.split(" - at `")[0])
    if unknown is None:
        return None
    structs = _chosen(_structs(_type_at(to, path)), written, path)
    names = {f.encode_name for s in structs for f in s.fields}
    # Another member of the union may have an option of the same name.
    return nearest(unknown[1], names - {unknown[1]})


def _choice(message: str, to: object, path: str) -> str | None:
    """The nearest value of a list of names; all of them where the name was left out."""
    named = re.match(r"Invalid (?:enum )?value (.+?)(?: - at|$)", message)
    if named is not None:
        options = _names(_type_at(to, path)) or _tags(_type_at(to, path.rpartition(".")[0]))
        return nearest(named[1].strip("'\""), options) if options else None
    structs = _structs(_type_at(to, path))
    missing = re.match(r"Object missing required field `(\w+)`", message)
    if missing is not None and any(s.tag_field == missing[1] for s in structs):
        return f"add `{missing[1]}`: {', '.join(sorted(_tags(_type_at(to, path))))}"
    if message.startswith("Expected `object") and (fields := {s.tag_field for s in structs}):
        tagged = sorted(field for field in fields if field is not None)
        return f"write {{{tagged[0]}: ..., and its options}}" if tagged else None
    return None


def _tags(node: inspect.Type) -> set[str]:
    return {str(s.tag) for s in _structs(node) if s.tag is not None}


def _names(node: inspect.Type) -> set[str]:
    """The values of an enumeration."""
    if isinstance(node, inspect.LiteralType):
        return {str(value) for value in node.values}
    if isinstance(node, inspect.EnumType):
        return {str(member.value) for member in node.cls}
    members: Iterable[inspect.Type] = node.types if isinstance(node, inspect.UnionType) else ()
    return {name for member in members for name in _names(member)}


def _steps(path: str) -> list[tuple[str, str]]:
    """(field, item) of every step of a path: one of them is empty."""
    return _STEP.findall(path)


def _value_at(written: object, path: str) -> object:
    """What stands at a path; a mark of its own when msgspec does not say which entry it was."""
    for field, item in _steps(path):
        if field and isinstance(written, Mapping) and field in written:
            written = written[field]
        elif isinstance(written, list | tuple) and item.isdigit() and int(item) < len(written):
            written = written[int(item)]
        else:
            return _MISSING
    return written


def _chosen(
    structs: Sequence[inspect.StructType], written: object, path: str
) -> Sequence[inspect.StructType]:
    """Of the members of a union, the one whose tag is written at the path; else all."""
    found = _value_at(written, path)
    if not isinstance(found, Mapping):
        return structs
    return [s for s in structs if s.tag == found.get(s.tag_field or "")] or structs


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
    for field, item in _steps(path):
        members = node.types if isinstance(node, inspect.UnionType) else (node,)
        lists = [
            m
            for m in members
            if isinstance(m, inspect.VarTupleType | inspect.ListType | inspect.TupleType)
        ]
        tables = [m for m in members if isinstance(m, inspect.DictType)]
        if field:
            fields = {f.encode_name: f.type for s in _structs(node) for f in s.fields}
            node = fields.get(field, node)
        elif item and lists:
            node = _item(lists[0], item)
        elif tables:
            node = tables[0].value_type
    return node


def _item(
    sequence: inspect.VarTupleType | inspect.ListType | inspect.TupleType, item: str
) -> inspect.Type:
    if isinstance(sequence, inspect.TupleType):
        return sequence.item_types[int(item) if item.isdigit() else 0]
    return sequence.item_type
