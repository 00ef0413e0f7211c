"""A data file as a source: demonstrations, preferences or labelled answers.

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
from typing import ClassVar, Literal, final

import numpy as np
import numpy.typing as npt

from posttrain.chat.messages import messages_from
from posttrain.core.config import plain
from posttrain.core.errors import ConfigError, DataError
from posttrain.core.files import content_of, read_jsonl
from posttrain.core.provenance import Kind, Producer, Role
from posttrain.core.task import Message
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.parts.base import ANYONE, NONE, Columns, PlanFacts, Source
from posttrain.parts.registry import part
from posttrain.parts.rewards.steps import Steps
from posttrain.parts.sources.formats import (
    COLUMNS,
    Format,
    Row,
    Wants,
    check_answer,
    common_start,
    format_of,
    joined,
    kind_of,
    parsed,
    row_numbers,
    step_labels,
)
from posttrain.parts.tools import Tools
from posttrain.protocols import DataFile, PureStream, Renderer

_PREFERENCES = {
    +1: MappingProxyType({Column.PREFERENCE: np.asarray(1.0)}),
    -1: MappingProxyType({Column.PREFERENCE: np.asarray(-1.0)}),
}
_LABELS = {
    +1: MappingProxyType({Column.LABEL: np.asarray(1.0)}),
    -1: MappingProxyType({Column.LABEL: np.asarray(-1.0)}),
}


@part
class Dataset(Source):
    """Trajectories from a JSONL or Parquet file (off-policy).

    ``format`` is detected from the columns: text (plain documents, every token is trained),
    prompt/completion, messages, prompt/chosen/rejected; for methods on labelled answers
    prompt/completion/label with a true or false label (``unpaired``); and for process models
    prompt/completions/labels, an answer split into steps (``steps``).
    ``author`` and ``licence`` go into the ledger.
    """

    path: str
    format: Format | Literal["auto"] = "auto"
    author: Kind = Kind.EXTERNAL
    name: str | None = None  # default: the file name
    licence: str | None = None
    too_long: Literal["error", "skip"] = "error"
    assistant_mask: Literal["template", "prefix"] = "template"
    preference: bool = False  # set by pairwise methods; checked against the file
    unpaired: bool = False  # set by methods on labelled answers; a file of pairs works too
    reward: str | None = None  # the column with each answer's reward, for logged answers
    weight: str | None = None  # the column with each row's weight, 0 or more
    margin: str | None = None  # the column with each pair's margin, for reward models
    steps: Steps | None = None  # set by methods on labelled steps: how the file's steps are joined

    has_end: ClassVar[bool] = True
    in_words: ClassVar[str] = "data set: {path, …}"

    def __post_init__(self) -> None:
        if self.preference and self.unpaired:
            raise ConfigError(
                f"data set {self.path} with preference and unpaired",
                expected="one of them: a stage compares answers, or judges each by itself",
            )
        if (self.margin and not self.preference) or (
            self.steps and (self.preference or self.unpaired or self.reward or self.weight)
        ):
            raise ConfigError(
                f"data set {self.path} with margin={self.margin}, steps={self.steps}",
                expected="margins on pairs; labels of steps and nothing else beside them",
            )
        if (self.preference or self.unpaired) and (self.reward or self.weight):
            raise ConfigError(
                f"data set {self.path} with reward={self.reward}, weight={self.weight}, and of "
                "preferences",
                expected="rewards and weights on single answers: a preference has no number",
            )

    @property
    def number_columns(self) -> Mapping[Column, str | None]:
        """Names of the file's columns with a number for each row, by the column they fill."""
        return {
            Column.REWARD: self.reward,
            Column.WEIGHT: self.weight,
            Column.MARGIN: self.margin,
        }

    def provides_for(self, kind: Kind) -> Columns:
        """Preferences for a file of pairs, labels for one of labelled answers; named numbers."""
        if self.steps:
            return frozenset({Column.STEP_LABEL})
        if self.unpaired:
            return frozenset({Column.LABEL})
        if self.preference:
            margins = frozenset({Column.MARGIN}) if self.margin else NONE
            return frozenset({Column.PREFERENCE}) | margins
        return frozenset(c for c, name in self.number_columns.items() if name is not None)

    @property
    def writes(self) -> frozenset[Kind]:
        """Who authors the assistant turns."""
        return frozenset({self.author})

    @property
    def row_names(self) -> tuple[str, ...]:
        """The name, or the file's stem."""
        return (self.name or Path(self.path).stem,)

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The columns that the stage trains on, and the named numbers."""
        if self.wants == "steps":
            return ("prompt", "completions", "labels")
        if self.wants == "preferences":
            return ("prompt", "chosen", "rejected")
        if self.wants == "labels":
            return ("prompt", "completion", "label")
        numbers = [name for name in (self.reward, self.weight) if name is not None]
        return ("prompt", "completion", *numbers)

    @property
    def files(self) -> tuple[str, ...]:
        """The file."""
        return (self.path,)

    @property
    def origin(self) -> str:
        """The author of the file."""
        return f"{self.name or Path(self.path).name} ({self.author})"

    def identity(self, root: Path) -> dict[str, object]:
        """Its options, with the file's content in place of its path."""
        return {**plain(self), "path": content_of(self.path, root)}

    @property
    def wants(self) -> Wants:
        """The kind of supervision, which decides the formats that the stage can read."""
        if self.steps:
            return "steps"
        return "preferences" if self.preference else "labels" if self.unpaired else "answers"

    def open(self, tools: Tools, *, seed: int) -> DatasetRows:
        """The file, rendered for the learner and checked row by row.

        Raises:
            DataError: a row that cannot be used; names the file and the row.
        """
        return self.rows(
            root=tools.root, renderer=tools.renderer, context=tools.live.context, seed=seed
        )

    def rows(self, *, root: Path, renderer: Renderer, context: int, seed: int = 0) -> DatasetRows:
        """The file, rendered and checked, without loading the model."""
        return DatasetRows(self, root=root, renderer=renderer, context=context, seed=seed)

    def tokens(self, groups: float, facts: PlanFacts) -> tuple[float, float]:
        """Exact on average over epochs of the file."""
        rows = self.rows(root=facts.root, renderer=facts.renderer, context=facts.context)
        passes = groups / rows.num_groups
        return (rows.num_tokens - rows.num_trainable) * passes, rows.num_trainable * passes


