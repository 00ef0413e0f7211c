"""Union types of all parts of a role, including those of installed packages.

``AnyTerm``, ``AnySignal`` and ``AnySource`` are the unions of all registered classes; ``AnyJudge``
of the signals that write rewards, ``AnySieve`` of those that filter. msgspec evaluates them when
it first converts a recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, Union

from posttrain.parts.registry import known

if TYPE_CHECKING:
    from posttrain.parts.base import Signal, Source, Term

    AnyTerm: TypeAlias = Term
    AnySignal: TypeAlias = Signal
    AnySource: TypeAlias = Source
    AnyJudge: TypeAlias = Signal
    AnySieve: TypeAlias = Signal

else:
    _UNIONS = {
        "AnyTerm": ("term", lambda kind: True),
        "AnySignal": ("signal", lambda kind: True),
        "AnySource": ("source", lambda kind: True),
        "AnyJudge": ("signal", lambda kind: kind.judges),
        "AnySieve": ("signal", lambda kind: kind.sieves),
    }

    def __getattr__(name: str) -> object:
        if name not in _UNIONS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        role, belongs = _UNIONS[name]
        return Union[tuple(kind for kind in known(role).values() if belongs(kind))]  # noqa: UP007
