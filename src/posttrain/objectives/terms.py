"""What each term computes: a value per token or per pair, differentiable in the policy.

The specification of a term (fields, defaults, formula, paper) is in ``composition.py``; this is
the code behind it. Everything that is not the policy's own statistic is a constant here: columns
carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.batch import PackedBatch
from posttrain.composition import (
    ClippedPolicyGradient,
    CrossEntropy,
    PairwiseLogistic,
    ReferenceKL,
    TeacherReverseKL,
    TermSpec,
)
from posttrain.head import Stat
from posttrain.trajectory import Column

Stats = Mapping[Stat, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """A term's loss per unit, and what to show: numbers per unit, averaged like the loss."""

    loss: Tensor
    shown: Mapping[str, Tensor] = field(default_factory=dict)


def cross_entropy(term: CrossEntropy, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −log π(y)."""
    return Values(-stats[Stat.LOGPROB])


def sequence_sums(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[S] sums over each sequence's trained tokens."""
    sums_S = torch.zeros(batch.num_sequences, device=values_N.device)
    return sums_S.index_add(0, batch.sequence_N, values_N)


def pairwise_logistic(term: PairwiseLogistic, stats: Stats, batch: PackedBatch) -> Values:
    """[P] −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
    rho_S = sequence_sums(stats[Stat.LOGPROB] - batch.columns[Column.REFERENCE_LOGPROB], batch)
    margin_P = term.beta * (rho_S[batch.pairs_P2[:, 0]] - rho_S[batch.pairs_P2[:, 1]])
    eps = term.label_smoothing
    loss_P = -(1 - eps) * F.logsigmoid(margin_P) - eps * F.logsigmoid(-margin_P)
    margin = margin_P.detach()
    return Values(loss_P, {"margin": margin, "accuracy": (margin > 0).float()})


def clipped_policy_gradient(
    term: ClippedPolicyGradient, stats: Stats, batch: PackedBatch
) -> Values:
    """[N] −min(r A, clip(r) A)."""
    advantage_N = batch.columns[Column.ADVANTAGE]
    log_ratio_N = stats[Stat.SAMPLED_LOGPROB] - batch.columns[Column.BEHAVIOUR_LOGPROB]
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - term.clip_low, 1 + term.clip_high)
    loss_N = -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    with torch.no_grad():
        held_N = (clipped_N * advantage_N < ratio_N * advantage_N).float()
        shown = {"ratio": ratio_N.detach(), "clipped": held_N, "policy_shift": -log_ratio_N}
    return Values(loss_N, shown)


def reference_kl(term: ReferenceKL, stats: Stats, batch: PackedBatch) -> Values:
    """[N] r·k3, whose gradient on samples of the behaviour policy is that of KL(π ‖ π_ref)."""
    logprob_N = stats[Stat.LOGPROB]
    u_N = logprob_N - batch.columns[Column.REFERENCE_LOGPROB]
    # exp(-u) overflows when the reference is much surer than the policy; 20 nats is e^20.
    k3_N = (-u_N).clamp(max=20).exp() + u_N - 1
    ratio_N = (stats[Stat.SAMPLED_LOGPROB] - batch.columns[Column.BEHAVIOUR_LOGPROB]).exp()
    return Values(ratio_N * k3_N, {"kl": k3_N.detach()})


def teacher_reverse_kl(term: TeacherReverseKL, stats: Stats, batch: PackedBatch) -> Values:
    """[N] KL(π ‖ π_T) over the next token."""
    kl_N = stats[Stat.TEACHER_REVERSE_KL]
    return Values(kl_N, {"kl": kl_N.detach()})


@dataclass(frozen=True, slots=True)
class TermCode:
    """The code of a term, and the statistics it reads."""

    reads: frozenset[Stat]
    values: Callable[..., Values]


TERMS: Mapping[type[TermSpec], TermCode] = {
    CrossEntropy: TermCode(frozenset({Stat.LOGPROB}), cross_entropy),
    PairwiseLogistic: TermCode(frozenset({Stat.LOGPROB}), pairwise_logistic),
    ClippedPolicyGradient: TermCode(
        frozenset({Stat.SAMPLED_LOGPROB, Stat.ENTROPY}), clipped_policy_gradient
    ),
    ReferenceKL: TermCode(frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB}), reference_kl),
    TeacherReverseKL: TermCode(frozenset({Stat.TEACHER_REVERSE_KL}), teacher_reverse_kl),
}
