"""What all specifications share."""

from __future__ import annotations

import math
from typing import Literal

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column

ANYONE = frozenset(Kind) - {Kind.TEMPLATE, Kind.ENVIRONMENT}
"""Every kind of producer that authors assistant turns."""

PolicyRef = str
"""``learner``; ``input`` (the policy the stage started from); ``base``; an earlier stage's name;
``moving`` (the composition's reference that follows the learner); or
``path:<folder or hub id>``."""

Aggregate = Literal["token_mean", "sequence_mean", "sequence_sum"]
"""``token_mean``: every token counts alike. ``sequence_mean``: every sequence counts alike,
its tokens are averaged first. ``sequence_sum``: a sequence's tokens are summed and the sums
averaged, so a token's weight does not depend on any length; this is the gradient of an expected
reward, and with the weight 1 / (longest answer) it is Dr.GRPO's division by a constant. The choice
changes the objective (survey section 5, trap 3)."""


class Limit(Config):
    """Which of the units that a term may read it does read; ``where`` limits by author.

    ``entropy_share`` keeps, *in every sequence*, the ⌈share · n⌉ of its n readable tokens at which
    the policy is least sure. It costs nothing, since the choice depends on nothing outside of the
    sequence. The price: a sequence that is sure throughout still keeps its share.

    ``marked`` keeps tokens that a signal marked: ``mark_entropy`` compares those of a whole draw,
    as papers do (arXiv 2506.01939), in a pass over the draw before its first update.

    ``rewards: positive`` keeps sequences with a reward above 0, ``negative`` all others (a
    verifier's 0 is negative).

    ``preference`` keeps the chosen, or the rejected, answers of pairs: cross-entropy on chosen
    answers is what several methods add to a loss on pairs.
    """

    entropy_share: float | None = None
    marked: bool = False
    rewards: Literal["any", "positive", "negative"] = "any"
    preference: Literal["any", "chosen", "rejected"] = "any"

    def __post_init__(self) -> None:
        if self.entropy_share is not None and not 0 < self.entropy_share < 1:
            raise ConfigError(
                f"limit with entropy_share={self.entropy_share}",
                expected="above 0 and below 1; null reads every token",
            )

    @property
    def needs(self) -> frozenset[Column]:
        """Columns that the limit itself reads."""
        by_reward = frozenset() if self.rewards == "any" else frozenset({Column.REWARD})
        by_pair = frozenset() if self.preference == "any" else frozenset({Column.PREFERENCE})
        return by_reward | by_pair | (frozenset({Column.MARK}) if self.marked else frozenset())


class WeightSchedule(Config):
    """A term's weight moves from ``weight`` at the first update to ``end`` at the last one."""

    end: float
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if not math.isfinite(self.end):
            raise ConfigError(f"weight_schedule with end={self.end}", expected="a finite number")

    def at(self, weight: float, *, progress: float) -> float:
        """The weight when ``progress`` of the stage, from 0 to 1, is done.

        Example:
            >>> [WeightSchedule(end=0.0).at(2.0, progress=p) for p in (0.0, 0.5, 1.0)]
            [2.0, 1.0, 0.0]
            >>> round(WeightSchedule(end=0.0, shape="cosine").at(2.0, progress=0.25), 3)
            1.707
        """
        if self.shape == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return (1 - progress) * weight + progress * self.end


class Term(Config):
    """The options that every term has beside its own: what it reads, and how its weight moves."""

    limit: Limit = Limit()
    weight_schedule: WeightSchedule | None = None  # null: constant
