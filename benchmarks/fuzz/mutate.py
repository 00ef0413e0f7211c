"""Changes to plain trees and to bytes: wrong types, extremes, deletions, doublings, depth."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence

VALUES: Sequence[object] = (
    *(None, True, False, 0, -1, 1, 2, 10**9, 10**30, -(2**63), 2**70, 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan),
    *("", " ", "x", "0", "nan", "1e5", "no", "null", "..", "../..", "/dev/zero", "/dev/stdin", "/"),
    *(
        "a\x00b",
        "\u202e",
        "é" * 40,
        "\U0001f600",
        "x" * 20_000,
        "{question}",
        "{",
        "{{",
        "%s",
        "${HOME}",
    ),
    *("base", "learner", "input", "moving", "previous", "end", "path:base", "path:", "*", "a/b"),
    *([], {}, [[]], {"": 0}, [None], {"x": {"x": {"x": {}}}}, ["a", "a"], [1, 2, 3]),
)
NUMBERS: Sequence[object] = (0, 1, -1, 2, 3, 0.5, 1.5, 1e-9, 1e9, 10**18, 1e308, math.inf, math.nan)


def places(tree: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Paths to everything inside."""
    found: list[tuple[object, ...]] = [at] if at else []
    inside: Sequence[tuple[object, object]] = ()
    if isinstance(tree, Mapping):
        inside = list(tree.items())
    elif isinstance(tree, list):
        inside = list(enumerate(tree))
    return found + [p for key, value in inside for p in places(value, (*at, key))]


def mutated(tree: object, rng: random.Random, *, times: int) -> tuple[object, str]:
    """A changed copy, and what was changed."""
    made, words = copy.deepcopy(tree), []
    for _ in range(times):
        every = places(made)
        if not every:
            break
        *way, last = rng.choice(every)
        parent = made
        for key in way:
            parent = parent[key]  # type: ignore[index]
        words.append(_change(parent, last, made, rng))
    return made, "; ".join(words)


def _change(parent: object, key: object, whole: object, rng: random.Random) -> str:
    kind = rng.choice(
        ("value", "value", "number", "scale", "scale", "delete", "rename", "double", "move")
    )
    found = parent[key]  # type: ignore[index]
    if kind == "number" and isinstance(found, int | float):
        parent[key] = value = rng.choice(NUMBERS)  # type: ignore[index]
    elif kind == "scale" and isinstance(found, int | float) and not isinstance(found, bool):
        parent[key] = value = rng.choice((found + 1, found * 2, found / 2, found - 1))  # type: ignore[index]
    elif kind == "delete":
        del parent[key]  # type: ignore[attr-defined]
        value = "gone"
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}{rng.choice(('s', '', ' ', '_x'))}"] = parent.pop(key)
        value = "renamed"
    elif kind == "double" and isinstance(parent, list):
        parent.append(copy.deepcopy(found))
        value = "doubled"
    elif kind == "move":
        source: object = whole
        for step in rng.choice(places(whole)):
            source = source[step]  # type: ignore[index]
        parent[key] = copy.deepcopy(source)  # type: ignore[index]
        value = "a copy from elsewhere"
    else:
        parent[key] = value = copy.deepcopy(rng.choice(VALUES))  # type: ignore[index]
    return f"{key}: {value!r:.60}" if not _huge(value) else f"{key}: a huge number"


def _huge(value: object) -> bool:
    return isinstance(value, int) and abs(value) > 10**100


def damaged(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A changed copy of a file's bytes, and what was changed."""
    kind = rng.choice(("cut", "flip", "insert", "repeat", "empty", "noise", "zeros", "crlf"))
    at = rng.randrange(len(content) + 1)
    noise = rng.randbytes(rng.choice((1, 8, 100)))
    made = {
        "cut": content[:at],
        "flip": content[:at] + noise[:1] + content[at + 1 :],
        "insert": content[:at] + noise + content[at:],
        "repeat": content + content[at:],
        "empty": b"",
        "noise": noise,
        "zeros": content[:at] + bytes(100) + content[at:],
        "crlf": content.replace(b"\n", b"\r\n"),
    }[kind]
    return made, f"{kind} at byte {at}"
