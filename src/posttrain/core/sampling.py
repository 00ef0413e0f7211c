"""Sampling options of a recipe."""

from __future__ import annotations

from posttrain.core.bounds import Decay, NonNegative, Rate, Whole
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Sampling

COLDEST = 1e-3
"""The lowest temperature: below it, logits of usual models leave the range of float16."""


class SamplingSpec(Config):
    """How a policy is sampled. The defaults sample its own distribution, without changes.

    A completion also ends after a token that completes one of the ``stop`` strings, which stays
    in its text.
    """

    temperature: NonNegative = 1.0
    top_k: Whole = 0
    top_p: Rate = 1.0
    min_p: Decay = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if 0 < self.temperature < COLDEST:
            raise ConfigError(
                f"temperature={self.temperature}",
                expected=f"0, which is greedy, or {COLDEST} or more: logits are divided by it",
            )
        if "" in self.stop:
            raise ConfigError(f"stop={list(self.stop)}", expected="texts, none of them empty")

    def with_seed(self, seed: int) -> Sampling:
        """The exact distribution of one request."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            stop=self.stop,
        )

    @property
    def is_truncated(self) -> bool:
        """True when ratios against the model's own distribution would be wrong."""
        return self.with_seed(0).is_truncated

    @property
    def is_plain(self) -> bool:
        """True when samples come from the policy's own distribution.

        Example:
            >>> SamplingSpec().is_plain, SamplingSpec(temperature=0.7).is_plain
            (True, False)
        """
        return self.temperature == 1 and not self.is_truncated
