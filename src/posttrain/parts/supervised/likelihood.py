"""Losses on single answers: likelihoods of what somebody wrote.

    p = π(y_t) ──▶ −w log p, with w: 1, of the row, sg(p), sg(p (1 − p))
              ──▶ (1 − p^α) / α;   −min(p / p_old, 1 + ε)

Each is a term. ``dft``, ``probability_sft`` and ``psft`` are methods by themselves too, on a file
of demonstrations. Shape legend: ``N`` trained tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.core.bounds import Decay, NonNegative, Positive
from posttrain.core.errors import ConfigError
from posttrain.core.lazy import torch
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, PolicyRef, Signal, Stats, TokenTerm, Values
from posttrain.parts.logprobs import OwnLogprobs
from posttrain.parts.registry import part
from posttrain.parts.supervised.shapes import OnDemonstrations
from posttrain.parts.tensors import capped_exp

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch


@part
class CrossEntropy(TokenTerm):
    """Negative log-likelihood of the written tokens: −log π(y_t)."""

    formula: ClassVar[str] = "-log pi(y_t)"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −log π(y)."""
        return Values(-stats[Stat.LOGPROB])


@part
class WeightedCrossEntropy(TokenTerm):
    """−w log π(y_t), w of the whole answer: a column of the data set, or its reward.

    With rewards this is weighted behaviour cloning, also called reward-weighted regression. The
    sum is divided by the number of tokens, not by the weights: doubling every weight doubles the
    loss. A negative reward pushes without bound; ``limit: {rewards: positive}`` leaves it out.
    """

    by: Literal["weight", "reward"]

    formula: ClassVar[str] = "-w log pi(y_t)"

    @property
    def column(self) -> Column:
        """Where w comes from."""
        return Column.WEIGHT if self.by == "weight" else Column.REWARD

    @property
    def needs(self) -> Columns:
        """The column of weights."""
        return frozenset({self.column})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −w log π(y)."""
        weight_N = batch.columns[self.column][batch.sequence_N]
        return Values(-weight_N * stats[Stat.LOGPROB], {self.by: weight_N})


@part(method=OnDemonstrations)
class Dft(TokenTerm):
    """DFT, dynamic fine-tuning (arXiv 2508.05629): −sg(π(y_t)) log π(y_t), sg the stop-gradient.

    Its gradient is −∇π(y_t): that of cross-entropy without the factor 1 / π(y_t), which makes
    unlikely tokens dominate.
    """

    formula: ClassVar[str] = "-sg(pi(y_t)) log pi(y_t)"
    paper: ClassVar[str] = "2508.05629"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −sg(π(y)) log π(y)."""
        logprob_N = stats[Stat.LOGPROB]
        probability_N = logprob_N.detach().exp()
        return Values(-probability_N * logprob_N, {"probability": probability_N})


@part
class BalancedCrossEntropy(TokenTerm):
    """CHORD-φ (arXiv 2508.11408): −sg(p (1 − p)) log p, p = π(y_t).

    The weight is largest at p = ½ and 0 at both ends: neither what the policy already writes nor
    what is far from it is pushed.
    """

    formula: ClassVar[str] = "-sg(p (1 - p)) log p, p = pi(y_t)"
    paper: ClassVar[str] = "2508.11408"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −sg(p (1 − p)) log p."""
        logprob_N = stats[Stat.LOGPROB]
        probability_N = logprob_N.detach().exp()
        weight_N = probability_N * (1 - probability_N)
        return Values(-weight_N * logprob_N, {"probability": probability_N, "balance": weight_N})


@part(method=OnDemonstrations)
class ProbabilitySft(TokenTerm):
    """A function of the probability in place of its logarithm (arXiv 2510.00526).

    (1 − π(y_t)^α) / α where π(y_t) ≥ ``at_least``, else 0. α → 0 is cross-entropy, for models that
    know little about the task; α = 1 is 1 − π, with the gradient of DFT, and larger α trust the
    model still more. The threshold is a constant: no gradient flows through it, and tokens below
    it still count in the mean.

    Unconfirmed: the family was derived from a description at second hand.
    """

    alpha: NonNegative = 1.0
    at_least: Decay = 0.0

    formula: ClassVar[str] = "(1 - pi(y_t)^alpha) / alpha where pi(y_t) >= at_least"
    paper: ClassVar[str] = "2510.00526"

    def __post_init__(self) -> None:
        if self.alpha == self.at_least == 0:
            raise ConfigError(
                "alpha=0 without a threshold, which is plain cross-entropy",
                expected="alpha > 0, or at_least > 0",
                fix="use cross_entropy",
            )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] (1 − π(y)^α) / α above the threshold, else 0."""
        logprob_N = stats[Stat.LOGPROB]
        probability_N = logprob_N.detach().exp()
        # expm1 keeps small exponents exact: their limit is −log π.
        loss_N = -torch.expm1(self.alpha * logprob_N) / self.alpha if self.alpha else -logprob_N
        trusted_N = probability_N >= self.at_least
        loss_N = torch.where(trusted_N, loss_N, torch.zeros_like(loss_N))
        return Values(loss_N, {"probability": probability_N, "trusted": trusted_N.float()})


@part(method=OnDemonstrations)
class Psft(TokenTerm):
    """PSFT, proximal supervised fine-tuning (arXiv 2508.17784): −min(r, 1 + ε), r = π / π_old.

    No token is pushed further once it has gained its share. π_old is the learner as it was when
    the demonstrations were drawn: set the stage's ``updates_per_draw`` to 8, the paper's interval.
    With 1 the ratio never leaves 1, where the gradient is that of cross-entropy. The paper clips on
    both sides, as PPO does; with its constant advantage of 1 the lower side never binds, and is no
    option here.
    """

    clip_high: Positive = 0.28

    formula: ClassVar[str] = "-min(r, 1 + clip_high), r = pi(y_t) / pi_old(y_t)"
    paper: ClassVar[str] = "2508.17784"
    needs: ClassVar[Columns] = frozenset({Column.TRAINER_LOGPROB})

    def signals(self, reference: PolicyRef) -> tuple[Signal, ...]:
        """The learner's log-probs when the demonstrations were drawn."""
        return (OwnLogprobs(),)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −min(r, 1 + ε)."""
        log_ratio_N = stats[Stat.LOGPROB] - batch.columns[Column.TRAINER_LOGPROB]
        ratio_N = capped_exp(log_ratio_N)
        bound = 1 + self.clip_high
        shown = {"ratio": ratio_N.detach(), "clipped": (ratio_N > bound).float()}
        return Values(-ratio_N.clamp(max=bound), shown)
