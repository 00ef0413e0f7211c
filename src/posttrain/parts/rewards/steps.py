"""Where the steps of an answer end, in tokens."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.trajectory import Trajectory
from posttrain.protocols import Renderer

NO_STEP = -1.0
"""``STEP_LABEL`` where no labelled step ends."""


class Steps(Config):
    """Steps end with a delimiter, and the last one with the answer.

    ``delimiter`` is found in the decoded text, for any tokenization; with ``special`` it is one
    special token, which decoding would drop. Blank text between two delimiters is no step.
    """

    delimiter: str = "\n"
    special: bool = False

    def __post_init__(self) -> None:
        if not self.delimiter:
            raise ConfigError("steps with an empty delimiter", expected="at least one character")


def step_ends(renderer: Renderer, trajectory: Trajectory, steps: Steps) -> npt.NDArray[np.intp]:
    """Index in T of the last token of every step, in order; empty when nothing is trained.

    A step ends with the token that completes a delimiter, the last one with the last trained
    token. Blank text belongs to the step before it. Delimiters outside trained tokens are ignored.

    Example:
        >>> from posttrain.testing import CharRenderer, example_trajectory
        >>> answer = [*map(ord, "1+1=2\\n2*2=4"), 0]
        >>> t = example_trajectory(prompt=(63,), answer=answer)
        >>> step_ends(CharRenderer(), t, Steps()).tolist()
        [6, 12]
    """
    trainable = trajectory.trainable
    trained = np.flatnonzero(trainable)
    if not len(trained):
        return trained
    cut = trajectory.prompt_length
    tokens = trajectory.tokens[cut:]
    if steps.special:
        ends = _by_token(renderer, trajectory, steps.delimiter)
    else:
        texts = _text_ends(renderer.text(tokens), steps.delimiter)
        ends = [cut + _token_at(renderer, tokens, end) for end in texts]
    inner = [e for e in ends if trainable[e] and e < trained[-1]]
    return np.array([*sorted(set(inner)), int(trained[-1])], np.intp)


def _text_ends(text: str, delimiter: str) -> list[int]:
    """Characters up to the end of every step but the last.

    Example:
        >>> _text_ends("a\\n\\nb\\nc", "\\n"), _text_ends("a\\n", "\\n"), _text_ends("a", "\\n")
        ([2, 5], [], [])
    """
    ends, at, open_ = list[int](), 0, False
    while (found := text.find(delimiter, at)) >= 0:
        open_ = open_ or bool(text[at:found].strip())
        at = found + len(delimiter)
        if open_ and text[at:].strip():
            ends.append(at)
            open_ = False
    return ends


def _token_at(renderer: Renderer, tokens: npt.NDArray[np.int32], length: int) -> int:
    """Index of the token at which the decoded text first has ``length`` characters."""
    longer = range(1, len(tokens) + 1)
    return bisect_left(longer, length, key=lambda n: len(renderer.text(tokens[:n])))


def _by_token(renderer: Renderer, trajectory: Trajectory, delimiter: str) -> list[int]:
    """Positions of the special token with text before it, since the previous one, and after it."""
    cut, tokens = trajectory.prompt_length, trajectory.tokens
    marks = [i for i in range(cut, len(tokens)) if renderer.token_text(int(tokens[i])) == delimiter]
    ends, start = list[int](), cut
    between = np.setdiff1d(np.arange(len(tokens)), marks)  # the mark itself is no text of a step
    for mark in marks:
        before, after = (between >= start) & (between < mark), between > mark
        if all(renderer.text(tokens[between[side]]).strip() for side in (before, after)):
            ends.append(mark)
            start = mark
    return ends
