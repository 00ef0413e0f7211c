"""A data file as a source: demonstrations or preference pairs, rendered and checked beforehand.

file ──rows──▶ format ──render──▶ groups (one demonstration, or one pair) ──order──▶ draws
                                    └─ every row is checked here, before anything is trained

The order of an epoch is a function of (seed, epoch) alone, so a resumed run draws what an
uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import final

import numpy as np
import numpy.typing as npt

from posttrain.chat import ChatRenderer, messages_from
from posttrain.composition import ANYONE, Dataset
from posttrain.composition.sources import Format
from posttrain.core.errors import ConfigError, DataError
from posttrain.core.files import read_jsonl
from posttrain.core.provenance import Kind, Producer, Role
from posttrain.core.task import Message
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.sources.numbers import row_numbers
from posttrain.sources.step_rows import joined, step_labels

Row = Mapping[str, object]

COLUMNS: Mapping[Format, frozenset[str]] = MappingProxyType(
    {
        "preference": frozenset({"chosen", "rejected"}),
        "completion": frozenset({"prompt", "completion"}),
        "messages": frozenset({"messages"}),
        "text": frozenset({"text"}),
        "unpaired": frozenset({"prompt", "completion", "label"}),
        "steps": frozenset({"prompt", "completions", "labels"}),
    }
)
"""Columns that each format needs. ``preference`` may have a ``prompt`` too."""

_KNOWN_FORMATS = (
    "text, prompt + completion, messages, or (for preference methods) prompt + chosen + rejected "
    "or prompt + completion + label"
)
_UNIT_COLUMNS = {
    +1: MappingProxyType({Column.PREFERENCE: np.asarray(1.0)}),
    -1: MappingProxyType({Column.PREFERENCE: np.asarray(-1.0)}),
}
_LABELS = {
    +1: MappingProxyType({Column.LABEL: np.asarray(1.0)}),
    -1: MappingProxyType({Column.LABEL: np.asarray(-1.0)}),
}


@final
class DatasetSource:
    """Groups from a JSONL or Parquet file. A demonstration is a group of one, a pair of two.

    Args:
        spec: the file and how to read it.
        root: the recipe's folder.
        renderer: of the model that will be trained.
        context: the model's context, in tokens.
        seed: of the order.

    Raises:
        ConfigError: the author named cannot have written a file.
        DataError: the file is malformed, empty, of another format than the stage reads, or
            teaches nothing; names the file and the row.
        ModelError: a file of conversations, and the model has no chat template.
    """

    def __init__(
        self, spec: Dataset, *, root: Path, renderer: ChatRenderer, context: int, seed: int
    ) -> None:
        writers = ANYONE - {Kind.LEARNER}
        if spec.author not in writers:
            raise ConfigError(
                f"data set {spec.path} with author {spec.author}",
                expected=f"one of {', '.join(sorted(writers))}: a file is written beforehand, by "
                "somebody other than the live learner",
            )
        self._spec, self._path, self._seed = spec, root / spec.path, seed
        self._renderer, self._context = renderer, context
        rows = _read(self._path)
        with self._path.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._name = spec.name or self._path.stem
        self._producer = Producer(kind=spec.author, name=self._name, digest=self._digest)
        self._format = _format(spec, self._path, rows[0][1])
        self._groups = tuple(self._render(rows))
        self._skipped = len(rows) - len(self._groups)
        self._check_whole()

    @property
    def name(self) -> str:
        """``spec.name``, or the file's stem."""
        return self._name

    @property
    def producer(self) -> Producer:
        """The author of the rows, with the file's digest."""
        return self._producer

    @property
    def digest(self) -> str:
        """sha256 of the file, 64 hex digits."""
        return self._digest

    @property
    def licence(self) -> str | None:
        """The licence that the recipe states."""
        return self._spec.licence

    @property
    def format(self) -> Format:
        """The format that was detected or named."""
        return self._format

    @property
    def num_groups(self) -> int:
        """Rows that are drawn: those of the file without the skipped ones."""
        return len(self._groups)

    @property
    def skipped(self) -> int:
        """Rows left out for their length (``too_long: skip``)."""
        return self._skipped

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, prompts included; both sides of a pair count."""
        return sum(len(t) for t in self._trajectories())

    @property
    def num_trainable(self) -> int:
        """Tokens that a term may train on, over one epoch."""
        return sum(int(t.trainable.sum()) for t in self._trajectories())

    def preview(self, index: int = 0) -> str:
        """A row as the learner sees it, each trained stretch in ⟦ ⟧; a pair in two lines."""
        return "\n".join(self._renderer.show(m.trajectory) for m in self._groups[index].members)

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """Groups ``step * num_groups`` and following of an endless, shuffled run of epochs.

        Every epoch is another permutation of the rows; a draw may span two of them.
        """
        first = step * num_groups
        return [self._at(position) for position in range(first, first + num_groups)]

    def _at(self, position: int) -> Group:
        epoch, place = divmod(position, len(self._groups))
        return self._groups[int(_order(len(self._groups), seed=self._seed, epoch=epoch)[place])]

    def _trajectories(self) -> Iterator[Trajectory]:
        return (m.trajectory for group in self._groups for m in group.members)

    def _render(self, rows: Sequence[tuple[int, Row]]) -> Iterator[Group]:
        for number, row in rows:
            place = f"{self._path}, row {number}"
            if missing := sorted(COLUMNS[self._format] - set(row)):
                raise DataError(
                    f"{place}: no {' and no '.join(missing)}; columns {sorted(row)}",
                    expected=f"{' and '.join(sorted(COLUMNS[self._format]))} in every row",
                )
            try:
                members = self._members(row)
                if numbers := row_numbers(self._spec, row):
                    members = tuple(m.with_columns(numbers) for m in members)
            except DataError as error:
                raise DataError(
                    f"{place}: {error.found}", expected=error.expected, fix=error.fix
                ) from error
            if self._fits(members, place=place):
                yield Group(task=members[0].trajectory.task, members=members)

    def _fits(self, members: Sequence[Scored], *, place: str) -> bool:
        length = max(len(m.trajectory) for m in members)
        if length > self._context and self._spec.too_long == "error":
            raise DataError(
                f"{place}: {length} tokens",
                expected=f"at most {self._context}, the context",
                fix="shorten the row, or set `too_long: skip`",
            )
        return length <= self._context

    def _members(self, row: Row) -> tuple[Scored, ...]:
        task = f"{self._name}/{_content_hash(row)}"
        if self._format == "text":
            return (Scored(trajectory=self._document(row["text"], task=task)),)
        if self._format == "preference":
            return self._pair(row, task)
        if self._format == "unpaired":
            return (self._labelled(row, task),)
        if self._format == "steps":
            assert self._spec.steps is not None
            answer = joined(row, self._spec.steps)
            written = self._checked(
                self._continuation(row["prompt"], answer, "completions", task=task)
            )
            labels = step_labels(row, written, steps=self._spec.steps, renderer=self._renderer)
            return (Scored(trajectory=written, columns=labels),)
        if self._format == "messages":
            messages = messages_from(row["messages"])
            _check_answer(messages)
            return (Scored(trajectory=self._checked(self._conversation(messages, task=task))),)
        written = self._continuation(row["prompt"], row["completion"], "completion", task=task)
        return (Scored(trajectory=self._checked(written)),)

    def _document(self, text: object, *, task: str) -> Trajectory:
        """A plain document: no prompt, and every token that something stands before is trained."""
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"a text of type {_kind(text)}", expected="text that is not empty")
        return self._renderer.completion("", text, producer=self._producer, task=task)

    def _pair(self, row: Row, task: str) -> tuple[Scored, ...]:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
            prompt, chosen, rejected = _common_start(chosen, rejected, prompt)
        sides = [
            self._checked(self._continuation(prompt, side, column, task=task))
            for column, side in (("chosen", chosen), ("rejected", rejected))
        ]
        if np.array_equal(sides[0].tokens, sides[1].tokens):
            raise DataError("chosen and rejected are equal", expected="two different answers")
        if not all(side.trainable.any() for side in sides):
            raise DataError(
                "an answer of the pair has no trainable token",
                expected="an assistant mask over both answers",
                fix="check the template's {% generation %} block, or set `assistant_mask: prefix`",
            )
        columns = _LABELS if self._spec.unpaired else _UNIT_COLUMNS
        return (
            Scored(trajectory=sides[0], columns=columns[+1]),
            Scored(trajectory=sides[1], columns=columns[-1]),
        )

    def _labelled(self, row: Row, task: str) -> Scored:
        label = row["label"]
        if not isinstance(label, bool):
            raise DataError(f"a label {label!r} of type {_kind(label)}", expected="true or false")
        written = self._continuation(row["prompt"], row["completion"], "completion", task=task)
        if not written.trainable.any():
            raise DataError(
                "an answer without a trainable token",
                expected="an assistant mask over the answer",
                fix="check the template's {% generation %} block, or set `assistant_mask: prefix`",
            )
        return Scored(trajectory=self._checked(written), columns=_LABELS[+1 if label else -1])

    def _continuation(
        self, prompt: object, completion: object, column: str, *, task: str
    ) -> Trajectory:
        """Prompt and answer, both text or both messages."""
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                raise DataError(f"an empty {column}", expected="text to learn from")
            return self._renderer.completion(prompt, completion, producer=self._producer, task=task)
        if not (isinstance(prompt, list | tuple) and isinstance(completion, list | tuple)):
            raise DataError(
                f"prompt of type {_kind(prompt)} and {column} of type {_kind(completion)}",
                expected="text in both, or messages in both",
            )
        before, after = _parsed(prompt, "prompt"), _parsed(completion, column)
        _check_answer(after, column)
        if after[0].role is not Role.ASSISTANT or before[-1].role is Role.ASSISTANT:
            raise DataError(
                f"the prompt ends with a turn of role {before[-1].role}, and {column} starts "
                f"with one of role {after[0].role}",
                expected="a prompt up to the turn that the assistant answers, then its answer",
            )
        return self._conversation((*before, *after), task=task, num_prompt=len(before))

    def _conversation(
        self, messages: Sequence[Message], *, task: str, num_prompt: int | None = None
    ) -> Trajectory:
        return self._renderer.conversation(
            messages,
            producer=self._producer,
            task=task,
            assistant_mask=self._spec.assistant_mask,
            num_prompt=num_prompt,
        )

    def _checked(self, trajectory: Trajectory) -> Trajectory:
        if trajectory.prompt_length == 0:
            raise DataError(
                "nothing stands before the first trained token, so nothing can predict it",
                expected="a prompt of at least one token",
            )
        return trajectory

    def _check_whole(self) -> None:
        """What only the whole file shows: that something is left, is trained, and ends."""
        if not self._groups:
            raise DataError(
                f"{self._path}: all {self._skipped} rows are longer than {self._context} tokens",
                expected="rows that fit the context",
                fix="shorten the rows, or use a model with a longer context",
            )
        labels = {m.scalar(Column.LABEL) for group in self._groups for m in group.members}
        if len(labels) == 1 and self._spec.unpaired:
            raise DataError(
                f"{self._path}: every row has the label {'true' if 1.0 in labels else 'false'}",
                expected="good answers and bad ones",
                fix="add rows of the other kind; to learn from good ones alone, use sft",
            )
        trained = [t.tokens[t.trainable] for t in self._trajectories()]
        how = self._spec.assistant_mask
        if not any(len(tokens) for tokens in trained):
            raise DataError(
                f"{self._path}: no trainable token in {len(self._groups)} rows: the assistant "
                f"mask ({how}) is empty everywhere",
                expected="tokens of assistant turns under the mask",
                fix="check that the {% generation %} block of the template is around each "
                "answer, or set `assistant_mask: prefix`",
            )
        ends = np.array(sorted(self._renderer.end_tokens))
        if not any(np.isin(tokens, ends).any() for tokens in trained):
            raise DataError(
                f"{self._path}: no end-of-turn token ({ends.tolist()}) is trained in any row, so "
                "the learner would never learn to stop",
                expected="the token that ends a turn under the assistant mask",
                fix="move it inside the template's {% generation %} block, or name the template's "
                "end token as eos_token of the tokenizer or in the generation config",
            )


@lru_cache(maxsize=4)
def _order(num_rows: int, *, seed: int, epoch: int) -> npt.NDArray[np.intp]:
    """A permutation of the rows. It sorts raw counter-based random bits, which NumPy promises
    to keep over its versions; the promise does not cover ``Generator.permutation``."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.flags.writeable = False
    return order


