"""Terms that hold a policy back: towards a reference, towards entropy, towards where it was.

The code behind a term is in ``objectives/policy_regularisers.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import Aggregate, Term
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column


class ReferenceKL(Term, tag="reference_kl", tag_field="type"):
    """KL(π ‖ π_ref) on the learner's own tokens, with u = log π − log π_ref, r = π / behaviour.

    * ``k3``: r·(e^{−u} + u − 1); value and gradient are those of the KL (arXiv 2512.02556);
    * ``k2``: sg(r)·u²/2; the gradient is that of the KL, the value is not;
    * ``k3_without_ratio``: e^{−u} + u − 1 as GRPO wrote it (arXiv 2402.03300); the value is the
      KL, the gradient that of KL(π_ref ‖ π), another divergence.

    k1 = u is not offered: as a loss its expected gradient is zero (survey section 5, trap 11).
    In the reward it is right: that is the ``kl_penalty`` signal.
    """

    estimator: Literal["k3", "k2", "k3_without_ratio"] = "k3"
    aggregate: Aggregate = "token_mean"
    weight: float = 0.001
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset(
        {Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB}
    )
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


class EntropyBonus(Term, tag="entropy_bonus", tag_field="type"):
    """−H(π) of the next token, at the learner's own tokens (arXiv 1602.01783)."""

    aggregate: Aggregate = "token_mean"
    weight: float = 0.01
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


class AdaptiveEntropyBonus(Term, tag="adaptive_entropy_bonus", tag_field="type"):
    """−c H(π), c moving so that the entropy stays at ``target`` (Skywork-OR1, arXiv 2505.22312).

    c starts at ``initial``. After each update with mean entropy H, c grows by ``step`` where
    H < ``target`` and shrinks by it elsewhere, never below 0. The bonus acts only while the last H
    measured was at most ``target``; the paper compares the H of the same update. The first update
    has none to compare with, and acts. c and H are kept with the learner and saved with it.

    Entropies are in nats per token. Choose the target a little below that of the policy at the
    start: a bonus that can never be satisfied grows without end.
    """

    target: float
    initial: float = 0.01
    step: float = 0.005
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0  # of c H, for a schedule; c itself moves as told
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        if self.target <= 0 or self.initial < 0 or self.step <= 0:
            raise ConfigError(
                f"adaptive_entropy_bonus with target={self.target}, initial={self.initial}, "
                f"step={self.step}",
                expected="target and step above 0, initial 0 or more",
            )

    def moved(self, coefficient: float, *, entropy: float) -> float:
        """c after an update.

        Example:
            >>> bonus = AdaptiveEntropyBonus(target=0.5)
            >>> round(bonus.moved(0.01, entropy=0.4), 3), bonus.moved(0.002, entropy=0.6)
            (0.015, 0.0)
        """
        change = self.step if entropy < self.target else -self.step
        return max(coefficient + change, 0.0)

    def acts(self, coefficient: float, *, entropy: float | None) -> float:
        """The coefficient in force, given the entropy measured last."""
        return coefficient if entropy is None or entropy <= self.target else 0.0


class LogRatioPenalty(Term, tag="log_ratio_penalty", tag_field="type"):
    """|log r| at marked tokens, r = π / behaviour (KL-Cov, arXiv 2505.22617).

    Zero, with zero gradient, until the policy has moved: it acts from the second update on a
    draw. Unmarked tokens count as zeros in the mean.
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.MARK})
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


PolicyRegulariser = ReferenceKL | EntropyBonus | AdaptiveEntropyBonus | LogRatioPenalty
