"""A reference that follows the learner: a second set of weights that the learner keeps."""

from __future__ import annotations

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError

MOVING = "moving"
"""The policy reference under which signals and sources find it."""


class MovingReference(Config):
    """Weights φ that start as the stage's input and follow the learner's θ.

    φ ← (1 − ``rate``) φ + ``rate`` θ, after every ``every`` optimiser steps. Rate 1 is a copy.
    Signals and sources refer to it as policy ``moving``. With adapters it is their factors that
    are averaged, not their product, which is the same only for a copy. It is kept in float32 and
    saved with the learner, so a resumed stage goes on with the very same φ.

    Known as a moving reference (TR-DPO, arXiv 2404.09656: rate 0.6 every 512 steps, or a copy),
    and as a mean teacher (every step, small rates).

    Example:
        >>> MovingReference(every=512, rate=0.6).due(1024), MovingReference(every=512).due(1)
        (True, False)
    """

    every: int = 1
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.rate <= 1:
            raise ConfigError(
                f"a moving reference with every={self.every}, rate={self.rate}",
                expected="every at least 1, and 0 < rate <= 1: at rate 0 it would never move",
                fix="for a reference that stays, name the policy `input`",
            )

    def due(self, step: int) -> bool:
        """True when it moves after the optimiser step of this number, counted from 1."""
        return step % self.every == 0
