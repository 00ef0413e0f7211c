"""Policy gradients on off-policy text without behaviour log-probs, under a named assumption.

A ratio needs the behaviour policy's probability of a token. For a demonstration it is unknown, and
all other terms refuse a missing log-prob. These terms assume a value, stated in their names.

    assumed_certain_gradient   π_author = 1                        luffy
    assumed_own_gradient       π_author = the policy when drawn    prefix_rft
    exploration_bonus          no ratio                            xpo

Shape legend: ``N`` trained tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from posttrain.core.bounds import NonNegative, Positive
from posttrain.core.lazy import torch
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.base import ANYONE, Aggregate, Columns, Stats, Term, TokenTerm, Values
from posttrain.parts.registry import part
from posttrain.parts.tensors import capped_exp, check_bounds

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch

OTHERS = ANYONE - {Kind.LEARNER}
"""All kinds of author except the learner."""


@part
class AssumedCertainGradient(TokenTerm):
    """−f(π(y_t)) A, f(p) = p / (p + γ): assumes that the author was certain of every token.

    With a behaviour probability of 1 the ratio is π itself, shaped by f: the gradient is
    −A γ p / (p + γ)² ∇log π, largest at p = γ, so unlikely tokens keep a gradient that they would
    not have under p ∇log π. No clip (LUFFY, arXiv 2504.14945).
    """

    gamma: Positive = 0.1
    where: tuple[Kind, ...] = (Kind.EXTERNAL,)

    formula: ClassVar[str] = "-pi / (pi + gamma) A"
    paper: ClassVar[str] = "2504.14945"
    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE})
    accepts: ClassVar[frozenset[Kind]] = OTHERS

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −p / (p + γ) A."""
        probability_N = stats[Stat.LOGPROB].exp()
        loss_N = -probability_N / (probability_N + self.gamma) * batch.columns[Column.ADVANTAGE]
        return Values(loss_N, {"probability": probability_N.detach()})


@part
class AssumedOwnGradient(TokenTerm):
    """−min(r A, clip(r) A), r = π / π_drawn: assumes that the policy itself wrote the tokens.

    π_drawn is the learner when the text was drawn, so r is 1 at the first update of a draw and the
    gradient is that of A log π (Prefix-RFT, arXiv 2507.01679). The assumption is false, and a
    negative advantage lowers a correct prefix for a wrong completion; the paper limits the term to
    the fifth of the tokens of highest entropy.
    """

    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    where: tuple[Kind, ...] = (Kind.EXTERNAL,)

    formula: ClassVar[str] = "-min(r A, clip(r) A), r = pi / pi when the text was drawn"
    paper: ClassVar[str] = "2507.01679"
    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE, Column.TRAINER_LOGPROB})
    accepts: ClassVar[frozenset[Kind]] = OTHERS

    def __post_init__(self) -> None:
        check_bounds(self.clip_low, self.clip_high)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −min(r A, clip(r) A)."""
        advantage_N = batch.columns[Column.ADVANTAGE]
        ratio_N = capped_exp(stats[Stat.LOGPROB] - batch.columns[Column.TRAINER_LOGPROB])
        gain_N = ratio_N * advantage_N
        kept_N = torch.minimum(
            gain_N, ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage_N
        )
        shown = {"ratio": ratio_N.detach(), "clipped": (kept_N < gain_N).float()}
        return Values(-kept_N, shown)


@part
class ExplorationBonus(Term):
    """+log π(y), summed over answers that the reference sampled (XPO, arXiv 2405.21046).

    Minimising it lowers the likelihood of the reference's answers, which is optimism about all
    others. It has no lower bound: use weights of about 1e-5.
    """

    aggregate: Aggregate = "sequence_sum"
    weight: Positive = 1e-5
    where: tuple[Kind, ...] = (Kind.TEACHER,)

    formula: ClassVar[str] = "log pi(y), y of the reference"
    paper: ClassVar[str] = "2405.21046"
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.TEACHER})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] log π(y)."""
        return Values(stats[Stat.LOGPROB])
