"""Task sets from a JSONL file of prompts and answers, scored by a reward function.

rows ──distinct prompts──▶ tasks ──▶ train: all but the last, held_out: the last N
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import final

from msgspec.structs import replace

from posttrain.chat.messages import messages_from
from posttrain.core.bounds import Whole
from posttrain.core.config import digest, plain
from posttrain.core.errors import DataError, TaskError
from posttrain.core.files import content_of
from posttrain.core.provenance import Role
from posttrain.core.rows import read_jsonl
from posttrain.core.task import Message, Task
from posttrain.parts.registry import part
from posttrain.tasks.base import TaskSetSpec
from posttrain.tasks.rewards import BUILTINS, call_reward, is_number, last_number, load_reward

_RESERVED = frozenset({"prompts", "completions"})


@part
class JsonlTasks(TaskSetSpec, tag="jsonl"):
    """Rows of prompt (text or messages) and answer, scored by a reward function.

    ``reward`` is a built-in name (``exact``, ``number``) or ``file.py:function``, a function
    ``(prompts, completions, **columns) -> list[float]``. The last ``held_out`` rows, after
    removing duplicates, are held out for measuring.
    """

    path: str
    reward: str = "exact"
    held_out: Whole = 32

    def identity(self, root: Path) -> dict[str, object]:
        """Its options, with the content of the file and of the reward's file."""
        resolved = {**plain(self), "path": content_of(self.path, root)}
        file, _, function = self.reward.rpartition(":")
        if file:
            resolved["reward"] = f"{content_of(file, root)}:{function}"
        return resolved

    def located(self, root: Path) -> JsonlTasks:
        """The same with absolute paths."""
        file, colon, function = self.reward.rpartition(":")
        reward = f"{(root / file).resolve()}:{function}" if colon else self.reward
        return replace(self, path=str((root / self.path).resolve()), reward=reward)

    def build(self, name: str, *, root: Path, chat: bool) -> JsonlTaskSet:
        """The rows of the file, split."""
        return JsonlTaskSet(name, self, root=root, chat=chat)


