"""Regularisers of a policy.

    reference_kl ──▶ towards a reference
    entropy_bonus, adaptive_entropy_bonus ──▶ towards entropy
    log_ratio_penalty ──▶ towards the policy that sampled, at marked tokens

Shape legend: ``N`` trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.core.bounds import NonNegative, Positive
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, StageContext, Stats, TokenTerm, Values
from posttrain.parts.policy.ratio import log_ratio
from posttrain.parts.registry import part
from posttrain.parts.tensors import capped_exp

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch


@part
class ReferenceKL(TokenTerm):
    """KL(π ‖ π_ref) on the learner's own tokens, by one of three estimators.

    With u = log π − log π_ref and r = π / behaviour:

    * ``k3``: r·(e^{−u} + u − 1); value and gradient are those of the KL (arXiv 2512.02556);
    * ``k2``: sg(r)·u²/2; the gradient is that of the KL, the value is not;
    * ``k3_without_ratio``: e^{−u} + u − 1 as GRPO wrote it (arXiv 2402.03300); the value is the
      KL, the gradient that of KL(π_ref ‖ π), another divergence.

    k1 = u is not offered: as a loss its expected gradient is zero (survey section 5, trap 11).
    In the reward it is right: that is the ``kl_penalty`` signal.
    """

    estimator: Literal["k3", "k2", "k3_without_ratio"] = "k3"
    weight: NonNegative = 0.001
    where: tuple[Kind, ...] = (Kind.LEARNER,)

    formula: ClassVar[str] = "r (exp(-u) + u - 1), u = log pi/pi_ref"
    paper: ClassVar[str] = "2512.02556"
    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB})
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})
    reads: ClassVar[frozenset[Wanted]] = frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB})

    def check(self, at: StageContext) -> None:
        """Samples must be from the policy's own distribution, at temperature 1."""
        for source in at.drawn:
            if source.sampled is not None and source.sampled.temperature != 1:
                raise at.refuse(
                    f"reference_kl on samples at temperature {source.sampled.temperature}",
                    expected="temperature 1: the estimate is over samples of the policy itself, "
                    "and at another temperature its gradient is not that of the KL",
                    fix="sample at temperature 1, or drop kl_weight",
                )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] an estimate of KL(π ‖ π_ref) at samples of the behaviour policy."""
        u_N = stats[Stat.LOGPROB] - batch.columns[Column.REFERENCE_LOGPROB]
        # exp(-u) overflows when the reference is much more confident; 20 nats is e^20.
        k3_N = (-u_N).clamp(max=20).exp() + u_N - 1
        ratio_N = capped_exp(log_ratio(None, stats, batch))
        if self.estimator == "k3_without_ratio":
            loss_N = k3_N
        elif self.estimator == "k2":
            loss_N = ratio_N.detach() * u_N.square() / 2
        else:
            loss_N = ratio_N * k3_N
        return Values(loss_N, {"kl": k3_N.detach()})


@part
class EntropyBonus(TokenTerm):
    """−H(π) of the next token, at the learner's own tokens (arXiv 1602.01783).

    π is taken at the temperature that the token was sampled at, as in the ratio beside it.
    """

    weight: NonNegative = 0.01
    where: tuple[Kind, ...] = (Kind.LEARNER,)

    formula: ClassVar[str] = "-H(pi)"
    paper: ClassVar[str] = "1602.01783"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})
    reads: ClassVar[frozenset[Wanted]] = frozenset({Stat.ENTROPY})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −H(π)."""
        return Values(-stats[Stat.ENTROPY])


@part
class AdaptiveEntropyBonus(TokenTerm):
    """−c H(π), c adapted to keep the entropy at ``target`` (Skywork-OR1, arXiv 2505.22312).

    c starts at ``initial``. After each update with mean entropy H, c grows by ``step`` where
    H < ``target`` and shrinks by it elsewhere, never below 0 or above ``cap``. The bonus is active
    only while the last measured H is at most ``target``, and at the first update; the paper
    compares the H of the same update. c and H are saved with the learner.

    Entropies are in nats per token, at the sampling temperature. Choose the target a little below
    the policy's initial entropy: one that cannot be reached drives c to its cap. The defaults are
    those of the authors' scripts.
    """

    target: Positive
    initial: NonNegative = 0.0
    step: Positive = 1e-4
    cap: NonNegative = 0.005
    weight: NonNegative = 1.0  # of c H, for a schedule; c itself is adapted
    where: tuple[Kind, ...] = (Kind.LEARNER,)

    formula: ClassVar[str] = "-c H [H <= target]; c + step where H < target, else c - step"
    paper: ClassVar[str] = "2505.22312"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})
    reads: ClassVar[frozenset[Wanted]] = frozenset({Stat.ENTROPY})

    def __post_init__(self) -> None:
        if self.initial > self.cap:
            raise ConfigError(
                f"adaptive_entropy_bonus with initial={self.initial}, cap={self.cap}",
                expected="initial between 0 and the cap",
            )

    @property
    def moves(self) -> bool:
        """Always True: the coefficient follows the entropy."""
        return True

    def factor(self, memory: Mapping[str, float]) -> float:
        """The active coefficient: 0 while the last measured entropy is above the target.

        Example:
            >>> bonus = AdaptiveEntropyBonus(target=0.5)
            >>> low, high = ({"coefficient": 0.002, "entropy": h} for h in (0.4, 0.6))
            >>> bonus.factor({}), bonus.factor(low), bonus.factor(high)
            (0.0, 0.002, 0.0)
        """
        entropy = memory.get("entropy")
        acts = entropy is None or entropy <= self.target
        return memory.get("coefficient", self.initial) if acts else 0.0

    def remember(
        self, memory: Mapping[str, float], metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        """The coefficient after an update, and that update's entropy.

        Example:
            >>> bonus = AdaptiveEntropyBonus(target=0.5)
            >>> round(bonus.remember({"coefficient": 0.001}, {"entropy": 0.4})["coefficient"], 5)
            0.0011
            >>> bonus.remember({"coefficient": 0.005}, {"entropy": 0.4})["coefficient"]
            0.005
        """
        entropy = metrics.get("entropy")
        if entropy is None:
            return memory
        change = self.step if entropy < self.target else -self.step
        coefficient = memory.get("coefficient", self.initial) + change
        coefficient = min(max(coefficient, 0.0), self.cap)
        return {"coefficient": coefficient, "entropy": entropy}

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −H(π), before its coefficient."""
        return Values(-stats[Stat.ENTROPY], {"entropy": stats[Stat.ENTROPY].detach()})


@part
class LogRatioPenalty(TokenTerm):
    """|log r| at marked tokens, r = π / behaviour (KL-Cov, arXiv 2505.22617).

    Zero, with zero gradient, at the first update of a draw, where r = 1; active from the second.
    Unmarked tokens count as zeros in the mean.
    """

    where: tuple[Kind, ...] = (Kind.LEARNER,)

    formula: ClassVar[str] = "|log r| at marked tokens"
    paper: ClassVar[str] = "2505.22617"
    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.MARK})
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})
    reads: ClassVar[frozenset[Wanted]] = frozenset({Stat.SAMPLED_LOGPROB})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] |log r| where marked, else 0."""
        mark_N = batch.columns[Column.MARK]
        return Values(mark_N * log_ratio(None, stats, batch).abs(), {"marked": mark_N})
