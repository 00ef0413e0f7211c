"""How policies are measured: the ``measure`` section of a recipe."""

from __future__ import annotations

from posttrain.core.bounds import Inner, Seed, Size, Tokens
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec


class Measure(Config):
    """How every policy is measured: the same prompts, samples, seeds and decoding for all.

    ``epsilon`` is the success probability below which a prompt counts as out of reach; null is
    the smallest value that ``samples`` can decide, 1 − (1 − confidence)^(1/samples).
    """

    tasks: tuple[str, ...] = ()  # empty: every task set
    samples: Size = 64
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    confidence: Inner = 0.95
    epsilon: Inner | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.samples < 2 or self.confidence <= 0.5:
            raise ConfigError(
                f"measure with samples={self.samples}, confidence={self.confidence}",
                expected="samples >= 2 and 0.5 < confidence < 1",
            )
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"measure.tasks: {list(self.tasks)}", expected="each task set once")
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
        """The ε in use."""
        return self.decidable if self.epsilon is None else self.epsilon