@final
class JsonlTaskSet:
    """Rows ``{"prompt": text or messages, "answer": text, …}`` with a reward function.

    A prompt that occurs twice counts once, the first time, so no held-out prompt is in
    ``train``. Other columns are passed to the reward function.

    Raises:
        DataError: the file or a row is malformed; names the file and the row.
        TaskError: too few rows for the split, or the reward function cannot be loaded.
    """

    def __init__(self, name: str, spec: JsonlTasks, *, root: Path, chat: bool) -> None:
        self._name, self._spec, self._chat = name, spec, chat
        self._path = root / spec.path
        self._reward = load_reward(spec.reward, root)
        self._reward_file = (
            None if spec.reward in BUILTINS else root / spec.reward.rpartition(":")[0]
        )
        self._columns: tuple[str, ...] = ()
        self._prompts: dict[str, object] = {}  # by task key, in the form they have in the file
        tasks = self._read()
        self._held_out, self._train = self._split(tasks)

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self._name

    @property
    def train(self) -> Sequence[Task]:
        """Tasks a source may draw. No prompt occurs twice, and none is held out."""
        return self._train

    @property
    def held_out(self) -> Sequence[Task]:
        """The last rows of the file, for measuring only."""
        return self._held_out

    @property
    def success(self) -> float:
        """A score of at least this counts as solved."""
        return self._spec.success

    @property
    def num_duplicates(self) -> int:
        """Rows left out because their prompt occurred before."""
        return self._num_duplicates

    @property
    def notes(self) -> tuple[str, ...]:
        """How many rows were left out."""
        if not self._num_duplicates:
            return ()
        kept = len(self._train) + len(self._held_out)
        return (
            f"{self._num_duplicates} of {kept + self._num_duplicates} rows left out: duplicates of "
            "an earlier prompt, whatever their answer",
        )

    @property
    def digest(self) -> str:
        """Identity of the set: its specification, the file, and the reward's file."""
        files = [self._path] if self._reward_file is None else [self._path, self._reward_file]
        hashes = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
        return digest({"spec": plain(self._spec), "files": hashes})

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        """The reward function's score of each completion, in one call.

        Raises:
            TaskError: a task of another set, or an invalid result of the reward function.
        """
        if len(tasks) != len(completions):
            raise TaskError(f"{len(tasks)} tasks and {len(completions)} completions")
        if foreign := next((t.key for t in tasks if t.key not in self._prompts), None):
            raise TaskError(f"task {foreign} is not of task set {self._name}")
        if not tasks:
            return []
        columns: dict[str, list[object]] = {
            column: [task.columns.get(column) for task in tasks] for column in self._columns
        }
        return call_reward(
            self._reward,
            name=self._spec.reward,
            prompts=[self._prompts[task.key] for task in tasks],
            completions=list(completions),
            columns={**columns, "answer": [task.answer for task in tasks]},
        )

    def final_answer(self, completion: str) -> str:
        """The last number, for the reward ``number``; else the text with single spaces."""
        if self._spec.reward == "number" and (found := last_number(completion)) is not None:
            return f"{found.normalize():f}"
        return " ".join(completion.split())

    def _read(self) -> list[Task]:
        tasks: list[Task] = []
        seen: set[object] = set()
        columns: dict[str, None] = {}
        rows = read_jsonl(self._path)
        for number, row in rows:
            task = self._task(row, place=f"{self._path}, row {number}")
            columns.update(dict.fromkeys(task.columns))
            # Keys are short hashes: two prompts with one key would be indistinguishable.
            if task.prompt in seen or task.key in self._prompts:
                continue
            seen.add(task.prompt)
            self._prompts[task.key] = row["prompt"]
            tasks.append(task)
        self._columns = tuple(columns)
        self._num_duplicates = len(rows) - len(tasks)
        return tasks

    def _task(self, row: Mapping[str, object], *, place: str) -> Task:
        if "prompt" not in row:
            raise DataError(
                f"{place}: columns {sorted(row)}", expected='"prompt", and "answer" or others'
            )
        if clash := sorted(_RESERVED & set(row)):
            raise DataError(
                f"{place}: a column named {clash[0]!r}",
                expected="other names: the reward function is called with prompts and completions",
            )
        answer = _answer(row.get("answer"), place=place)
        if self._spec.reward in BUILTINS and answer is None:
            raise DataError(
                f"{place}: no answer", expected=f"one, for the reward {self._spec.reward!r}"
            )
        if self._spec.reward == "number" and not is_number(answer or ""):
            raise DataError(
                f"{place}: the answer {answer!r}",
                expected="a number, for the reward 'number'",
                fix="keep only the number, or use another reward",
            )
        others = {k: v for k, v in row.items() if k not in ("prompt", "answer")}
        return Task(
            taskset=self._name,
            prompt=self._prompt(row["prompt"], place=place),
            answer=answer,
            columns=MappingProxyType(others),
        )

    def _prompt(self, value: object, *, place: str) -> tuple[Message, ...] | str:
        if isinstance(value, str):
            if not value.strip():
                raise DataError(f"{place}: an empty prompt", expected="text or messages")
            return (Message(Role.USER, value),) if self._chat else value
        try:
            messages = messages_from(value)
        except DataError as error:
            raise DataError(
                f"{place}: {error.found} as prompt",
                expected=error.expected or "text or messages",
                fix=error.fix,
            ) from error
        if messages[-1].role is Role.ASSISTANT:
            raise DataError(
                f"{place}: the prompt ends with an assistant message",
                expected="a turn that the assistant answers",
            )
        if not self._chat:
            raise TaskError(
                f"{place}: the prompt is a conversation, but the model has no chat template",
                fix="write the prompts as plain text, or use a chat model",
            )
        return messages

    def _split(self, tasks: list[Task]) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        num = self._spec.held_out
        if not 0 <= num < len(tasks):
            raise TaskError(
                f"task set {self._name}: {len(tasks)} distinct prompts in {self._path}, "
                f"held_out={num}",
                expected=f"at least {max(num, 0) + 1} distinct prompts and held_out >= 0",
                fix="lower held_out, or add rows",
            )
        border = len(tasks) - num
        return tuple(tasks[border:]), tuple(tasks[:border])


def _answer(value: object, *, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise DataError(
        f"{place}: an answer of type {type(value).__name__}", expected="text or a number"
    )
