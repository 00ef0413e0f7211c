"""The rows of a data file as groups of tokens, and everything that was found on the way.

rows ──▶ format ──▶ messages or text ──renderer──▶ groups
           │                              └─ compared with the messages
           └─ columns, labels, duplicates ──▶ Findings ──▶ notes, proofs
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, final

import numpy as np

from posttrain.chat.messages import messages_from
from posttrain.core.errors import DataError
from posttrain.core.provenance import Kind, Producer, Role
from posttrain.core.rendering import Rules
from posttrain.core.rows import Row, at_row
from posttrain.core.task import Message
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.parts.rewards.steps import Steps
from posttrain.parts.sources.findings import Findings
from posttrain.parts.sources.formats import (
    COLUMNS,
    Format,
    Wants,
    check_answer,
    common_start,
    format_of,
    joined,
    kind_of,
    parsed,
    row_numbers,
    step_labels,
    unread_columns,
)
from posttrain.parts.sources.reading import DataRows, read_rows
from posttrain.protocols import DataFile, Renderer

_PREFERENCES = {
    +1: MappingProxyType({Column.PREFERENCE: np.asarray(1.0)}),
    -1: MappingProxyType({Column.PREFERENCE: np.asarray(-1.0)}),
}
_LABELS = {
    +1: MappingProxyType({Column.LABEL: np.asarray(1.0)}),
    -1: MappingProxyType({Column.LABEL: np.asarray(-1.0)}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """How a data file is read. The options of a data set, its path resolved."""

    path: Path
    name: str
    author: Kind
    licence: str | None
    format: Format | Literal["auto"]
    wants: Wants
    assistant_mask: Literal["template", "prefix"]
    skip_long: bool
    skip_bad: bool
    rules: Rules
    ignore: frozenset[str]
    steps: Steps | None
    numbers: Mapping[Column, str | None]  # the file's columns of numbers, by what they fill


@dataclass(frozen=True, slots=True, eq=False)
class RenderedRows:
    """A data file as groups. A demonstration is a group of one, a pair of two."""

    file: DataFile
    format: Format
    groups: tuple[Group, ...]


def render_rows(how: DataSpec, *, renderer: Renderer, context: int) -> RenderedRows:
    """Read, render and check a data file.

    Raises:
        DataError: a file, a row or a column that cannot be used, unless it may be left out.
        ModelError: a file of conversations, and the model has no chat template.
    """
    data = read_rows(how.path, ignore=how.ignore, skip_bad=how.skip_bad)
    form = _format_of(data, how)
    rows = _RowRenderer(how, data, form, renderer=renderer, context=context)
    rows.findings.unread = unread_columns(
        data.rows,
        form,
        wants=how.wants,
        named=how.format,
        numbers=[name for name in how.numbers.values() if name is not None],
        path=how.path,
    )
    groups = tuple(rows.groups())
    rows.check_whole(groups)
    return RenderedRows(rows.file(groups), form, groups)


def _format_of(data: DataRows, how: DataSpec) -> Format:
    """The format of the first row that has one."""
    for number, row in data.rows:
        try:
            return format_of(row, named=how.format, wants=how.wants, path=how.path)
        except DataError:
            if not how.skip_bad or number == data.rows[-1][0]:
                raise
    raise AssertionError("a file has rows")


@final
class _RowRenderer:
    """Renders the rows of one file."""

    def __init__(
        self, how: DataSpec, data: DataRows, form: Format, *, renderer: Renderer, context: int
    ) -> None:
        self._how, self._data, self._format = how, data, form
        self._renderer, self._context = renderer, context
        self._producer = Producer(kind=how.author, name=how.name, digest=data.digest)
        self.findings = Findings(how.path, bad=list(data.bad))
        self._rules = replace(how.rules, seen=self.findings.changed)

    def groups(self) -> Iterator[Group]:
        """The rows that can be used, in the order of the file."""
        for number, row in self._data.rows:
            self.findings.begin(number)
            try:
                members = at_row(self._how.path, number, partial(self._row, row))
            except DataError as error:
                if not self._how.skip_bad:
                    raise
                self.findings.bad.append(error)
                continue
            if self._fits(members):
                self.findings.used(members[0].trajectory.task)
                yield Group(task=members[0].trajectory.task, members=members)

    def file(self, groups: Sequence[Group]) -> DataFile:
        """The file, as the ledger records it."""
        total = len(self._data.rows) + len(self._data.bad)
        remarks = self._renderer.remarks if self.findings.turns else ()
        return DataFile(
            name=self._how.name,
            producer=self._producer,
            digest=self._data.digest,
            licence=self._how.licence,
            rows=len(groups),
            skipped=total - len(groups),
            notes=self.findings.notes(),
            proofs=self.findings.proofs(self._how.name, len(groups), remarks=remarks),
            questions=frozenset(self.findings.questions),
        )

    def _row(self, row: Row) -> tuple[Scored, ...]:
        if missing := sorted(COLUMNS[self._format] - set(row)):
            raise DataError(
                f"no {' and no '.join(missing)}; columns {sorted(row)}",
                expected=f"{' and '.join(sorted(COLUMNS[self._format]))} in every row",
            )
        members = self._members(row)
        if numbers := row_numbers(row, self._how.numbers):
            members = tuple(m.with_columns(numbers) for m in members)
        return members

    def _fits(self, members: Sequence[Scored]) -> bool:
        length = max(len(m.trajectory) for m in members)
        if length <= self._context:
            return True
        if not self._how.skip_long:
            raise DataError(
                f"{self._how.path}, row {self.findings.number}: {length} tokens",
                expected=f"at most {self._context}, the context",
                fix="shorten the row, or set `too_long: skip`",
            )
        self.findings.too_long.append(self.findings.number)
        return False

    def _members(self, row: Row) -> tuple[Scored, ...]:
        task = f"{self._how.name}/{_content_hash(row)}"
        if self._format == "text":
            return (Scored(trajectory=self._document(row["text"], task=task)),)
        if self._format == "preference":
            return self._pair(row, task)
        if self._format == "unpaired":
            return (self._labelled(row, task),)
        if self._format == "steps":
            assert self._how.steps is not None
            answer = joined(row, self._how.steps)
            written = self._checked(
                self._continuation(row["prompt"], answer, "completions", task=task)
            )
            labels = step_labels(row, written, steps=self._how.steps, renderer=self._renderer)
            return (Scored(trajectory=written, columns=labels),)
        if self._format == "messages":
            messages = messages_from(row["messages"])
            check_answer(messages)
            return (Scored(trajectory=self._checked(self._conversation(messages, task=task))),)
        written = self._continuation(row["prompt"], row["completion"], "completion", task=task)
        return (Scored(trajectory=self._checked(written)),)

    def _document(self, text: object, *, task: str) -> Trajectory:
        """A plain document: no prompt, and every token but the first is trained."""
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"a text of type {kind_of(text)}", expected="text that is not empty")
        return self._renderer.completion(
            "", text, producer=self._producer, task=task, rules=self._rules
        )

    def _pair(self, row: Row, task: str) -> tuple[Scored, ...]:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
            prompt, chosen, rejected = common_start(chosen, rejected, prompt)
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
        columns = _LABELS if self._how.wants == "labels" else _PREFERENCES
        return (
            Scored(trajectory=sides[0], columns=columns[+1]),
            Scored(trajectory=sides[1], columns=columns[-1]),
        )

    def _labelled(self, row: Row, task: str) -> Scored:
        label = row["label"]
        if not isinstance(label, bool):
            raise DataError(f"a label {label!r} of type {kind_of(label)}", expected="true or false")
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
            self.findings.asked(prompt)
            return self._renderer.completion(
                prompt, completion, producer=self._producer, task=task, rules=self._rules
            )
        if not (isinstance(prompt, list | tuple) and isinstance(completion, list | tuple)):
            raise DataError(
                f"prompt of type {kind_of(prompt)} and {column} of type {kind_of(completion)}",
                expected="text in both, or messages in both",
            )
        before, after = parsed(prompt, "prompt"), parsed(completion, column)
        check_answer(after, column)
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
        self.findings.turns = True
        for message in messages:
            if message.role is Role.USER:
                self.findings.asked(message.content)
        return self._renderer.conversation(
            messages,
            producer=self._producer,
            task=task,
            assistant_mask=self._how.assistant_mask,
            num_prompt=num_prompt,
            rules=self._rules,
        )

    def _checked(self, trajectory: Trajectory) -> Trajectory:
        if trajectory.prompt_length == 0:
            raise DataError(
                "nothing stands before the first trained token, so nothing can predict it",
                expected="a prompt of at least one token",
            )
        return trajectory

    def check_whole(self, groups: Sequence[Group]) -> None:
        """Checks of the whole file: it has rows, trainable tokens, and ended answers."""
        if not groups:
            long = len(self.findings.too_long)
            found = f"all {long} rows are longer than {self._context} tokens"
            if self.findings.bad:
                found = f"no row can be used; {'; '.join(self.findings.left_out())}"
            raise DataError(
                f"{self._how.path}: {found}",
                expected="rows that fit the context, in a format that the method reads",
                fix="mend the rows; where they are too long, shorten them or use a model with a "
                "longer context",
            )
        labels = {m.scalar(Column.LABEL) for group in groups for m in group.members}
        if len(labels) == 1 and self._how.wants == "labels":
            raise DataError(
                f"{self._how.path}: every row has the label {'true' if 1.0 in labels else 'false'}",
                expected="good answers and bad ones",
                fix="add rows of the other kind; to learn from good ones alone, use sft",
            )
        weights = [m.scalar(Column.WEIGHT) for group in groups for m in group.members]
        if all(weight == 0 for weight in weights):
            raise DataError(
                f"{self._how.path}: every row has the weight 0",
                expected="a row to learn from: at weight 0 there is nothing to learn",
                fix="check the column of the weights",
            )
        trained = [t.tokens[t.trainable] for t in (m.trajectory for g in groups for m in g.members)]
        how = self._how.assistant_mask
        if not any(len(tokens) for tokens in trained):
            raise DataError(
                f"{self._how.path}: no trainable token in {len(groups)} rows: the assistant "
                f"mask ({how}) is empty everywhere",
                expected="tokens of assistant turns under the mask",
                fix="check that the {% generation %} block of the template is around each "
                "answer, or set `assistant_mask: prefix`",
            )
        ends = np.array(sorted(self._renderer.end_tokens))
        if not any(np.isin(tokens, ends).any() for tokens in trained):
            raise DataError(
                f"{self._how.path}: no end-of-turn token ({ends.tolist()}) is trained in any row, "
                "so the learner would never learn to stop",
                expected="the token that ends a turn under the assistant mask",
                fix="move it inside the template's {% generation %} block, or name the template's "
                "end token as eos_token of the tokenizer or in the generation config",
            )


def _content_hash(row: Row) -> str:
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
