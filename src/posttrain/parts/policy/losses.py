"""Losses on the learner's own rollouts: policy gradients.

    SAMPLED_LOGPROB (learner now) ──┐
                                    ├─ − ─▶ log r ──clip or gate──▶ × ADVANTAGE ──▶ loss [N]
    BEHAVIOUR_LOGPROB (column) ─────┘

Every term here is a loss in r = π / behaviour, the ratio of a token's probability now to the one
it was sampled with, and in the advantage A. At r = 1 (fresh rollouts, first update) all of them
have the gradient of REINFORCE, −A ∇ log π, up to how tokens and sequences are averaged; they
differ in what they do once the policy has moved.

Losses per sequence return their value at every token of the sequence; averaged over the tokens
of a sequence it is itself again.

Shape legend: ``N`` trained tokens, ``S`` sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from posttrain.core.bounds import NonNegative, Positive
from posttrain.core.errors import ConfigError
from posttrain.core.lazy import torch
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.base import Aggregate, Stats, Values, WeightSchedule
from posttrain.parts.policy.ratio import (
    Mismatch,
    RatioTerm,
    check_level,
    log_ratio,
    ratio_shown,
    sequence_advantages,
    weighed,
)
from posttrain.parts.policy.shapes import GroupedRollouts
from posttrain.parts.registry import part
from posttrain.parts.tensors import capped_exp, check_bounds, sequence_means, sequence_sums

if TYPE_CHECKING:
    from posttrain.numerics.batch import PackedBatch

SequenceAggregate = Literal["sequence_mean", "sequence_sum"]


@part
class PolicyGradient(RatioTerm):
    """−r A, not clipped: REINFORCE on fresh rollouts, token importance sampling after that.

    ``sequence_sum`` makes it the gradient of the expected reward (arXiv 2402.14740).
    """

    aggregate: Aggregate = "token_mean"

    formula: ClassVar[str] = "-r A"
    paper: ClassVar[str] = "2402.14740"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −r A."""
        log_ratio_N = log_ratio(self.mismatch, stats, batch)
        loss_N = -capped_exp(log_ratio_N) * batch.columns[Column.ADVANTAGE]
        return weighed(self.mismatch, loss_N, ratio_shown(log_ratio_N), batch)