def _read(path: Path) -> list[tuple[int, Row]]:
    """Rows with their numbers from 1: lines of a JSONL file, rows of a Parquet file."""
    if path.suffix in (".jsonl", ".ndjson"):
        return read_jsonl(path)
    if path.suffix != ".parquet":
        raise DataError(f"data file {path}", expected="a .jsonl or .parquet file")
    if not path.is_file():
        raise DataError(f"no file {path}", fix="check the path; it is relative to the recipe")
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    # A column of another row's shape is null in Parquet, and absent in JSONL.
    rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
    if not rows:
        raise DataError(f"{path} is empty", expected="at least one row")
    return list(enumerate(rows, start=1))


def _format(spec: Dataset, path: Path, first: Row) -> Format:
    """The format of a file from its first row, checked against what the stage reads."""
    fitting: list[Format] = [f for f, needed in COLUMNS.items() if needed <= set(first)]
    place = f"{path}: columns {sorted(first)}"
    if spec.format != "auto":
        fitting = [f for f in fitting if f == spec.format]
        if not fitting:
            raise DataError(
                f"{place} with `format: {spec.format}`",
                expected=f"the columns {sorted(COLUMNS[spec.format])}",
                fix="name the format of the file, or leave `format` out",
            )
    if not fitting:
        raise DataError(place, expected=_KNOWN_FORMATS, fix="rename the columns")
    _check_labels(spec, first, fitting, place=place)
    usable: list[Format] = [f for f in fitting if f in _readable(spec)]
    if not usable:
        raise _misfit(spec, fitting, place=place)
    if len(usable) > 1:
        raise DataError(
            f"{place} fit more than one format: {', '.join(usable)}",
            fix=f"set `format` to one of them: {', '.join(usable)}",
        )
    return usable[0]


