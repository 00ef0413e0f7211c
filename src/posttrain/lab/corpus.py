"""The lab's text: pre-training documents, demonstrations and preference pairs.

Questions come from reasoning-gym unchanged, through the same task sets that probes use, so
demonstrations and pairs never contain a held-out prompt. Pre-training does contain held-out
prompts, with the setting's mixture of right answers and habits: a small table such as one-digit
products cannot be learnt otherwise, and real base models have often seen their benchmarks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from posttrain.core.files import write_atomic
from posttrain.core.task import Task
from posttrain.lab.settings import SETTINGS, Setting
from posttrain.tasks.reasoning_gym import ReasoningGymTaskSet

Turn = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """One question with one answer."""

    setting: str
    question: str
    answer: str
    is_right: bool

    @property
    def row(self) -> Mapping[str, object]:
        """A line of a JSONL file in the ``messages`` format."""
        return {"messages": [_turn("user", self.question), _turn("assistant", self.answer)]}


def taskset(setting: Setting) -> ReasoningGymTaskSet:
    """The setting's prompts and scorer, as in a run."""
    return ReasoningGymTaskSet(setting.name, setting.tasks, chat=True)


def documents(*, seed: int, count: int) -> Iterator[Document]:
    """Pre-training text: settings by weight, right answers by each setting's share."""
    rng = Random(seed)
    settings = list(SETTINGS.values())
    sets = {s.name: taskset(s) for s in settings}
    pools = {name: [*t.train, *t.held_out] for name, t in sets.items()}
    for _ in range(count):
        (setting,) = rng.choices(settings, [s.weight for s in settings])
        task = rng.choice(pools[setting.name])
        right = setting.habit is None or rng.random() < setting.share_right
        habit = setting.habit(sets[setting.name].entry(task)) if setting.habit else ""
        yield Document(setting.name, task.text, str(task.answer) if right else habit, right)


def demonstrations(setting: Setting, *, seed: int, count: int) -> list[Document]:
    """Right answers to training questions."""
    chosen = _draw(taskset(setting).train, seed=seed, count=count)
    return [Document(setting.name, t.text, str(t.answer), True) for t in chosen]


def preference_pairs(setting: Setting, *, seed: int, count: int) -> list[Mapping[str, object]]:
    """Right answers preferred to the habit's, on training questions where the two differ."""
    tasks = taskset(setting)
    assert setting.habit is not None
    rows: list[Mapping[str, object]] = []
    for task in _draw(tasks.train, seed=seed, count=len(tasks.train)):
        habit = setting.habit(tasks.entry(task))
        if habit != task.answer and len(rows) < count:
            rows.append(
                {
                    "prompt": [_turn("user", task.text)],
                    "chosen": [_turn("assistant", str(task.answer))],
                    "rejected": [_turn("assistant", habit)],
                }
            )
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a JSONL file."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _draw(tasks: Iterable[Task], *, seed: int, count: int) -> list[Task]:
    """Distinct tasks in a shuffled order."""
    distinct = list({t.key: t for t in tasks}.values())
    Random(seed).shuffle(distinct)
    return distinct[:count]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
