"""Terms on single answers: likelihoods of what somebody wrote.

The code behind a term is in ``objectives/supervised.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import ANYONE, Aggregate, Term
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column


class CrossEntropy(Term, tag="cross_entropy", tag_field="type"):
    """Negative log-likelihood of the written tokens: −log π(y_t)."""

    weight: float = 1.0
    where: tuple[Kind, ...] = ()  # empty: every author
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = ANYONE


class WeightedCrossEntropy(Term, tag="weighted_cross_entropy", tag_field="type"):
    """−w log π(y_t), w of the whole answer: a column of the data set, or its reward.

    With rewards this is weighted behaviour cloning, also called reward-weighted regression. The
    sum is divided by the number of tokens, not by the weights: doubling every weight doubles the
    loss. A negative reward pushes without bound; ``limit: {rewards: positive}`` leaves it out.
    """

    by: Literal["weight", "reward"]
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    @property
    def column(self) -> Column:
        """Where w comes from."""
        return Column.WEIGHT if self.by == "weight" else Column.REWARD

    @property
    def needs(self) -> frozenset[Column]:
        """The column of weights."""
        return frozenset({self.column})


class DynamicCrossEntropy(Term, tag="dynamic_cross_entropy", tag_field="type"):
    """−sg(π(y_t)) log π(y_t): DFT (arXiv 2508.05629), sg the stop-gradient.

    Its gradient is −∇π(y_t): that of cross-entropy without the factor 1 / π(y_t), which makes
    unlikely tokens dominate.
    """

    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = ANYONE


class BalancedCrossEntropy(Term, tag="balanced_cross_entropy", tag_field="type"):
    """−sg(p (1 − p)) log p, p = π(y_t): CHORD-φ (arXiv 2508.11408).

    The weight is largest at p = ½ and 0 at both ends: neither what the policy already writes nor
    what is far from it is pushed.
    """

    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = ANYONE


class ProbabilityLoss(Term, tag="probability_loss", tag_field="type"):
    """(1 − π(y_t)^α) / α where π(y_t) ≥ ``at_least``, else 0 (arXiv 2510.00526).

    α → 0 is cross-entropy, for weak models; α = 1 is 1 − π, with the gradient of DFT, and larger
    α trust the model still more. The threshold is a constant: no gradient flows through it, and
    tokens below it still count in the mean.
    """

    alpha: float = 1.0
    at_least: float = 0.0
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        if self.alpha < 0 or not 0 <= self.at_least < 1:
            raise ConfigError(
                f"alpha={self.alpha}, at_least={self.at_least}",
                expected="alpha >= 0 and 0 <= at_least < 1",
            )
        if self.alpha == self.at_least == 0:
            raise ConfigError(
                "alpha=0 without a threshold, which is plain cross-entropy",
                expected="alpha > 0, or at_least > 0",
                fix="use cross_entropy",
            )


class ProximalCrossEntropy(Term, tag="proximal_cross_entropy", tag_field="type"):
    """−min(r, 1 + ε), r = π(y_t) / π_old(y_t): PSFT (arXiv 2508.17784).

    π_old is the learner as it was when the demonstrations were drawn, so r leaves 1 only with
    ``updates_per_draw`` above 1; at r = 1 the gradient is that of cross-entropy. The paper clips
    on both sides, as PPO does; with its constant advantage of 1 the lower side never binds, and is
    no option here.
    """

    clip_high: float = 0.28
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.TRAINER_LOGPROB})
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        if self.clip_high <= 0:
            raise ConfigError(f"clip_high={self.clip_high}", expected="above 0")


SupervisedTerm = (
    CrossEntropy
    | WeightedCrossEntropy
    | DynamicCrossEntropy
    | BalancedCrossEntropy
    | ProbabilityLoss
    | ProximalCrossEntropy
)