def _readable(spec: Dataset) -> frozenset[str]:
    """The formats that the stage can learn from. Pairs are labelled answers too."""
    if spec.steps:
        return frozenset({"steps"})
    if spec.preference:
        return frozenset({"preference"})
    if spec.unpaired:
        return frozenset({"unpaired", "preference"})
    return frozenset(COLUMNS) - {"unpaired", "preference", "steps"}


def _check_labels(spec: Dataset, first: Row, fitting: Sequence[Format], *, place: str) -> None:
    """Demonstrations of what not to do must not be learnt from by oversight."""
    labelled = "unpaired" in fitting and isinstance(first["label"], bool)
    if labelled and spec.format == "auto" and not (spec.preference or spec.unpaired):
        raise DataError(
            f"{place} with a label that is true or false, and the stage learns from demonstrations",
            expected="answers that are all worth imitating",
            fix="use a method that learns from labelled answers (kto, bco), or set "
            "`format: completion` to learn from every row whatever its label",
        )


def _misfit(spec: Dataset, fitting: Sequence[Format], *, place: str) -> DataError:
    if spec.preference or spec.unpaired:
        pairs = "prompt + chosen + rejected"
        labelled = "unpaired" in fitting
        return DataError(
            f"{place} are {'labelled answers' if labelled else 'demonstrations'}, and the stage "
            f"learns from {'preferences' if spec.preference else 'answers judged one by one'}",
            expected=pairs if spec.preference else f"prompt + completion + label, or {pairs}",
            fix="use a method on labelled answers (kto, bco), or a file of pairs"
            if labelled
            else "use a file of pairs, or a method that learns from demonstrations (sft)",
        )
    return DataError(
        f"{place} are {'preference pairs' if 'preference' in fitting else 'labelled answers'}, and "
        "the stage learns from demonstrations",
        expected="prompt + completion, or messages",
        fix="use a preference method (dpo, kto), or a file of demonstrations",
    )


