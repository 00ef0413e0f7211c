"""What a run did and said."""

from __future__ import annotations

from typing import Literal

import msgspec


class Result(msgspec.Struct, kw_only=True):
    """One run, from the outside.

    ``before`` are the steps of an earlier process, where a run is stopped and goes on.
    """

    end: Literal["finished", "error", "hung"]
    steps: int = 0
    before: int = 0
    words: str = ""  # of the error
    traceback: bool = False
    said: list[str] = []  # lines on the screen
    alarms: list[tuple[int, str]] = []  # step, words
    rewards: list[float] = []  # mean of every step
    first: dict[str, float] = {}  # metrics of the first step
    trained: list[str] = []  # trained tokens of the first rows as text, special tokens by name
    whole: list[list[int]] = []  # all token ids of the first rows
    ids: list[int] = []  # every token id that was trained on
    weights: str | None = None  # digest of the trained weights
    seconds: float = 0.0
