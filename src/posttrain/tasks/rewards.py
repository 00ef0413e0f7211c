"""Reward functions: two built in, and the user's own from a Python file.

A reward function is called with whole columns, like those of TRL:

    def reward(prompts, completions, **columns) -> list[float]

``prompts`` are as in the file (text, or lists of ``{"role", "content"}``), ``completions`` are
text, and ``columns`` are the remaining columns of the file as lists, ``answer`` (as text)
included; a row without a value has None there. The function gets copies.

    name ──Script──▶ files and identity, nothing run ──first call──▶ loaded ──▶ scores, checked
"""

from __future__ import annotations

import copy
import inspect
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import NoReturn, Protocol, final

import numpy as np

from posttrain.core.contained import Failed
from posttrain.core.errors import TaskError, nearest
from posttrain.tasks.numerals import last_number
from posttrain.tasks.scripts import Script


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
    r"""1 where the last number of the completion equals the answer as a number; 0 elsewhere.

    The content of the last ``\boxed{}`` goes before. Percent signs, currencies and units change
    nothing. See :mod:`posttrain.tasks.numerals` for what is read as a number.

    Example:
        >>> number(["6*7="], ["6 times 7 makes 42.0 m²."], answer=["42"])
        [1.0]
    """
    right = [last_number(str(a)) for a in columns["answer"]]
    pairs = zip(completions, right, strict=True)
    return [float(a is not None and last_number(c) == a) for c, a in pairs]


_PROMISE = "a list with one finite number per completion"

BUILTINS: Mapping[str, RewardFunction] = {"exact": exact, "number": number}
"""Reward functions that a recipe can name. Both need an ``answer`` in every row."""


BUILTIN_IDENTITY: Mapping[str, str] = {"number": "number (2)"}
"""Names in a stage's identity, where a reward has come to mean something else."""


def find_reward(name: str, root: Path, *, seconds: float = 60.0) -> Reward:
    """A built-in reward, or ``file.py:function`` with the file relative to ``root``.

    Reads the file, and runs nothing.

    Args:
        name: as in a recipe.
        root: the recipe's folder.
        seconds: longest time per completion.

    Raises:
        TaskError: no such name, file or function, or the file is not Python.
    """
    if name in BUILTINS:
        return Reward(name=name, function="", script=None, seconds=seconds)
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
    script = Script(path, seconds=seconds)
    script.check(function)
    return Reward(name=name, function=function, script=script, seconds=seconds)


