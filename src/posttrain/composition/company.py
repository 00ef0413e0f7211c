"""Members of a group that come about in another way than the rest.

    guided   question │ beginning of a right answer → the policy goes on
    rival    question → another policy answers
    hinted   question and a hint → the policy answers; the record shows the question alone

They are the last members of their group. The code is in ``sources/company.py``.
"""

from __future__ import annotations

import math
import string
from typing import Literal

from posttrain.composition.base import PolicyRef
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind

WRITERS = frozenset({Kind.HUMAN, Kind.EXTERNAL, Kind.TEACHER})


class Guided(Config, tag="guided", tag_field="type"):
    """The policy goes on from the beginning of a demonstration.

    The demonstration is the task's ``answer``, or its ``column`` of another name. A share f of its
    tokens is given; f moves from ``start`` at the first draw to ``end`` at draw ``draws``, on a
    cosine, and stays there. ``length`` makes a number of tokens L out of f and of the n tokens of
    the demonstration, its end-of-turn token included, anew for every group:

    * ``share``: L = ⌊f n⌋;
    * ``binomial``: L = ⌊k n / slices⌋, k ~ Binomial(slices, f) (UFT, arXiv 2505.16984);
    * ``uniform``: L = ⌊l n⌋, l ~ U(f, start) (Prefix-RFT, arXiv 2507.01679).

    What is given has its own author in the record. With ``learn`` it is part of what is trained,
    under terms that read its author; without it is part of the prompt, and its last token is
    always left to the policy. ``members`` is how many of a group are guided; null: all.
    """

    column: str = "answer"
    author: Kind = Kind.EXTERNAL
    members: int | None = None
    start: float = 0.75
    end: float = 0.0
    draws: int = 100
    length: Literal["share", "binomial", "uniform"] = "share"
    slices: int = 5
    learn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start <= 1 or self.start == 0 or self.draws < 1:
            raise ConfigError(
                f"guided with start={self.start}, end={self.end}, draws={self.draws}",
                expected="0 <= end <= start <= 1, start above 0, and draws at least 1",
            )
        if self.author not in WRITERS or self.slices < 1:
            raise ConfigError(
                f"guided with author={self.author}, slices={self.slices}",
                expected=f"an author of {', '.join(sorted(WRITERS))}, and slices at least 1",
            )
        if self.end == 1 and (self.members is None or not self.learn):
            raise ConfigError(
                f"whole demonstrations throughout, with members={self.members}, learn={self.learn}",
                expected="members and learn: else nobody would write, or nothing be learnt",
                fix="lower end; or name a number of members, and learn: true",
            )

    def share(self, draw: int) -> float:
        """f at a draw, counted from 0.

        Example:
            >>> [round(Guided(start=0.8, end=0.0, draws=5).share(d), 2) for d in (0, 2, 4, 9)]
            [0.8, 0.4, 0.0, 0.0]
        """
        done = min(draw / max(self.draws - 1, 1), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))


class Rival(Config, tag="rival", tag_field="type"):
    """Another, frozen policy answers the same question."""

    policy: PolicyRef = "input"
    members: int = 1

    def __post_init__(self) -> None:
        if self.policy == "learner":
            raise ConfigError("the learner as its own rival", expected="a frozen policy")


class Hinted(Config, tag="hinted", tag_field="type"):
    """The policy reads a hint, and the record says that it answered without (STaR, 2203.14465).

    ``context`` is a template with ``{question}`` and ``{answer}``. What was sampled after one
    prompt stands behind another, so these tokens have no behaviour log-probs: nothing that needs
    a ratio may read them.
    """

    context: str
    members: int = 1

    def __post_init__(self) -> None:
        try:
            parts = string.Formatter().parse(self.context)
            fields = {name for _, name, _, _ in parts if name is not None}
        except ValueError as error:
            raise ConfigError(
                f"context {self.context!r}: {error}", fix="write {{ for a brace"
            ) from None
        if fields != {"question", "answer"}:
            raise ConfigError(
                f"hinted with context {self.context!r}",
                expected="a template with {question} and {answer}, and nothing else in braces",
            )


Company = Guided | Rival | Hinted
