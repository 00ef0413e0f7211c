"""Task sets from the reasoning-gym library: procedural questions with the library's own scorer.

    generator ──items──▶ held_out: the first distinct questions
                     └─▶ train: the items after them whose question is not held out

Questions in ``train`` may repeat: a generator with a small space of questions repeats itself.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast, final

import msgspec

from posttrain.core.bounds import Count, Integer, Number, Seed, Whole
from posttrain.core.config import digest, plain
from posttrain.core.errors import TaskError, nearest
from posttrain.core.provenance import Role
from posttrain.core.task import Message, Task
from posttrain.parts.registry import part
from posttrain.tasks.base import TaskSetSpec

_OWN_OPTIONS = frozenset({"size", "seed"})
_PATIENCE = 20  # items examined per requested task, before the question space counts as too small
_NUM_PROBED = 8  # tasks whose own answer is scored when the set is built

# Raised by generators for an invalid configuration, and by scorers that fail to parse an answer
# (int("abc"), a missing key, "1/0").
_LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)

PlainValue = str | Integer | Number | bool | None


@part
class ReasoningGym(TaskSetSpec):
    """A generator of the reasoning-gym library, scored by the library's own scorer."""

    dataset: str
    config: dict[str, PlainValue | list[PlainValue]] = msgspec.field(default_factory=dict)
    train: Count = 1000
    held_out: Whole = 32
    seed: Seed = 0

    def identity(self, root: Path) -> dict[str, object]:
        """Its options; the library's version is pinned by the installation, not here."""
        return plain(self)

    def build(self, name: str, *, root: Path, chat: bool) -> ReasoningGymTaskSet:
        """The generator's questions, split."""
        return ReasoningGymTaskSet(name, self, chat=chat)


