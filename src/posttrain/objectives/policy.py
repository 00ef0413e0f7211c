"""The code of the terms in ``composition/policy.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posttrain.batch import PackedBatch
from posttrain.composition.policy import ClippedPolicyGradient, ReferenceKL
from posttrain.config import Config
from posttrain.head import Stat
from posttrain.objectives.values import Stats, TermCode, Values
from posttrain.trajectory import Column


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


TERMS: Mapping[type[Config], TermCode] = {
    ClippedPolicyGradient: TermCode(
        frozenset({Stat.SAMPLED_LOGPROB, Stat.ENTROPY}), clipped_policy_gradient
    ),
    ReferenceKL: TermCode(frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB}), reference_kl),
}
