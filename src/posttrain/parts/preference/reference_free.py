"""Losses on pairs of a chosen and a rejected answer that need no reference.

    PREFERENCE, log π ──▶ odds_ratio            with cross_entropy on the chosen: orpo
                          contrastive_logistic  with cross_entropy on the chosen: cpo
                          simpo                 alone: simpo; with alpha: alphapo

Throughout, w is the chosen and l the rejected answer. Shape legend: ``P`` pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from posttrain.core.bounds import NonNegative, Number, Positive
from posttrain.core.lazy import F, torch
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, Stats, Values
from posttrain.parts.preference.shapes import OnPairsWithoutReference
from posttrain.parts.preference.sides import PairTerm, means, paired, sums
from posttrain.parts.registry import part
from posttrain.parts.tensors import capped_exp

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch


@part
class OddsRatio(PairTerm):
    """ORPO's second term (arXiv 2403.07691): −log σ(log odds_w − log odds_l).

    odds = p̄ / (1 − p̄), p̄ = exp of the mean token log-prob. The method adds cross-entropy on the
    chosen answers with weight 1; the paper's λ is this term's weight.
    """

    weight: NonNegative = 0.1

    formula: ClassVar[str] = "-log s(log odds_w - log odds_l), odds = p/(1-p), p = exp(log pi/n)"
    paper: ClassVar[str] = "2403.07691"
    needs: ClassVar[Columns] = frozenset({Column.PREFERENCE})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(log odds_w − log odds_l)."""
        logp = means(stats[Stat.LOGPROB], batch)
        # 1 − p̄ would be 0 for an answer of probability 1, so p̄ is capped at 1 − 1e-6.
        other = logp.map(lambda side: (-torch.expm1(side.clamp(max=-1e-6))).log())
        z = logp.gap - other.gap
        return paired(-F.logsigmoid(z), z, logp)


@part
class ContrastiveLogistic(PairTerm):
    """CPO's first term (arXiv 2401.08417): −log σ(β(log π(y_w) − log π(y_l))), sums over tokens.

    DPO with a uniform reference. The method adds cross-entropy on the chosen answers.
    """

    beta: Positive = 0.1

    formula: ClassVar[str] = "-log s(beta (log pi(chosen) - log pi(rejected)))"
    paper: ClassVar[str] = "2401.08417"
    needs: ClassVar[Columns] = frozenset({Column.PREFERENCE})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(β(log π(y_w) − log π(y_l)))."""
        logp = sums(stats[Stat.LOGPROB], batch)
        z = self.beta * logp.gap
        return paired(-F.logsigmoid(z), z, logp)


@part(method=OnPairsWithoutReference)
class Simpo(PairTerm):
    """SimPO (arXiv 2405.14734) and AlphaPO (2501.03884): −log σ(β(r_w − r_l) − γ).

    r is the mean token log-prob m for α = 0 (SimPO), else (1 − e^{−αm})/α (AlphaPO), which tends
    to m as α → 0. γ is the target margin.

    Its beta multiplies means over tokens and is not comparable with one on sums, such as DPO's.
    """

    beta: Positive = 2.5
    gamma: NonNegative = 1.375
    alpha: Number = 0.0

    formula: ClassVar[str] = "-log s(beta (log pi(chosen)/n - log pi(rejected)/m) - gamma)"
    paper: ClassVar[str] = "2405.14734"
    needs: ClassVar[Columns] = frozenset({Column.PREFERENCE})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(β(r_w − r_l) − γ), r the mean log-prob m, or (1 − e^{−αm})/α."""

        def reward(mean_P: Tensor) -> Tensor:
            if self.alpha == 0:
                return mean_P
            return (1 - capped_exp(-self.alpha * mean_P)) / self.alpha

        logp = means(stats[Stat.LOGPROB], batch)
        z = self.beta * logp.map(reward).gap
        return paired(-F.logsigmoid(z - self.gamma), z, logp)
