"""Reward models: terms that train them, and the signals that use them.

    pairs ──bradley_terry──┐                     ┌─reward_model──▶ REWARD
    labels ─outcome_bce────┼──▶ scalar head ─────┤
    steps ──step_bce───────┘    (a model folder) └─process_reward─▶ STEP_REWARD, then
                                                    REWARD (min, product, last) or TOKEN_REWARD

A score is read *after* what it scores: after the last token of an answer or of a step. The terms
are here; the signals are in ``judges.py`` and ``process.py``.

Shape legend: ``N`` trained tokens, ``S`` sequences, ``P`` pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.core.bounds import NonNegative
from posttrain.core.errors import ConfigError
from posttrain.core.lazy import F, torch
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, Stats, Term, Unit, Values
from posttrain.parts.registry import part
from posttrain.parts.rewards.shapes import JudgeOnPairs
from posttrain.parts.tensors import sequence_sums

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch

SCORE: frozenset[Wanted] = frozenset({Stat.SCORE})


@part(method=JudgeOnPairs)
class BradleyTerry(Term):
    """−log σ(s_w − s_l − m) + η (s_w + s_l)², s the score after the last token of an answer.

    The probability that w is preferred to l is σ(s_w − s_l) (Bradley and Terry; arXiv 2203.02155).
    ``margin`` m is a constant margin; ``column`` takes each pair's own from the data set, such as
    ratings of how much better an answer is (arXiv 2307.09288: 1, 2/3, 1/3 and 0).
    ``centring`` η keeps scores around 0, which the first part does not fix (arXiv 2312.09244).

    As a method it trains the stage's model into a reward model; name the stage as ``model`` of a
    reward_model signal. Pairs may have their own margins: name their column in the data set.
    """

    margin: NonNegative | Literal["column"] = 0.0
    centring: NonNegative = 0.01

    formula: ClassVar[str] = "-log sigmoid(s_w - s_l - margin) + centring (s_w + s_l)^2"
    paper: ClassVar[str] = "2203.02155, 2307.09288 (margin), 2312.09244 (centring)"
    unit: ClassVar[Unit] = "pair"
    aggregate: ClassVar[str] = "pair_mean"
    reads: ClassVar[frozenset[Wanted]] = SCORE

    @property
    def needs(self) -> Columns:
        """Preferences, and margins with ``margin: column``."""
        margin = {Column.MARGIN} if self.margin == "column" else set()
        return frozenset({Column.PREFERENCE} | margin)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(s_w − s_l − m) + η (s_w + s_l)²."""
        score_P2 = last_scores(stats, batch)[batch.pairs_P2]
        gap_P, sum_P = score_P2[:, 0] - score_P2[:, 1], score_P2.sum(-1)
        if self.margin == "column":
            margin_P = batch.columns[Column.MARGIN][batch.pairs_P2[:, 0]]
        else:
            margin_P = torch.full_like(gap_P, self.margin)
        loss_P = -F.logsigmoid(gap_P - margin_P) + self.centring * sum_P.square()
        shown = {"accuracy": (gap_P > 0).float(), "gap": gap_P, "mean_score": sum_P / 2}
        return Values(loss_P, shown)


@part
class OutcomeBCE(Term):
    """−y log σ(s) − (1 − y) log σ(−s): is the answer right? (ORM, arXiv 2110.14168)

    ``at: last`` trains the score after the last token; ``at: every`` trains it after every token
    with the same target. ``target: label`` takes y from labelled answers, ``reward`` from rewards
    between 0 and 1.
    """

    at: Literal["last", "every"] = "last"
    target: Literal["label", "reward"] = "label"
    aggregate: Literal["sequence_mean", "token_mean"] = "sequence_mean"

    formula: ClassVar[str] = "-y log sigmoid(s) - (1 - y) log sigmoid(-s)"
    paper: ClassVar[str] = "2110.14168"
    reads: ClassVar[frozenset[Wanted]] = SCORE

    def __post_init__(self) -> None:
        if self.at == "last" and self.aggregate == "token_mean":
            raise ConfigError(
                "outcome_bce at the last token, with token_mean",
                expected="sequence_mean: one verdict per answer must not count by its length",
                fix="drop aggregate, or use at: every",
            )

    @property
    def needs(self) -> Columns:
        """Labels or rewards."""
        return frozenset({Column.LABEL if self.target == "label" else Column.REWARD})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] the loss of each token's sequence, or of each token."""
        if self.target == "label":
            target_S = (batch.columns[Column.LABEL] + 1) / 2
        else:
            target_S = batch.columns[Column.REWARD].clamp(0, 1)
        target_N = target_S[batch.sequence_N]
        if self.at == "last":
            score_N = last_scores(stats, batch)[batch.sequence_N]
        else:
            score_N = stats[Stat.SCORE]
        return _classified(score_N, target_N)


@part
class StepBCE(Term):
    """−y_k log σ(s_k) − (1 − y_k) log σ(−s_k) after the last token of every labelled step k.

    A process reward model (arXiv 2211.14275, 2305.20050). y is from 0 to 1, such as the share of
    continuations that succeeded (Math-Shepherd, arXiv 2312.08935).
    ``token_mean`` is over steps, ``sequence_mean`` over the steps of each answer first.
    """

    aggregate: Literal["token_mean", "sequence_mean"] = "token_mean"

    formula: ClassVar[str] = "-y_k log sigmoid(s_k) - (1 - y_k) log sigmoid(-s_k) at step ends"
    paper: ClassVar[str] = "2211.14275, 2305.20050, 2312.08935"
    unit: ClassVar[Unit] = "step"
    needs: ClassVar[Columns] = frozenset({Column.STEP_LABEL})
    reads: ClassVar[frozenset[Wanted]] = SCORE

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] the loss at the end of each step; the batch has no other tokens."""
        return _classified(stats[Stat.SCORE], batch.columns[Column.STEP_LABEL])


def last_scores(stats: Stats, batch: PackedBatch) -> Tensor:
    """[S] the score after the last trained token of each sequence."""
    ones_N = torch.ones_like(batch.sequence_N)
    # A sequence's tokens are contiguous and in order.
    lasts_S = sequence_sums(ones_N, batch).cumsum(0) - 1
    return stats[Stat.SCORE][lasts_S.clamp_min(0)]


def _classified(score_N: Tensor, target_N: Tensor) -> Values:
    """[N] cross-entropy of scores, which are log-odds, with targets from 0 to 1."""
    target_N = target_N.to(score_N.dtype)
    loss_N = F.binary_cross_entropy_with_logits(score_N, target_N, reduction="none")
    right_N = (score_N > 0) == (target_N > 0.5)
    return Values(loss_N, {"accuracy": right_N.float(), "mean_target": target_N})
