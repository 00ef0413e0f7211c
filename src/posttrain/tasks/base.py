"""The specification of a task set in a recipe, and how it is built.

tasks: {sums: {type: jsonl, path: ...}} ──build(name)──▶ TaskSet: train, held_out, score
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias, Union

from posttrain.core.bounds import Number
from posttrain.core.config import Config
from posttrain.core.task import TaskSet
from posttrain.parts.registry import known, snake_case


class TaskSetSpec(Config, tag=snake_case, tag_field="type"):
    """The specification of a task set. A score of ``success`` or more counts as solved."""

    role: ClassVar[str] = "task_set"
    declares: ClassVar[tuple[str, ...]] = ("identity", "build")

    success: Number = 1.0

    def identity(self, root: Path) -> dict[str, object]:
        """Its options as plain data, with the content of files in place of their paths.

        Raises:
            DataError: a file does not exist.
        """
        raise NotImplementedError

    def code(self, root: Path) -> Sequence[Path]:
        """Files of Python code that scoring runs, links resolved; none but the user's own.

        Raises:
            TaskError: a file is missing or is not Python.
        """
        return ()

    def located(self, root: Path) -> TaskSetSpec:
        """The same with absolute paths, for a recipe in another folder."""
        return self

    def build(self, name: str, *, root: Path, chat: bool) -> TaskSet:
        """The task set.

        Args:
            name: its name in the recipe; the prefix of every task key.
            root: the recipe's folder; paths are relative to it.
            chat: make each text prompt one user message. False keeps plain text, for models
                without a chat template.

        Raises:
            TaskError: the set cannot be built, or is too small for the split.
            DataError: a row of a file is malformed.
        """
        raise NotImplementedError


if TYPE_CHECKING:
    AnyTaskSet: TypeAlias = TaskSetSpec
else:

    def __getattr__(name: str) -> object:
        """``AnyTaskSet``: the union of all kinds, ours and those of installed packages."""
        if name != "AnyTaskSet":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return Union[tuple(known("task_set").values())]  # noqa: UP007