@final
class DatasetRows(PureStream):
    """Groups from a JSONL or Parquet file. A demonstration is a group of one, a pair of two.

    Args:
        spec: the file and how to read it.
        root: the recipe's folder.
        renderer: of the model that will be trained.
        context: the model's context, in tokens.
        seed: of the order.

    Raises:
        ConfigError: this kind of author cannot have written a file.
        DataError: the file is malformed, empty, of another format than the stage reads, or has
            no trainable tokens; names the file and the row.
        ModelError: a file of conversations, and the model has no chat template.
    """

    def __init__(
        self, spec: Dataset, *, root: Path, renderer: Renderer, context: int, seed: int
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
        self._format = format_of(rows[0][1], named=spec.format, wants=spec.wants, path=self._path)
        self._groups = tuple(self._render(rows))
        self._skipped = len(rows) - len(self._groups)
        self._check_whole()

    @property
    def files(self) -> Sequence[DataFile]:
        """The file."""
        return (
            DataFile(
                name=self._name,
                producer=self._producer,
                digest=self._digest,
                licence=self._spec.licence,
                rows=len(self._groups),
                skipped=self._skipped,
            ),
        )

    @property
    def format(self) -> Format:
        """The format that was detected or named."""
        return self._format

    @property
    def num_groups(self) -> int:
        """Rows of the file without the skipped ones."""
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
        """A row as the learner sees it, trained tokens in ⟦ ⟧; a pair in two lines."""
        return "\n".join(self._renderer.show(m.trajectory) for m in self._groups[index].members)

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """Groups ``step * num_groups`` and following of endless shuffled epochs.

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
                if numbers := row_numbers(row, self._spec.number_columns):
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
            check_answer(messages)
            return (Scored(trajectory=self._checked(self._conversation(messages, task=task))),)
        written = self._continuation(row["prompt"], row["completion"], "completion", task=task)
        return (Scored(trajectory=self._checked(written)),)

    def _document(self, text: object, *, task: str) -> Trajectory:
        """A plain document: no prompt, and every token but the first is trained."""
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"a text of type {kind_of(text)}", expected="text that is not empty")
        return self._renderer.completion("", text, producer=self._producer, task=task)

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
        columns = _LABELS if self._spec.unpaired else _PREFERENCES
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
            return self._renderer.completion(prompt, completion, producer=self._producer, task=task)
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
        """Checks of the whole file: it has rows, trainable tokens, and ended answers."""
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
    """A permutation of the rows. It sorts raw counter-based random bits, which are stable across
    NumPy versions; ``Generator.permutation`` is not."""
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
    # A column that only other rows have is null in Parquet, and absent in JSONL.
    rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
    if not rows:
        raise DataError(f"{path} is empty", expected="at least one row")
    return list(enumerate(rows, start=1))


def _content_hash(row: Row) -> str:
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
