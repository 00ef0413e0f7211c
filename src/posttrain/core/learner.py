"""Options of a learner: optimiser, adapters, moving reference and scalar head."""

from __future__ import annotations

from typing import Literal

from posttrain.core.bounds import Count, Decay, NonNegative, Positive, Share, Size, Whole
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError

MOVING = "moving"
"""The name by which signals and sources refer to the moving reference."""


class MovingReference(Config):
    """Weights φ that start as the stage's input and follow the learner's θ.

    φ ← (1 − ``rate``) φ + ``rate`` θ, after every ``every`` optimiser steps. Rate 1 is a copy.
    Signals and sources refer to it as policy ``moving``. With adapters, their factors are
    averaged and not their product; the two are equal only for a copy. φ is float32 and is saved
    in the learner's checkpoint, so a resumed stage continues with the same φ.

    Known as a moving reference (TR-DPO, arXiv 2404.09656: rate 0.6 every 512 steps, or a copy),
    and as a mean teacher (every step, small rates).

    Example:
        >>> MovingReference(every=512, rate=0.6).due(1024), MovingReference(every=512).due(1)
        (True, False)
    """

    every: Count = 1
    rate: Share = 1.0

    def __post_init__(self) -> None:
        if self.rate == 0:
            raise ConfigError(
                "a moving reference with rate=0",
                expected="above 0: at rate 0 it would never move",
                fix="for a reference that stays, name the policy `input`",
            )

    def due(self, step: int) -> bool:
        """True when it is updated after the optimiser step of this number, counted from 1."""
        return step % self.every == 0


class ScalarHead(Config):
    """A linear map from a decoder's final hidden state to one number.

    ``trunk: shared`` reads the hidden states of the model being trained: a reward model, or a
    critic whose loss also updates the policy's weights. ``trunk: separate`` is a second decoder
    that the learner trains beside the policy, so that the value loss leaves the policy unchanged.

    ``start`` refers to the policy that a separate trunk is copied from, or from its critic if it
    has one. The head starts from the named model's head, or at zero if it has none. ``lr`` is the
    learning rate of a separate trunk and its head; null for the stage's.
    """

    trunk: Literal["shared", "separate"] = "separate"
    start: str = "input"
    lr: NonNegative | None = None

    def __post_init__(self) -> None:
        if self.start in ("learner", MOVING):
            raise ConfigError(
                f"scalar_head with start={self.start}", expected="a model that stands still"
            )
        if self.lr is not None and self.trunk == "shared":
            raise ConfigError(
                f"scalar_head with trunk={self.trunk}, lr={self.lr}",
                expected="lr only for a separate trunk: a shared one has one rate",
                fix="drop lr, or use trunk: separate",
            )


class Optimizer(Config):
    """AdamW and its schedule."""

    lr: NonNegative = 1e-5
    weight_decay: NonNegative = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    warmup_steps: Whole = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: Positive = 1.0


class Lora(Config):
    """Low-rank adapters through peft, merged into the weights when the stage ends."""

    rank: Size = 16
    alpha: Count = 32
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ConfigError(
                f"lora with target_modules={self.target_modules!r}", expected="at least one module"
            )