@part
class ClippedPolicyGradient(RatioTerm):
    """−min(r A, clip(r, 1−ε_low, 1+ε_high) A), r = π / behaviour (PPO, arXiv 1707.06347).

    ``dual_clip`` c bounds the loss of a bad token that became likelier: −max(·, c A) where A < 0
    (arXiv 1912.09729, c = 3). Two-sided clipping, r ≤ δ (arXiv 2505.07291, δ = 4), is the same
    loss with c = δ.

    ``sequence_mask`` δ drops sequences with A < 0 that the policy has left: those with
    mean_t log(behaviour / π) > δ (arXiv 2512.02556).
    """

    aggregate: Aggregate = "token_mean"
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    dual_clip: NonNegative | None = None
    sequence_mask: NonNegative | None = None

    formula: ClassVar[str] = "-min(r A, clip(r) A)"
    paper: ClassVar[str] = "1707.06347"

    def __post_init__(self) -> None:
        check_bounds(self.clip_low, self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(
                f"dual_clip={self.dual_clip}, clip_high={self.clip_high}",
                expected="dual_clip above 1 + clip_high",
            )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −min(r A, clip(r) A), with the second bound and the sequence mask if set."""
        advantage_N = batch.columns[Column.ADVANTAGE]
        log_ratio_N = log_ratio(self.mismatch, stats, batch)
        ratio_N = capped_exp(log_ratio_N)
        gain_N = ratio_N * advantage_N
        kept_N = torch.minimum(
            gain_N, ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage_N
        )
        held_N = kept_N < gain_N
        if self.dual_clip is not None:
            floor_N = self.dual_clip * advantage_N
            beyond_N = (advantage_N < 0) & (kept_N < floor_N)
            kept_N, held_N = torch.where(beyond_N, floor_N, kept_N), held_N | beyond_N
        shown = {**ratio_shown(log_ratio_N), "clipped": held_N.float()}
        if self.sequence_mask is not None:
            left_S = sequence_means(-log_ratio_N.detach(), batch) > self.sequence_mask
            masked_N = left_S[batch.sequence_N] & (advantage_N < 0)
            kept_N = torch.where(masked_N, torch.zeros_like(kept_N), kept_N)
            shown["masked"] = masked_N.float()
        return weighed(self.mismatch, -kept_N, shown, batch)


class Clipping(Protocol):
    """Bounds of a clipped ratio."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...


def clipped(
    method: Clipping,
    *,
    aggregate: Aggregate = "token_mean",
    weight: float = 1.0,
    weight_schedule: WeightSchedule | None = None,
    mismatch: Mismatch | None = None,
) -> ClippedPolicyGradient:
    """The clipped policy gradient with the method's bounds."""
    return ClippedPolicyGradient(
        clip_low=method.clip_low,
        clip_high=method.clip_high,
        aggregate=aggregate,
        weight=weight,
        weight_schedule=weight_schedule,
        mismatch=mismatch,
    )


@part(method=GroupedRollouts)
class Gspo(RatioTerm):
    """GRPO with one ratio per sequence, not one per token (GSPO, arXiv 2507.18071).

    −min(s A, clip(s) A), s = exp(mean_t log r). On the first update of a draw it is GRPO. With
    ``sequence_sum`` it is LUSPO (arXiv 2602.05261): the same times the sequence's length. The
    advantage must be the same at all tokens of a sequence.
    """

    clip_low: NonNegative = 3e-4
    clip_high: NonNegative = 4e-4
    aggregate: SequenceAggregate = "sequence_mean"

    formula: ClassVar[str] = "-min(s A, clip(s) A), s = exp(mean log r)"
    paper: ClassVar[str] = "2507.18071"

    def __post_init__(self) -> None:
        check_bounds(self.clip_low, self.clip_high)
        check_level(self.mismatch)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −min(s A, clip(s) A) of the token's sequence."""
        advantage_S = sequence_advantages(batch)
        log_ratio_N = log_ratio(self.mismatch, stats, batch)
        ratio_S = capped_exp(sequence_means(log_ratio_N, batch))
        gain_S = ratio_S * advantage_S
        kept_S = torch.minimum(
            gain_S, ratio_S.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage_S
        )
        held_S = (kept_S < gain_S).float()
        shown = {**ratio_shown(log_ratio_N), "clipped": held_S[batch.sequence_N]}
        return weighed(self.mismatch, -kept_S[batch.sequence_N], shown, batch)


@part(method=GroupedRollouts)
class Gmpo(RatioTerm):
    """GRPO with the geometric mean of clipped token ratios (GMPO, arXiv 2507.20673).

    −A exp(mean_t l), l = log r clipped before the mean is taken, and only in the direction that the
    advantage pushes: l ≤ ``clip_high`` where A > 0 and l ≥ −``clip_low`` where A < 0, in log space.
    The advantage is one per sequence.
    """

    clip_low: Positive = 0.4
    clip_high: Positive = 0.4
    aggregate: SequenceAggregate = "sequence_mean"

    formula: ClassVar[str] = "-A exp(mean of one-sided clipped log r)"
    paper: ClassVar[str] = "2507.20673"

    def __post_init__(self) -> None:
        check_level(self.mismatch)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −A exp(mean of clipped log r) of the token's sequence."""
        advantage_S = sequence_advantages(batch)
        log_ratio_N = log_ratio(self.mismatch, stats, batch)
        clipped_N = torch.where(
            advantage_S[batch.sequence_N] > 0,
            log_ratio_N.clamp(max=self.clip_high),
            log_ratio_N.clamp(min=-self.clip_low),
        )
        loss_S = -advantage_S * capped_exp(sequence_means(clipped_N, batch))
        shown = {**ratio_shown(log_ratio_N), "clipped": (clipped_N != log_ratio_N).float()}
        return weighed(self.mismatch, loss_S[batch.sequence_N], shown, batch)


@part(method=GroupedRollouts)
class Cispo(RatioTerm):
    """A clipped weight on REINFORCE: every token keeps a gradient (CISPO, arXiv 2506.13585).

    −sg(clamp(r, low, high)) A log π, sg the stop-gradient. The bounds are *absolute* ratios, as in
    ScaleRL (arXiv 2510.13786: no lower one, upper 5). Libraries that write
    clip(r, 1−ε_low, 1+ε_high) mean ratio_low = 1 − ε_low and ratio_high = 1 + ε_high here.
    """

    aggregate: Aggregate = "token_mean"
    ratio_low: NonNegative = 0.0
    ratio_high: NonNegative = 5.0

    formula: ClassVar[str] = "-sg(clamp(r, low, high)) A log pi"
    paper: ClassVar[str] = "2506.13585"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio_low <= 1 < self.ratio_high:
            raise ConfigError(
                f"ratio_low={self.ratio_low}, ratio_high={self.ratio_high}",
                expected="0 <= ratio_low <= 1 < ratio_high: bounds on the ratio itself",
                fix="an epsilon of 0.28 is ratio_high 1.28",
            )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −sg(clamp(r)) A log π."""
        log_ratio_N = log_ratio(self.mismatch, stats, batch)
        ratio_N = log_ratio_N.detach().exp()
        weight_N = ratio_N.clamp(self.ratio_low, self.ratio_high)
        loss_N = -weight_N * batch.columns[Column.ADVANTAGE] * stats[Stat.SAMPLED_LOGPROB]
        shown = {**ratio_shown(log_ratio_N), "clipped": (weight_N != ratio_N).float()}
        return weighed(self.mismatch, loss_N, shown, batch)


@part(method=GroupedRollouts)
class Sapo(RatioTerm):
    """A smooth gate in place of the clip (SAPO, arXiv 2511.20347).

    −(4/τ) σ(τ (r − 1)) A. τ is ``temperature_up`` where A > 0 and ``temperature_down`` elsewhere; a
    larger one lets go sooner. The slope in r is 4 σ(1 − σ): 1 at r = 1, and towards 0 away from it.
    """

    temperature_up: Positive = 1.0
    temperature_down: Positive = 1.05
    aggregate: Aggregate = "sequence_mean"

    formula: ClassVar[str] = "-(4 / tau) sigmoid(tau (r - 1)) A"
    paper: ClassVar[str] = "2511.20347"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −(4/τ) σ(τ (r − 1)) A."""
        advantage_N = batch.columns[Column.ADVANTAGE]
        log_ratio_N = log_ratio(self.mismatch, stats, batch)
        tau_N = torch.where(advantage_N > 0, self.temperature_up, self.temperature_down)
        gate_N = 4 / tau_N * torch.sigmoid(tau_N * (capped_exp(log_ratio_N) - 1))
        return weighed(self.mismatch, -gate_N * advantage_N, ratio_shown(log_ratio_N), batch)


@part(method=GroupedRollouts)
class Vespo(RatioTerm):
    """A smooth weight of the whole sequence's ratio (VESPO, arXiv 2602.10693).

    −sg(W^k e^{λ(1−W)}) A log π, W = Π_t r, sg the stop-gradient. (k, λ) is ``up`` where A > 0 and
    ``down`` elsewhere. The weight is 1 at W = 1 and goes to 0 both where the policy left the
    sequence and where it rushed to it.
    """

    aggregate: Aggregate = "token_mean"
    up: tuple[Positive, Positive] = (2.0, 3.0)
    down: tuple[Positive, Positive] = (3.0, 2.0)

    formula: ClassVar[str] = "-sg(W^k exp(lambda (1 - W))) A log pi, W the sequence ratio"
    paper: ClassVar[str] = "2602.10693"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[N] −sg(W^k e^{λ(1−W)}) A log π."""
        advantage_N = batch.columns[Column.ADVANTAGE]
        log_ratio_N = log_ratio(self.mismatch, stats, batch)
        log_w_N = sequence_sums(log_ratio_N.detach(), batch)[batch.sequence_N]
        up_N = advantage_N > 0
        k_N = torch.where(up_N, self.up[0], self.down[0])
        lambda_N = torch.where(up_N, self.up[1], self.down[1])
        # In log space: where W overflows, the weight is exp(-inf) = 0.
        weight_N = (k_N * log_w_N + lambda_N * (1 - log_w_N.exp())).exp()
        loss_N = -weight_N * advantage_N * stats[Stat.SAMPLED_LOGPROB]
        shown = {**ratio_shown(log_ratio_N), "sequence_weight": weight_N}
        return weighed(self.mismatch, loss_N, shown, batch)
