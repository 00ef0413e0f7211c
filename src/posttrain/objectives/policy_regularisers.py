"""The code of the terms in ``composition/policy_regularisers.py``."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.composition.policy_regularisers import (
    AdaptiveEntropyBonus,
    EntropyBonus,
    LogRatioPenalty,
    ReferenceKL,
)
from posttrain.core.config import Config
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives.policy_ratio import log_ratio
from posttrain.objectives.values import Stats, TermCode, Values, capped_exp


def reference_kl(term: ReferenceKL, stats: Stats, batch: PackedBatch) -> Values:
    """[N] an estimate of KL(π ‖ π_ref) at samples of the behaviour policy."""
    u_N = stats[Stat.LOGPROB] - batch.columns[Column.REFERENCE_LOGPROB]
    # exp(-u) overflows when the reference is much surer than the policy; 20 nats is e^20.
    k3_N = (-u_N).clamp(max=20).exp() + u_N - 1
    ratio_N = capped_exp(log_ratio(None, stats, batch))
    if term.estimator == "k3_without_ratio":
        loss_N = k3_N
    elif term.estimator == "k2":
        loss_N = ratio_N.detach() * u_N.square() / 2
    else:
        loss_N = ratio_N * k3_N
    return Values(loss_N, {"kl": k3_N.detach()})


def entropy_bonus(term: EntropyBonus, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −H(π)."""
    return Values(-stats[Stat.ENTROPY])


def adaptive_entropy_bonus(term: AdaptiveEntropyBonus, stats: Stats, batch: PackedBatch) -> Values:
    """[N] −H(π), before its coefficient."""
    return Values(-stats[Stat.ENTROPY], {"entropy": stats[Stat.ENTROPY].detach()})


def log_ratio_penalty(term: LogRatioPenalty, stats: Stats, batch: PackedBatch) -> Values:
    """[N] |log r| where marked, else 0."""
    mark_N = batch.columns[Column.MARK]
    return Values(mark_N * log_ratio(None, stats, batch).abs(), {"marked": mark_N})


TERMS: Mapping[type[Config], TermCode] = {
    ReferenceKL: TermCode(frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB}), reference_kl),
    EntropyBonus: TermCode(frozenset({Stat.ENTROPY}), entropy_bonus),
    AdaptiveEntropyBonus: TermCode(frozenset({Stat.ENTROPY}), adaptive_entropy_bonus),
    LogRatioPenalty: TermCode(frozenset({Stat.SAMPLED_LOGPROB}), log_ratio_penalty),
}
