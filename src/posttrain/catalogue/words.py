"""Options and values in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import structs

from posttrain.core.bounds import range_words
from posttrain.core.config import Config
from posttrain.core.documents import write_yaml
from posttrain.parts.base import Part


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method or of a part, in words."""

    name: str
    kind: str
    default: str  # "required" when there is none


def options(kind: type[Config]) -> tuple[Option, ...]:
    """Every option with its type and default, in words."""
    written = written_types(kind)
    return tuple(
        Option(f.name, _type_words(f.type, written[f.name]), _default_words(f))
        for f in structs.fields(kind)
    )


def written_types(kind: type) -> Mapping[str, str]:
    """Every field's type as the code spells it, which still tells a policy from other text."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        annotations: Mapping[str, object] = vars(base).get("__annotations__", {})
        found |= {name: str(words) for name, words in annotations.items()}
    return found


def _default_words(option: structs.FieldInfo) -> str:
    if option.required:
        return "required"
    default = default_of(option)
    if isinstance(default, Config):
        changed = {f.name: getattr(default, f.name) for f in structs.fields(type(default))}
        usual = {f.name: default_of(f) for f in structs.fields(type(default))}
        return flow({k: v for k, v in changed.items() if v != usual[k]})
    return flow(msgspec.to_builtins(default))


def default_of(option: structs.FieldInfo) -> Any:
    made = option.default_factory is not msgspec.NODEFAULT
    return option.default_factory() if made else option.default


def _type_words(kind: Any, written: str = "") -> str:
    """A type as a person would say it.

    Example:
        >>> _type_words(tuple[str, ...]), _type_words(int | None)
        ('list of text', 'whole number | null')
    """
    if "PolicyRef" in written and kind is not str:
        return 'policy by task set, "*" for the others'
    if "PolicyRef" in written:
        return "policy"
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words = range_words(inner[1]) if isinstance(inner[1], msgspec.Meta) else ""
        return f"{_type_words(inner[0])}{', ' if words else ''}{words}"
    if origin is Literal:
        return " | ".join(str(v) for v in inner)
    if origin is tuple:
        if inner[-1] is ...:
            return f"list of {_type_words(inner[0])}"
        return f"list of {len(inner)}: {', '.join(_type_words(t) for t in inner)}"
    if origin is dict:
        return f"{_type_words(inner[1])} by {_type_words(inner[0])}"
    if inner:
        return " | ".join(_type_words(t) for t in inner)
    if issubclass(kind, Part) and kind.in_words:
        return str(kind.in_words)
    if issubclass(kind, Enum):
        return " | ".join(str(member.value) for member in kind)
    tag = kind.__struct_config__.tag
    if tag:
        return str(tag)
    return f"{kind.__name__} {{{', '.join(kind.__struct_fields__)}}}"


_SIMPLE: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true | false",
    type(None): "null",
}


def flow(value: object) -> str:
    """YAML on one line."""
    text = write_yaml(value, flow=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").replace("'*'", '"*"')
