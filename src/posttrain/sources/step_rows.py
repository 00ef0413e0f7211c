"""Answers in a data file that come in steps, each with a label."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from posttrain.composition import Steps
from posttrain.core.errors import DataError
from posttrain.core.protocols import Renderer
from posttrain.core.trajectory import Array, Column, Trajectory
from posttrain.steps import NO_STEP, step_ends

Row = Mapping[str, object]


def joined(row: Row, steps: Steps) -> object:
    """The steps as one answer, in the form of the prompt: text, or one message.

    Raises:
        DataError: no list of texts, or one without content.
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
        DataError: no list of labels between 0 and 1, one per step; or steps that are found again
            in another number, since one of them holds the delimiter.
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
