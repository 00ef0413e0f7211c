"""How policies are measured: the part of a recipe that is about measuring."""

from __future__ import annotations

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec


class Measure(Config):
    """How every policy is measured: the same prompts, samples, seeds and decoding for all.

    ``epsilon`` is the success probability below which an answer counts as out of reach; null
    takes the smallest value that ``samples`` can decide, 1 − (1 − confidence)^(1/samples).
    """

    tasks: tuple[str, ...] = ()  # empty: every task set
    samples: int = 64
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    confidence: float = 0.95
    epsilon: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2 or self.max_new_tokens < 1 or not 0.5 < self.confidence < 1:
            raise ConfigError(
                f"measure with samples={self.samples}, max_new_tokens={self.max_new_tokens}, "
                f"confidence={self.confidence}",
                expected="samples >= 2, max_new_tokens >= 1 and 0.5 < confidence < 1",
            )
        if self.epsilon is not None and self.epsilon < self.decidable:
            raise ConfigError(
                f"epsilon={self.epsilon} with {self.samples} samples per prompt",
                expected=f"at least {self.decidable:.4f}: no failure count could show less",
                fix="raise samples, or raise epsilon",
            )

    @property
    def decidable(self) -> float:
        """The smallest ε for which 0 successes prove "out of reach"."""
        return float(1 - (1 - self.confidence) ** (1 / self.samples))

    @property
    def threshold(self) -> float:
        """The ε in force."""
        return self.decidable if self.epsilon is None else self.epsilon
