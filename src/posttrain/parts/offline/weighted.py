"""Losses on logged answers with rewards: offline RL.

    reward or advantage, π(y_t), π_ref(y_t) ──▶ a constant weight w ──▶ −w log π(y_t)

Shape legend: ``N`` trained tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.core.bounds import Inner, NonNegative, Positive, Share
from posttrain.core.errors import ConfigError
from posttrain.core.lazy import torch
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.base import Aggregate, Columns, Stats, TokenTerm, Values
from posttrain.parts.registry import part
from posttrain.parts.tensors import sequence_sums

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch


@part
class AdvantageWeighted(TokenTerm):
    """AWR, advantage-weighted regression (arXiv 1910.00177): −min(e^{A/β}, w_max) log π(y_t).

    The weight is a constant. β → ∞ is cross-entropy. Weights are not normalised over the batch.
    """

    beta: Positive = 1.0
    max_weight: Positive = 20.0

    formula: ClassVar[str] = "-min(exp(A / beta), max_weight) log pi(y_t)"
    paper: ClassVar[str] = "1910.00177"
    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −min(e^{A/β}, w_max) log π(y)."""
        # Infinity, for a very small β, is clamped like any other large weight.
        weight_N = (batch.columns[Column.ADVANTAGE] / self.beta).exp().clamp(max=self.max_weight)
        capped_N = (weight_N >= self.max_weight).float()
        return Values(-weight_N * stats[Stat.LOGPROB], {"weight": weight_N, "capped": capped_N})


@part
class LeftoverLunch(TokenTerm):
    """A-LoL (arXiv 2305.14718): −sg(clip(ρ, 1−ε, 1+ε)) max(A, 0) log π(y_t).

    ``ratio: sequence`` takes ρ = π(y) / π_ref(y) of the whole answer, which is one action;
    ``token`` takes ρ of each token; ``none`` takes 1, and may add β (log π − log π_ref), with
    ``kl_weight`` as β. An answer's tokens are summed, as in the authors' code.
    """

    ratio: Literal["sequence", "token", "none"] = "sequence"
    clip: Inner = 0.9
    kl_weight: NonNegative = 0.0
    aggregate: Aggregate = "sequence_sum"

    formula: ClassVar[str] = "-sg(clip(pi(y) / pi_ref(y))) max(A, 0) log pi(y_t)"
    paper: ClassVar[str] = "2305.14718"

    def __post_init__(self) -> None:
        if self.kl_weight and self.ratio != "none":
            raise ConfigError(
                f"kl_weight={self.kl_weight} with ratio={self.ratio}",
                expected="ratio: none: the penalty replaces the ratio",
            )

    @property
    def needs(self) -> Columns:
        """Advantages, and the reference where the loss compares with it."""
        compares = self.ratio != "none" or self.kl_weight > 0
        reference = {Column.REFERENCE_LOGPROB} if compares else set[Column]()
        return frozenset({Column.ADVANTAGE, *reference})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −sg(clip(ρ)) max(A, 0) log π(y), or with ρ = 1 and + β (log π − log π_ref)."""
        logprob_N = stats[Stat.LOGPROB]
        weight_N = batch.columns[Column.ADVANTAGE].clamp_min(0)
        if self.ratio == "none":
            loss_N = -weight_N * logprob_N
            if self.kl_weight:
                penalty_N = logprob_N - batch.columns[Column.REFERENCE_LOGPROB]
                loss_N = loss_N + self.kl_weight * penalty_N
            return Values(loss_N, {"weight": weight_N})
        with torch.no_grad():
            log_ratio_N = logprob_N - batch.columns[Column.REFERENCE_LOGPROB]
            if self.ratio == "sequence":
                log_ratio_N = sequence_sums(log_ratio_N, batch)[batch.sequence_N]
            ratio_N = log_ratio_N.exp().clamp(1 - self.clip, 1 + self.clip)
        return Values(-ratio_N * weight_N * logprob_N, {"weight": weight_N, "ratio": ratio_N})


@part
class RewardGold(TokenTerm):
    """R-GOLD (GOLD, arXiv 2009.07839): −sg(max(π(y_t), ``floor``)) R log π(y_t).

    The policy's own probability stands in for an importance weight; the floor keeps unlikely
    tokens learnable. An answer's tokens are summed, as in the code of arXiv 2305.14718.
    """

    floor: Share = 0.1
    aggregate: Aggregate = "sequence_sum"

    formula: ClassVar[str] = "-sg(max(pi(y_t), floor)) R log pi(y_t)"
    paper: ClassVar[str] = "2009.07839"
    needs: ClassVar[Columns] = frozenset({Column.REWARD})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −sg(max(π(y), floor)) R log π(y)."""
        logprob_N = stats[Stat.LOGPROB]
        own_N = logprob_N.detach().exp().clamp_min(self.floor)
        weight_N = own_N * batch.columns[Column.REWARD][batch.sequence_N]
        return Values(-weight_N * logprob_N, {"weight": weight_N})
