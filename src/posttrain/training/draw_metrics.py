"""Metrics of a draw: mismatch of sampler and trainer, and quality of the critic.

Shape legend: ``T`` tokens of a trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from posttrain.core.trajectory import Column, Group
from posttrain.parts.credit.gae import predicted


def mismatch_metrics(groups: Sequence[Group]) -> Mapping[str, float]:
    """Mismatch of the sampler's and the trainer's probabilities; empty without the column.

    With w = π_trainer / π_sampler per trained token: its mean, the effective sample size
    (mean w)² / mean w² between 0 and 1, the shares of w above 2 and below ½, and mean log w.
    """
    log_w = [
        (m.columns[Column.TRAINER_LOGPROB] - m.columns[Column.BEHAVIOUR_LOGPROB])[
            m.trajectory.trainable
        ].astype(np.float64)
        for g in groups
        for m in g.members
        if Column.TRAINER_LOGPROB in m.columns and Column.BEHAVIOUR_LOGPROB in m.columns
    ]
    logs = np.concatenate(log_w) if log_w else np.zeros(0)
    logs = logs[np.isfinite(logs)]  # NaN at tokens of other authors: their sampling is unknown
    if not len(logs):
        return {}
    weights = np.exp(logs)
    return {
        "mismatch/mean_weight": float(weights.mean()),
        "mismatch/effective_share": float(weights.mean() ** 2 / (weights**2).mean()),
        "mismatch/above_2": float((weights > 2).mean()),
        "mismatch/below_half": float((weights < 0.5).mean()),
        "mismatch/log_weight": float(logs.mean()),
    }


def value_metrics(groups: Sequence[Group]) -> Mapping[str, float]:
    """How well the critic predicted the returns; empty without its columns.

    ``explained_variance`` is 1 − Var(R − V) / Var(R) over trained tokens: 1 for a perfect critic,
    0 for one no better than the mean return, below 0 for a worse one. It is left out while all
    returns are equal.
    """
    pairs = [
        (m.columns[Column.RETURN][at], m.columns[Column.OLD_VALUE][at])
        for g in groups
        for m in g.members
        if Column.RETURN in m.columns and Column.OLD_VALUE in m.columns
        for at in [predicted(m)]
    ]
    if not sum(len(r) for r, _ in pairs):
        return {}
    returns, values = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    metrics = {"critic/value": float(values.mean()), "critic/return": float(returns.mean())}
    if (spread := float(returns.var())) > 0:
        metrics["critic/explained_variance"] = 1 - float((returns - values).var()) / spread
    return metrics