@final
@dataclass(eq=False)
class Reward:
    """A reward function with its name; the user's own is loaded when it is first asked."""

    name: str
    function: str
    script: Script | None  # None for one of ours
    seconds: float  # longest time per completion

    @property
    def identity(self) -> str:
        """The name, with the content of its files in place of their path."""
        if self.script is None:
            return BUILTIN_IDENTITY.get(self.name, self.name)
        return f"{self.script.identity}:{self.function}"

    @property
    def files(self) -> Sequence[Path]:
        """The files of the user's that it runs, links resolved."""
        return () if self.script is None else tuple(p.resolve() for p in self.script.sources)

    @property
    def changed(self) -> tuple[str, ...]:
        """What the user's code changed in this process; all of it was put back."""
        return () if self.script is None else tuple(self.script.contained.changed)

    def score(
        self,
        prompts: Sequence[object],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[object]],
    ) -> list[float]:
        """One finite number per completion.

        Raises:
            TaskError: it cannot be loaded, raised, took too long, or returned something else;
                names the line, the result or the row.
        """
        batch = _Batch(list(prompts), list(completions), columns)
        if self.script is None:
            own = {name: list(values) for name, values in columns.items()}
            return list(BUILTINS[self.name](batch.prompts, batch.completions, **own))
        try:
            return self._asked(batch, check=self._checked)
        except Failed as error:
            if not error.ended:
                self._blame_row(batch)
            raise TaskError(
                f"reward {self.name} {error.words}, on a batch of {len(completions)}"
                + ("" if error.ended else ", and on no row alone"),
                expected=_PROMISE,
                fix=f"make it faster, or raise reward_seconds (now {self.seconds:g} per completion)"
                if "took longer" in error.words
                else None,
            ) from error

    def _asked(
        self, batch: _Batch, *, check: Callable[[object, _Batch], list[float]]
    ) -> list[float]:
        if self.script is None:
            raise AssertionError("built-in rewards need no script")
        function = self._loaded
        size = len(batch.completions)
        # What it returned is code as well: numbers of types of its own, lists that count otherwise.
        return self.script.call(
            lambda: check(batch.given_to(function), batch),
            seconds=self.seconds * max(1, size),
        )

    @cached_property
    def _loaded(self) -> Callable[..., object]:
        if self.script is None:
            raise AssertionError("built-in rewards need no script")
        return self.script.load(self.function)

    def _checked(self, scores: object, batch: _Batch) -> list[float]:
        size = len(batch.completions)
        expected = f"a list of {size} finite numbers, one per completion"
        if inspect.iscoroutine(scores):
            scores.close()
            self._refuse("a coroutine", expected, fix="call asyncio.run inside of it")
        if not isinstance(scores, list | tuple | np.ndarray):
            fix = "return a list, e.g. with .tolist()" if "tolist" in dir(scores) else None
            self._refuse(f"{type(scores).__name__}: {shown(scores)}", expected, fix=fix)
        if len(scores) != size:
            self._refuse(f"{len(scores)} scores", expected)
        made: list[float] = []
        for row, score in enumerate(scores):
            value = _as_float(score)
            if value is None:
                self._refuse(
                    f"{shown(score)} for {batch.row(row)}, completion "
                    f"{shown(batch.completions[row])}",
                    expected,
                )
            made.append(value)
        if len(made) != size:
            self._refuse(f"a list that gives {len(made)} scores", expected)
        return made

    def _refuse(self, found: str, expected: str, *, fix: str | None = None) -> NoReturn:
        raise TaskError(f"reward {self.name} returned {found}", expected=expected, fix=fix)

    def _blame_row(self, batch: _Batch) -> None:
        """Ask for the rows one by one, and raise for the first that raises."""
        row = 0
        try:
            for row in range(len(batch.completions)):
                self._asked(batch.alone(row), check=lambda scores, alone: [])
        except Failed as error:
            raise TaskError(
                f"reward {self.name} {error.words}; on {batch.row(row)}, completion "
                f"{shown(batch.completions[row])}",
                expected=_PROMISE,
                fix="take **columns, and give a low score to what cannot be judged",
            ) from error


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a reward function is asked, as columns."""

    prompts: list[object]
    completions: list[str]
    columns: Mapping[str, Sequence[object]]

    def given_to(self, function: Callable[..., object]) -> object:
        """Call the function with copies: it may change what it gets."""
        columns = {name: list(map(_copied, values)) for name, values in self.columns.items()}
        return function(list(map(_copied, self.prompts)), list(self.completions), **columns)

    def alone(self, row: int) -> _Batch:
        """One row of it."""
        only = slice(row, row + 1)
        columns = {name: values[only] for name, values in self.columns.items()}
        return _Batch(self.prompts[only], self.completions[only], columns)

    def row(self, row: int) -> str:
        """A row in words."""
        return f"row {row + 1} of the batch, prompt {shown(self.prompts[row])}"


def _copied(value: object) -> object:
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def _as_float(score: object) -> float | None:
    """A finite score; None for anything else. Whole numbers may be too large for a float."""
    if not isinstance(score, Real | np.bool_):
        return None
    try:
        value = float(score)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def shown(value: object, limit: int = 80) -> str:
    """A short ``repr`` that cannot fail, whatever the value is.

    Example:
        >>> shown("a"), shown(10**400)
        ("'a'", 'a whole number of 1,329 bits')
    """
    if isinstance(value, int) and abs(value) >= 2**200:
        return f"a whole number of {value.bit_length():,} bits"
    words = reprlib.Repr()
    words.maxstring = words.maxother = limit
    try:
        text = words.repr(value)
    except ValueError:  # a list with an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
