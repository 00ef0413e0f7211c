"""YAML and JSON that people write, read strictly.

YAML is read as version 1.2 says: ``no``, ``1:30`` and ``2024-01-01`` are text, ``1e-5`` is a
number, ``010`` is ten. What would be read differently from what is written is refused with its
line: a key that stands twice, a key that is no text, half of a surrogate pair, and tags. Nesting
and aliases are bounded, so that a short file cannot stand for a huge tree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from posttrain.core.errors import ConfigError, PosttrainError
from posttrain.core.guard import MEGABYTE, read_text, reading

__all__ = ["parse_json", "parse_yaml", "read_yaml", "write_yaml"]

MOST_BYTES = 8 * MEGABYTE
MOST_DEPTH = 64
MOST_NODES = 200_000
"""Values in a document, aliases counted as often as they are used."""
MOST_DIGITS = 400

_TAG = "tag:yaml.org,2002:"
_NUMBER_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, and merge keys."""

    # Its own tables: those of the base are YAML 1.1.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, with bounds on depth and on the size after aliases are followed."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        tagged = isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if tagged and event.tag not in (None, "!", f"{_TAG}str"):
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag} is not read", mark)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes.setdefault(id(node), self._size(node))
        if self._sizes[id(node)] > MOST_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"aliases that stand for more than {MOST_NODES:,} values", mark
            )
        return node

    def _size(self, node: Any) -> int:
        """Values below a node whose parts are complete; a part that is not holds itself."""
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        for part in inner:
            if id(part) not in self._sizes:
                mark = part.start_mark
                raise yaml.composer.ComposerError(None, None, "an alias inside itself", mark)
        return 1 + sum(self._sizes[id(part)] for part in inner)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """A value, complete at once: nothing here refers to itself."""
        return super().construct_object(node, deep=True)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are text and stand once."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                raise _fault(key, f"the key {name if name is not None else key.id} is no text")
            if name in seen:
                raise _fault(key, f"the key {name!r} stands twice")
            seen.add(name)
        return super().construct_mapping(node, deep=True)


def _fault(node: Any, words: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, words, node.start_mark)


def _text(loader: _Loader, node: Any) -> str:
    text = str(loader.construct_scalar(node))
    if not _is_unicode(text):
        raise _fault(node, "half of a surrogate pair, which is no character")
    return text


def _whole(loader: _Loader, node: Any) -> int:
    digits = str(loader.construct_scalar(node))
    if len(digits) > MOST_DIGITS:
        raise _fault(node, f"a number of {len(digits):,} digits")
    bare = digits.lstrip("+-")
    base = {"0x": 16, "0o": 8}.get(bare[:2], 10)
    with reading(f"line {node.start_mark.line + 1}", kind="a whole number", error=ConfigError):
        return int(digits, base)


def _real(loader: _Loader, node: Any) -> float:
    text = str(loader.construct_scalar(node)).lower()
    with reading(f"line {node.start_mark.line + 1}", kind="a number", error=ConfigError):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_KINDS: tuple[tuple[str, str, list[str], Callable[[_Loader, Any], object]], ...] = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda loader, node: None),
    (
        "bool",
        r"true|True|TRUE|false|False|FALSE",
        list("tTfF"),
        lambda loader, node: str(loader.construct_scalar(node)).lower() == "true",
    ),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _NUMBER_STARTS, _whole),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _NUMBER_STARTS,
        _real,
    ),
)


def _sequence(loader: _Loader, node: Any) -> list[Any]:
    return loader.construct_sequence(node)


def _mapping(loader: _Loader, node: Any) -> dict[Any, Any]:
    return loader.construct_mapping(node)


for _name, _pattern, _first, _build in _KINDS:
    _whole_text = re.compile(rf"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _whole_text, _first)
    _Loader.add_constructor(f"{_TAG}{_name}", _build)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"^(?:<<)$"), ["<"])
_Loader.add_constructor(f"{_TAG}str", _text)
_Loader.add_constructor(f"{_TAG}seq", _sequence)
_Loader.add_constructor(f"{_TAG}map", _mapping)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def parse_yaml(text: str, *, origin: str) -> object:
    """The plain value of a YAML document.

    Args:
        text: one document.
        origin: where it came from, for the message.

    Raises:
        ConfigError: it is not YAML, or would not be read as it is written; with line and column.

    Example:
        >>> parse_yaml("{answer: no, lr: 1e-5, steps: 010}", origin="r.yaml")
        {'answer': 'no', 'lr': 1e-05, 'steps': 10}
    """
    try:
        with reading(origin, kind="YAML", error=ConfigError):
            loader = _Loader(text)
            try:
                return loader.get_single_data()
            finally:
                loader.dispose()
    except ConfigError as error:
        if isinstance(error.__cause__, yaml.MarkedYAMLError):
            raise _placed(error.__cause__, origin) from None
        raise


def _placed(error: yaml.MarkedYAMLError, origin: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    context = f" {error.context}" if error.context else ""
    return ConfigError(f"{origin} is not YAML{where}: {error.problem}{context}")


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    text = read_text(path, kind="a YAML file", at_most=MOST_BYTES, error=ConfigError)
    content = parse_yaml(text, origin=str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}", expected="a mapping")
    return content


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""


for _name, _pattern, _first, _build in _KINDS:
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def write_yaml(value: object, *, flow: bool = False, width: int = 96) -> str:
    """Plain data as YAML that :func:`parse_yaml`, and readers of YAML 1.1, read as it was.

    Args:
        value: text, numbers, lists and mappings, in the order to write.
        flow: one line, with braces.
        width: characters of a line.

    Example:
        >>> write_yaml({"answer": "no", "steps": 10})
        "answer: 'no'\\nsteps: 10\\n"
    """
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=width,
    )


def parse_json(
    text: str | bytes,
    *,
    origin: str,
    row: int | None = None,
    error: type[PosttrainError] = ConfigError,
) -> object:
    """The plain value of a JSON text, read strictly.

    Args:
        text: one JSON value.
        origin: where it came from, for the message.
        row: of a JSONL file, counted from 1.
        error: the class to raise.

    Raises:
        PosttrainError: of the class ``error``: not JSON, a name that stands twice in an object,
            NaN or Infinity, half of a surrogate pair, a number too large, nesting too deep.

    Example:
        >>> parse_json('{"a": 1, "a": 2}', origin="rows.jsonl", row=7)
        Traceback (most recent call last):
        ...
        posttrain.core.errors.ConfigError: rows.jsonl, row 7: the name 'a' stands twice
          expected: JSON
    """
    with reading(origin, kind="JSON", row=row, error=error):
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        written = text if isinstance(text, str) else text.decode("utf-8-sig")
        if "\\ud" in written.lower() and not _is_unicode(json.dumps(value, ensure_ascii=False)):
            raise ValueError("half of a surrogate pair, which is no character")
        return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    built = dict(pairs)
    if len(built) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice")
    return built


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")
