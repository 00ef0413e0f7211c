"""Formats of the rows of a data file, with their numbers and steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from posttrain.chat.messages import messages_from
from posttrain.core.bounds import MOST
from posttrain.core.errors import DataError
from posttrain.core.provenance import Role
from posttrain.core.rows import Row
from posttrain.core.task import Message
from posttrain.core.trajectory import Array, Column, Trajectory
from posttrain.parts.rewards.steps import NO_STEP, Steps, step_ends
from posttrain.protocols import Renderer

Format = Literal["text", "completion", "messages", "preference", "unpaired", "steps"]
"""Formats of rows."""

Wants = Literal["answers", "preferences", "labels", "steps"]
"""The supervision of a stage: demonstrations, pairs, labelled answers, or labelled steps."""

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

TELLING = frozenset(
    {"tools", "functions", "images", "image", "videos", "video", "audio", "audios", "documents"}
    | {"chat_template_kwargs", "system", "system_prompt", "input", "history"}
)
"""Columns by which the field gives a model more to read than the messages."""

EMPTY: tuple[object, ...] = (None, "", [], {})
"""Values that say nothing."""

_JUDGEMENTS = frozenset(
    {"true", "false", "yes", "no", "0", "1", "good", "bad", "correct", "incorrect", "chosen"}
    | {"rejected", "right", "wrong", "positive", "negative", "desirable", "undesirable"}
)

KNOWN_FORMATS = (
    "text, prompt + completion, messages, or (for preference methods) prompt + chosen + rejected "
    "or prompt + completion + label"
)

READABLE: Mapping[Wants, frozenset[Format]] = MappingProxyType(
    {
        "answers": frozenset({"text", "completion", "messages"}),
        "preferences": frozenset({"preference"}),
        "labels": frozenset({"unpaired", "preference"}),  # pairs are labelled answers too
        "steps": frozenset({"steps"}),
    }
)
"""The formats that a stage can read."""


def format_of(first: Row, *, named: Format | Literal["auto"], wants: Wants, path: object) -> Format:
    """The format of a file from its first row, checked against the stage's supervision.

    Args:
        first: the first row.
        named: the format that the recipe names, or ``auto``.
        wants: the supervision of the stage.
        path: of the file, for the message.

    Raises:
        DataError: no format fits, or one that the stage cannot read.

    Example:
        >>> format_of({"prompt": "a", "completion": "b"}, named="auto", wants="answers", path="f")
        'completion'
    """
    fitting: list[Format] = [f for f, needed in COLUMNS.items() if needed <= set(first)]
    place = f"{path}: columns {sorted(first)}"
    if named != "auto":
        fitting = [f for f in fitting if f == named]
        if not fitting:
            raise DataError(
                f"{place} with `format: {named}`",
                expected=f"the columns {sorted(COLUMNS[named])}",
                fix="name the format of the file, or leave `format` out",
            )
    if not fitting:
        raise DataError(place, expected=KNOWN_FORMATS, fix="rename the columns")
    if wants == "answers" and named == "auto" and is_judgement(first.get("label")):
        raise judged(place)
    usable = [f for f in fitting if f in READABLE[wants]]
    if not usable:
        raise _misfit(wants, fitting, place=place)
    if len(usable) > 1:
        raise DataError(
            f"{place} fit more than one format: {', '.join(usable)}",
            fix=f"set `format` to one of them: {', '.join(usable)}",
        )
    return usable[0]


def unread_columns(
    rows: Iterable[tuple[int, Row]],
    form: Format,
    *,
    wants: Wants,
    named: Format | Literal["auto"],
    numbers: Iterable[str],
    path: object,
) -> tuple[str, ...]:
    """Columns with values that the stage does not read, in alphabetical order.

    Args:
        rows: the rows, with their numbers.
        form: the format that is read.
        wants: the supervision of the stage.
        named: the format that the recipe names, or ``auto``.
        numbers: columns of numbers that the recipe names.
        path: of the file, for the message.

    Raises:
        DataError: a column without which a row means something else: tools, images, or labels
            that say which answers are bad.
    """
    read = COLUMNS[form] | {"prompt"} | set(numbers)
    unread: set[str] = set()
    for number, row in rows:
        others = {k for k, v in row.items() if k not in read and v not in EMPTY}
        if telling := sorted(others & TELLING):
            raise DataError(
                f"{path}, row {number}: a value in {', '.join(telling)}, which is not read: the "
                "answers would be trained as if it were not there",
                expected="columns that the stage reads",
                fix="write what it says into the messages, or set "
                f"`ignore: [{', '.join(telling)}]` on the data set to train without it",
            )
        if wants == "answers" and named == "auto" and is_judgement(row.get("label")):
            raise judged(f"{path}, row {number}")
        unread |= others
    return tuple(sorted(unread))


def is_judgement(label: object) -> bool:
    """Whether a value says that an answer is good or bad: true or false, or 0 or 1.

    Example:
        >>> is_judgement(0), is_judgement("Bad"), is_judgement("geometry"), is_judgement(None)
        (True, True, False, False)
    """
    if isinstance(label, str):
        return label.strip().lower() in _JUDGEMENTS
    return isinstance(label, bool | int | float)


def judged(place: str) -> DataError:
    """The error of labelled answers as demonstrations: bad ones would be imitated."""
    return DataError(
        f"{place} with a label that is true or false, or 0 or 1, and the stage learns from "
        "demonstrations",
        expected="answers that are all worth imitating",
        fix="use a method that learns from labelled answers (kto, bco), or set "
        "`format: completion` (or messages) to learn from every row whatever its label",
    )


def _misfit(wants: Wants, fitting: Sequence[Format], *, place: str) -> DataError:
    if wants in ("preferences", "labels"):
        pairs = "prompt + chosen + rejected"
        labelled = "unpaired" in fitting
        return DataError(
            f"{place} are {'labelled answers' if labelled else 'demonstrations'}, and the stage "
            f"learns from {'answers judged one by one' if wants == 'labels' else wants}",
            expected=pairs
            if wants == "preferences"
            else f"prompt + completion + label, or {pairs}",
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


def common_start(
    chosen: list[object], rejected: list[object], prompt: object
) -> tuple[list[object], list[object], list[object]]:
    """Split two whole conversations into their common prefix and the two answers."""
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


def parsed(value: object, column: str) -> tuple[Message, ...]:
    """The messages in a column of a row; an error names the column."""
    try:
        return messages_from(value)
    except DataError as error:
        raise DataError(
            f"{column}: {error.found}", expected=error.expected, fix=error.fix
        ) from error


def check_answer(messages: Sequence[Message], column: str = "messages") -> None:
    """At least one assistant turn, and none of them empty."""
    answers = [m.content for m in messages if m.role is Role.ASSISTANT]
    if not answers:
        raise DataError(f"{column} without an assistant turn", expected="an answer to learn from")
    if not all(answer.strip() for answer in answers):
        raise DataError(f"an empty assistant turn in {column}", expected="text to learn from")


def row_numbers(
    row: Row, names: Mapping[Column, str | None]
) -> Mapping[Column, npt.NDArray[np.float64]]:
    """The row's numbers, by the names of their columns; a name that is null has none.

    Raises:
        DataError: a missing or unusable number.
    """
    out: dict[Column, npt.NDArray[np.float64]] = {}
    for column, name in names.items():
        if name is None:
            continue
        value = row.get(name)
        number = value if isinstance(value, int | float) and value is not True else None
        if number is None or value is False or not -MOST <= number <= MOST:  # NaN: in no range
            raise DataError(
                f"{column} {name}={value!r:.60}",
                expected=f"a finite number in every row, of at most {MOST:g}",
            )
        if column is Column.WEIGHT and number < 0:
            raise DataError(
                f"{column} {name}={value!r}",
                expected="0 or more: a negative weight would push the answer away without bound",
            )
        if column is Column.MARGIN and number < 0:
            raise DataError(f"{column} {name}={value!r}", expected="0 or more")
        out[column] = np.asarray(float(number))
    return out


def joined(row: Row, steps: Steps) -> object:
    """The steps as one answer, in the form of the prompt: text, or one message.

    Raises:
        DataError: not a list of texts, or an empty text.
    """
    parts = row["completions"]
    if not isinstance(parts, list) or not parts or not all(_is_step(p) for p in parts):
        raise DataError(f"completions {parts!r:.60}", expected="a list of texts, none empty")
    text = steps.delimiter.join(parts)
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


def step_labels(
    row: Row, trajectory: Trajectory, *, steps: Steps, renderer: Renderer
) -> Mapping[Column, Array]:
    """``STEP_LABEL`` [T] from a row's labels.

    Raises:
        DataError: not a list of labels between 0 and 1, one per step; or a step contains the
            delimiter, so that the rendered answer has another number of steps.
    """
    labels, parts = row["labels"], row["completions"]
    assert isinstance(parts, list)
    if not isinstance(labels, list) or not all(_is_label(v) for v in labels):
        raise DataError(f"labels {labels!r:.60}", expected="true, false or numbers from 0 to 1")
    if len(labels) != len(parts):
        raise DataError(f"{len(labels)} labels of {len(parts)} steps", expected="one per step")
    ends = step_ends(renderer, trajectory, steps)
    if len(ends) != len(parts):
        raise DataError(
            f"{len(parts)} steps, of which {len(ends)} are found in the joined text",
            expected=f"steps without the delimiter {steps.delimiter!r} in them",
            fix="set `steps: {delimiter: ...}` of the data set to something they do not hold",
        )
    column = np.full(len(trajectory), NO_STEP)
    column[ends] = [float(v) for v in labels]
    return {Column.STEP_LABEL: column}


def _is_step(part: object) -> bool:
    return isinstance(part, str) and bool(part.strip())


def _is_label(value: object) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1


def kind_of(value: object) -> str:
    """The type of a row's value, in words."""
    return "nothing" if value is None else type(value).__name__
