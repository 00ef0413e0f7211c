"""Reward functions: two built in, and the user's own from a Python file.

A reward function is called with whole columns, like those of TRL:

    def reward(prompts, completions, **columns) -> list[float]

``prompts`` are as in the file (text, or lists of ``{"role", "content"}``), ``completions`` are
text, and ``columns`` are the remaining columns of the file as lists, ``answer`` (as text)
included; a row without a value has None there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from posttrain.core.errors import TaskError, nearest

# A sign belongs to the number unless it is a minus between two operands.
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?|(?:(?<![\w)])[-+])?\.[0-9]+"
)


class RewardFunction(Protocol):
    """One score per completion."""

    def __call__(
        self, prompts: list[object], completions: list[str], **columns: list[object]
    ) -> Sequence[float]: ...


def exact(prompts: list[object], completions: list[str], **columns: list[object]) -> list[float]:
    """1 where the stripped completion equals the stripped answer; 0 elsewhere.

    Example:
        >>> exact(["1+1="], [" 2\\n"], answer=["2"])
        [1.0]
    """
    pairs = zip(completions, columns["answer"], strict=True)
    return [float(c.strip() == str(a).strip()) for c, a in pairs]


def number(prompts: list[object], completions: list[str], **columns: list[object]) -> list[float]:
    """1 where the last number of the completion equals the answer as a number; 0 elsewhere.

    Example:
        >>> number(["6*7="], ["6 times 7 makes 42.0."], answer=["42"])
        [1.0]
    """
    pairs = zip(completions, columns["answer"], strict=True)
    return [float(last_number(c) == last_number(str(a))) for c, a in pairs]


def last_number(text: str) -> Decimal | None:
    """The last number written in a text, exactly; None when there is none.

    Example:
        >>> last_number("from 1,000 to -2.50"), last_number("7-3"), last_number("none")
        (Decimal('-2.50'), Decimal('3'), None)
    """
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def is_number(text: str) -> bool:
    """True when the text is one number and nothing else.

    Example:
        >>> is_number(" -1,200.5 "), is_number("4 apples")
        (True, False)
    """
    return _NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-")) is not None


_PROMISE = "a list with one finite number per completion"

BUILTINS: Mapping[str, RewardFunction] = {"exact": exact, "number": number}
"""Reward functions that a recipe can name. Both need an ``answer`` in every row."""


def load_reward(name: str, root: Path) -> RewardFunction:
    """A built-in reward, or ``file.py:function`` with the file relative to ``root``.

    Loading runs the file.

    Raises:
        TaskError: no such name, file or function, or the file raised.
    """
    if name in BUILTINS:
        return BUILTINS[name]
    file, colon, function = name.rpartition(":")
    if not colon or not file or not function:
        raise TaskError(
            f"no reward named {name!r}",
            expected=f"{', '.join(BUILTINS)}, or file.py:function",
            fix=nearest(name, BUILTINS),
        )
    path = root / file
    if not path.is_file():
        raise TaskError(
            f"no reward file {path}", fix="check the path; it is relative to the recipe"
        )
    functions = {k: v for k, v in vars(_load(path)).items() if callable(v)}
    if function not in functions:
        raise TaskError(
            f"{path} has no function {function!r}",
            fix=nearest(function, (k for k in functions if not k.startswith("_"))),
        )
    loaded: RewardFunction = functions[function]
    return loaded


def _load(path: Path) -> ModuleType:
    content = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()
    name = f"posttrain_reward_{content[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file", expected="file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the file need it here
    try:
        # Not through the loader: its .pyc could become stale, and would be left in the folder.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise TaskError(
            f"reward file {path} raised while loading: {type(error).__name__}: {error}"
        ) from error
    return module


def call_reward(
    reward: RewardFunction,
    *,
    name: str,
    prompts: list[object],
    completions: list[str],
    columns: Mapping[str, list[object]],
) -> list[float]:
    """Call a reward function and check its result: one finite number per completion.

    Raises:
        TaskError: it raised, or returned the wrong number or kind of scores; names the
            function, its result and the row.
    """
    try:
        scores: object = reward(prompts, completions, **columns)
    except Exception as error:
        _blame_row(reward, name=name, prompts=prompts, completions=completions, columns=columns)
        raise TaskError(
            f"reward {name} raised {type(error).__name__} on the batch as a whole, "
            f"and on no row alone: {error}",
            expected=_PROMISE,
        ) from error
    expected = f"a list of {len(completions)} finite numbers, one per completion"
    if not isinstance(scores, list | tuple | np.ndarray):
        raise TaskError(
            f"reward {name} returned {type(scores).__name__}: {_short(scores)}", expected=expected
        )
    if len(scores) != len(completions):
        raise TaskError(f"reward {name} returned {len(scores)} scores", expected=expected)
    for row, score in enumerate(scores):
        if not isinstance(score, Real | np.bool_) or not math.isfinite(score):
            raise TaskError(
                f"reward {name} returned {_short(score)} for {_row(row, prompts)}, "
                f"completion {_short(completions[row])}",
                expected=expected,
            )
    return [float(score) for score in scores]


def _blame_row(
    reward: RewardFunction,
    *,
    name: str,
    prompts: list[object],
    completions: list[str],
    columns: Mapping[str, list[object]],
) -> None:
    """Score the rows one by one, and raise for the first that cannot be scored."""
    row = 0
    try:
        for row in range(len(completions)):
            alone = {column: values[row : row + 1] for column, values in columns.items()}
            reward(prompts[row : row + 1], completions[row : row + 1], **alone)
    except Exception as error:
        raise TaskError(
            f"reward {name} raised {type(error).__name__}: {error}; on {_row(row, prompts)}, "
            f"completion {_short(completions[row])}",
            expected=_PROMISE,
            fix="take **columns, and give a low score to what cannot be judged",
        ) from error


def _row(row: int, prompts: list[object]) -> str:
    return f"row {row + 1} of the batch, prompt {_short(prompts[row])}"


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
