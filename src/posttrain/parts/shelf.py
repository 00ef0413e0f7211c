"""What was made from content, kept for the next who asks with the same content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, final

from posttrain.protocols import Renderer

_T = TypeVar("_T")


@final
class Shelf:
    """Keeps the last ``size`` values by key. A key says all that a value is made of.

    Example:
        >>> shelf = Shelf()
        >>> shelf.get("a", lambda: [1]) is shelf.get("a", lambda: [2])
        True
    """

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """The value of a key, made when it is not here."""
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        value: _T = self._values[key]
        return value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """Who reads a data file: the tokens and the length that a model takes."""

    root: Path  # the recipe's folder
    renderer: Renderer
    context: int  # tokens
    shelf: Shelf = field(default_factory=Shelf)  # files that were rendered already