class _Generator(Protocol):
    """The used interface of a reasoning-gym dataset."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...

    def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> object: ...


@final
class ReasoningGymTaskSet:
    """Tasks of one reasoning-gym generator. Same specification, same tasks.

    The generator's entry (question, answer, metadata) is kept by task key: scorers need it.

    Raises:
        TaskError: the library is missing, the generator is unknown, its configuration is
            refused, it has too few distinct questions, or its scorer raises on its own answers.
    """

    def __init__(self, name: str, spec: ReasoningGym, *, chat: bool) -> None:
        if spec.train < 1 or spec.held_out < 0:
            raise TaskError(
                f"task set {name}: train={spec.train}, held_out={spec.held_out}",
                expected="train >= 1 and held_out >= 0",
            )
        self._name, self._spec, self._chat = name, spec, chat
        self._limit = _PATIENCE * (spec.train + spec.held_out)
        self._generator = _generator(name, spec, size=self._limit)
        self._entries: dict[str, Mapping[str, Any]] = {}
        self._held_out, self._train = self._split()
        self._check_scorer()

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self._name

    @property
    def train(self) -> Sequence[Task]:
        """Tasks a source may draw. Questions may repeat, but none is held out."""
        return self._train

    @property
    def held_out(self) -> Sequence[Task]:
        """Distinct questions, for measuring only."""
        return self._held_out

    @property
    def success(self) -> float:
        """A score of at least this counts as solved."""
        return self._spec.success

    @property
    def digest(self) -> str:
        """Identity of the set: its specification and the library's version."""
        version = importlib.metadata.version("reasoning-gym")
        return digest({"spec": plain(self._spec), "reasoning-gym": version})

    def entry(self, task: Task) -> Mapping[str, Any]:
        """The generator's own item behind a task: question, answer, metadata.

        Raises:
            TaskError: a task of another set.
        """
        entry = self._entries.get(task.key)
        if entry is None:
            raise TaskError(f"task {task.key} is not of task set {self._name}")
        return entry

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        """The library's score of each completion.

        Raises:
            TaskError: a task of another set, or a score that is not a finite number.
        """
        if len(tasks) != len(completions):
            raise TaskError(f"{len(tasks)} tasks and {len(completions)} completions")
        return [self._score(t, c) for t, c in zip(tasks, completions, strict=True)]

    def _score(self, task: Task, completion: str) -> float:
        entry = self.entry(task)
        try:
            score = self._generator.score_answer(answer=completion, entry=entry)
        except _LIBRARY_ERRORS:
            # The scorer failed to parse the completion, so it is a wrong answer. That the scorer
            # works was checked on the library's own answers.
            return 0.0
        if not isinstance(score, Real) or not math.isfinite(score):
            raise TaskError(
                f"task set {self._name}: {self._spec.dataset} scored {completion[:60]!r} with "
                f"{score!r} on task {task.key}",
                expected="a finite number",
            )
        return float(score)

    def _split(self) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        spec = self._spec
        held_out: dict[str, Task] = {}
        train: list[Task] = []
        for entry in self._items():
            question = str(entry["question"])
            task = self._task(question, entry)
            # Keys are short hashes: of two questions with one key the first is used.
            taken = self._entries.setdefault(task.key, entry)
            if question in held_out or taken["question"] != question:
                continue
            if len(held_out) < spec.held_out:
                held_out[question] = task
            else:
                train.append(task)
            if len(train) == spec.train:
                return tuple(held_out.values()), tuple(train)
        distinct = len({str(e["question"]) for e in self._entries.values()})
        raise TaskError(
            f"task set {self._name}: {spec.dataset} gave {distinct} distinct questions in "
            f"{self._limit} items: {len(held_out)} held out, {len(train)} items left to train on",
            expected=f"{spec.held_out} held out and {spec.train} to train on",
            fix="lower held_out or train, or widen the generator's config",
        )

    def _items(self) -> Iterator[Mapping[str, Any]]:
        for index in range(self._limit):
            try:
                entry = self._generator[index]
            except _LIBRARY_ERRORS as error:
                raise TaskError(
                    f"task set {self._name}: {self._spec.dataset} cannot make item {index}: "
                    f"{type(error).__name__}: {error}",
                    fix="change the generator's config",
                ) from error
            yield entry

    def _task(self, question: str, entry: Mapping[str, Any]) -> Task:
        answer = entry["answer"]
        columns = {"difficulty": entry.get("metadata", {}).get("difficulty")}
        return Task(
            taskset=self._name,
            prompt=(Message(Role.USER, question),) if self._chat else question,
            answer=None if answer is None else str(answer),
            columns=MappingProxyType(columns),
        )

    def _check_scorer(self) -> None:
        """Score the library's own answers, to detect a scorer that always raises."""
        for task in (*self._held_out, *self._train)[:_NUM_PROBED]:
            entry = self._entries[task.key]
            try:
                self._generator.score_answer(answer=entry["answer"], entry=entry)
            except _LIBRARY_ERRORS as error:
                raise TaskError(
                    f"task set {self._name}: the scorer of {self._spec.dataset} raised on the "
                    f"library's own answer: {type(error).__name__}: {error}",
                    fix="use another dataset or config",
                ) from error


def _generator(name: str, spec: ReasoningGym, *, size: int) -> _Generator:
    try:
        import reasoning_gym  # type: ignore[import-untyped]
        from reasoning_gym.factory import DATASETS  # type: ignore[import-untyped]
    except ImportError as error:
        raise TaskError(
            f"task set {name} needs reasoning-gym: {error}",
            fix="pip install 'posttrain[tasks]'",
        ) from error
    if spec.dataset not in DATASETS:
        raise TaskError(
            f"task set {name}: reasoning-gym has no dataset {spec.dataset!r}",
            fix=nearest(spec.dataset, DATASETS),
        )
    options = {f.name for f in dataclasses.fields(DATASETS[spec.dataset][1])} - _OWN_OPTIONS
    for option in spec.config:
        if option in _OWN_OPTIONS:
            raise TaskError(
                f"task set {name}: {option!r} in config",
                fix="set train, held_out and seed of the task set itself",
            )
        if option not in options:
            raise TaskError(
                f"task set {name}: {spec.dataset} has no option {option!r}",
                fix=nearest(option, options),
            )
    try:
        made = reasoning_gym.create_dataset(
            spec.dataset, size=size, seed=spec.seed, **dict(spec.config)
        )
    except _LIBRARY_ERRORS as error:
        raise TaskError(
            f"task set {name}: reasoning-gym refuses the config of {spec.dataset}: "
            f"{type(error).__name__}: {error}",
            fix=f"options of {spec.dataset}: {', '.join(sorted(options))}",
        ) from error
    return cast(_Generator, made)