def _common_start(
    chosen: list[object], rejected: list[object], prompt: object
) -> tuple[list[object], list[object], list[object]]:
    """Split two whole conversations into what they share, and the answers."""
    same = [a == b for a, b in zip(chosen, rejected, strict=False)]
    shared = same.index(False) if False in same else len(same)
    if shared and shared == min(len(chosen), len(rejected)):
        raise DataError(
            "chosen and rejected are equal, or one continues the other",
            expected="two different answers to the same turn",
        )
    if not shared:
        raise DataError(
            "chosen and rejected share no first message, and there is no prompt of messages",
            expected="a prompt, or two conversations that start alike",
        )
    start: list[object] = chosen[:shared]
    if prompt is not None and messages_from(start)[-1].content != prompt:
        raise DataError(
            "prompt is text, and not the last turn that chosen and rejected share",
            expected="text in all three, or messages in all three",
            fix="remove the prompt column: the shared turns are the prompt",
        )
    return start, chosen[shared:], rejected[shared:]


def _parsed(value: object, column: str) -> tuple[Message, ...]:
    try:
        return messages_from(value)
    except DataError as error:
        raise DataError(
            f"{column}: {error.found}", expected=error.expected, fix=error.fix
        ) from error


def _check_answer(messages: Sequence[Message], column: str = "messages") -> None:
    """At least one assistant turn, and none of them empty."""
    answers = [m.content for m in messages if m.role is Role.ASSISTANT]
    if not answers:
        raise DataError(f"{column} without an assistant turn", expected="an answer to learn from")
    if not all(answer.strip() for answer in answers):
        raise DataError(f"an empty assistant turn in {column}", expected="text to learn from")


def _content_hash(row: Row) -> str:
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
