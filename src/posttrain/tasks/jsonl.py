"""Task sets from a JSONL file of prompts and answers, scored by a reward function.

rows ──distinct prompts──▶ tasks ──▶ train: all but the last, held_out: the last N
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import final

from msgspec.structs import replace

from posttrain.chat.messages import messages_from
from posttrain.core.bounds import Positive, Whole
from posttrain.core.config import digest, plain
from posttrain.core.errors import DataError, TaskError
from posttrain.core.files import content_of
from posttrain.core.provenance import Role
from posttrain.core.rows import read_jsonl
from posttrain.core.task import Message, Task
from posttrain.parts.registry import part
from posttrain.tasks.base import TaskSetSpec
from posttrain.tasks.numerals import last_number, read_whole, written
from posttrain.tasks.rewards import BUILTINS, Reward, find_reward, shown

_RESERVED = frozenset({"prompts", "completions"})
# How tables write a whole number in a column with gaps, and how they write a gap.
_FLOAT_LIKE = re.compile(r"[-+]?[0-9]+\.0")
_GAPS = frozenset({"nan", "none", "null", "<na>"})


@part
class JsonlTasks(TaskSetSpec, tag="jsonl"):
    """Rows of prompt (text or messages) and answer, scored by a reward function.

    ``reward`` is a built-in name (``exact``, ``number``) or ``file.py:function``, a function
    ``(prompts, completions, **columns) -> list[float]``, which may import modules beside it. The
    last ``held_out`` rows, after removing duplicates, are held out for measuring. A reward may take
    ``reward_seconds`` per completion.
    """

    path: str
    reward: str = "exact"
    held_out: Whole = 32
    reward_seconds: Positive = 60.0

    def identity(self, root: Path) -> dict[str, object]:
        """Its options, with the content of the file, and of the reward's file and modules.

        The patience with a reward does not count: it changes no score.
        """
        resolved = {**plain(self), "path": content_of(self.path, root)}
        del resolved["reward_seconds"]
        return {**resolved, "reward": self._reward(root).identity}

    def code(self, root: Path) -> Sequence[Path]:
        """The reward's file and the modules that it imports beside it."""
        return self._reward(root).files

    def _reward(self, root: Path) -> Reward:
        return find_reward(self.reward, root, seconds=self.reward_seconds)

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
        self._name, self._spec, self._chat, self._root = name, spec, chat, root
        self._path = root / spec.path
        self._reward = find_reward(spec.reward, root, seconds=spec.reward_seconds)
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
    def digest(self) -> str:
        """Identity of the set: its options, the file, and the reward with its modules."""
        return digest(self._spec.identity(self._root))

    @property
    def changed(self) -> Sequence[str]:
        """What the reward changed in this process; all of it was put back."""
        return self._reward.changed

    @property
    def notes(self) -> Sequence[str]:
        """What a reader should know about the rows: what is left out or probably not meant."""
        kept = (*self._train, *self._held_out)
        answers = [task.answer for task in kept if task.answer is not None]
        said = []
        if self._num_duplicates:
            said.append(
                f"{self._num_duplicates} of {len(kept) + self._num_duplicates} rows left out: "
                "duplicates of an earlier prompt"
                + (f", {self._num_disputed} with another answer" if self._num_disputed else "")
            )
        if self._spec.reward == "exact":
            floats = Counter(bool(_FLOAT_LIKE.fullmatch(a.strip())) for a in answers)[True]
            if floats:
                said.append(
                    f"{floats} answers are texts such as '12.0', which `exact` never finds equal "
                    "to 12: write whole numbers, or use the reward `number`"
                )
        if gaps := sum(a.strip().lower() in _GAPS for a in answers):
            said.append(f"{gaps} answers are texts such as 'nan' or 'None', as of an empty cell")
        return said

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
        return self._reward.score(
            [self._prompts[task.key] for task in tasks],
            completions,
            {**columns, "answer": [task.answer for task in tasks]},
        )

    def final_answer(self, completion: str) -> str:
        """The last number, for the reward ``number``; else the text with single spaces."""
        if self._spec.reward == "number" and (found := last_number(completion)) is not None:
            return written(found)
        return " ".join(completion.split())

    def _read(self) -> list[Task]:
        tasks: list[Task] = []
        seen: dict[object, str | None] = {}
        self._num_disputed = 0
        columns: dict[str, None] = {}
        rows = read_jsonl(self._path)
        for number, row in rows:
            task = self._task(row, place=f"{self._path}, row {number}")
            columns.update(dict.fromkeys(task.columns))
            # Keys are short hashes: two prompts with one key would be indistinguishable.
            if task.prompt in seen or task.key in self._prompts:
                self._num_disputed += seen.get(task.prompt, task.answer) != task.answer
                continue
            seen[task.prompt] = task.answer
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
        if self._spec.reward in BUILTINS and not (answer or "").strip():
            raise DataError(
                f"{place}: no answer", expected=f"one, for the reward {self._spec.reward!r}"
            )
        reading = read_whole(answer or "") if self._spec.reward == "number" else None
        if reading is not None and reading.value is None:
            raise DataError(
                f"{place}: the answer {shown(answer)}: {reading.reason}",
                expected="one number, for the reward 'number'",
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
    """An answer as text. A whole number is written without a point: tables turn 12 into 12.0
    where a row has no value."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    kind = type(value).__name__
    found = (
        f"the answer {shown(value)}" if kind in ("int", "float") else f"an answer of type {kind}"
    )
    raise DataError(f"{place}: {found}", expected="text or a finite number")
