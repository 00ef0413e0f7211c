"""Generalised advantage estimation: credit from rewards and a learned value.

Shape legend: ``T`` tokens of a trajectory, ``L`` trained tokens of it, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition import Gae
from posttrain.core.errors import LegalityError
from posttrain.core.protocols import Policy
from posttrain.core.trajectory import Array, Column, Group, Scored
from posttrain.signals.credit import token_rewards, whitened, with_advantages


@final
@dataclass(frozen=True, slots=True, eq=False)
class GaeSignal:
    """Asks the live value head once per draw; writes advantages and what the head should learn."""

    spec: Gae
    policy: Policy  # the live one, asked before the update

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE``, ``OLD_VALUE`` and ``RETURN`` [T] on every member.

        Raises:
            LegalityError: a member without a reward, or a learner without a scalar head.
        """
        values = iter(self.policy.values([m.trajectory for g in groups for m in g.members]))
        judged = [[self._judge(m, next(values)) for m in g.members] for g in groups]
        advantages = [[advantage for advantage, _ in members] for members in judged]
        if self.spec.whiten and groups:
            advantages = whitened(groups, advantages)
        rows = zip(with_advantages(groups, advantages), judged, strict=True)
        return [_with_targets(g, [columns for _, columns in members]) for g, members in rows]

    def _judge(self, member: Scored, values_T: Array) -> tuple[Array, Mapping[Column, Array]]:
        """[T] advantages in float64, and the critic's two columns."""
        spec, trained = self.spec, _predicted(member)
        values_L = values_T[trained].astype(np.float64)
        rewards_L = _rewards(member)[trained]
        lam = spec.lam_of(len(trained))
        advantage_L = gae(rewards_L, values_L, gamma=spec.gamma, lam=lam)
        value_lam = spec.lam if spec.value_lam is None else spec.value_lam
        return_L = values_L + gae(rewards_L, values_L, gamma=spec.gamma, lam=value_lam)
        num = len(values_T)
        columns = {
            Column.OLD_VALUE: _placed(values_L, trained, num).astype(np.float32),
            Column.RETURN: _placed(return_L, trained, num).astype(np.float32),
        }
        return _placed(advantage_L, trained, num, fill=0.0), columns


def gae(rewards_L: Array, values_L: Array, *, gamma: float, lam: float) -> Array:
    """[L] A_t = Σ_k (γλ)^k (r_{t+k} + γ V_{t+k+1} − V_{t+k}), with 0 after the last.

    Example:
        >>> gae(np.array([0.0, 1.0]), np.array([0.5, 0.25]), gamma=1.0, lam=1.0).tolist()
        [0.5, 0.75]
        >>> gae(np.array([0.0, 1.0]), np.array([0.5, 0.25]), gamma=1.0, lam=0.0).tolist()
        [-0.25, 0.75]
    """
    following_L = np.append(values_L[1:], 0.0)
    delta_L = rewards_L + gamma * following_L - values_L
    out_L, running = np.zeros_like(delta_L), 0.0
    for t in reversed(range(len(delta_L))):
        running = float(delta_L[t]) + gamma * lam * running
        out_L[t] = running
    return out_L


def value_metrics(groups: Sequence[Group]) -> Mapping[str, float]:
    """How well the critic foresaw the returns; empty without its columns.

    ``explained_variance`` is 1 − Var(R − V) / Var(R) over trained tokens: 1 when it knew, 0 when
    it knew no more than the mean, below 0 when it misled. It is left out while all returns are
    equal.
    """
    pairs = [
        (m.columns[Column.RETURN][at], m.columns[Column.OLD_VALUE][at])
        for g in groups
        for m in g.members
        if Column.RETURN in m.columns and Column.OLD_VALUE in m.columns
        for at in [_predicted(m)]
    ]
    if not sum(len(r) for r, _ in pairs):
        return {}
    returns, values = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    metrics = {"critic/value": float(values.mean()), "critic/return": float(returns.mean())}
    if (spread := float(returns.var())) > 0:
        metrics["critic/explained_variance"] = 1 - float((returns - values).var()) / spread
    return metrics


def _predicted(member: Scored) -> Array:
    """[L] trained tokens that something stands before: those that have a value."""
    trained = np.flatnonzero(member.trajectory.trainable)
    return trained[trained > 0]


def _rewards(member: Scored) -> Array:
    """[T] what each token earned; the last trained one has the trajectory's reward too."""
    reward = member.scalar(Column.REWARD)
    if reward is None:
        raise LegalityError(
            f"a trajectory of task {member.trajectory.task} has no reward",
            expected="a reward on every member",
            fix="add the verify or reward_model signal before gae",
        )
    earned = token_rewards(member)
    trained = _predicted(member)
    if len(trained):
        earned[trained[-1]] += reward
    return earned


def _placed(values_L: Array, at: Array, num: int, *, fill: float = np.nan) -> Array:
    out = np.full(num, fill)
    out[at] = values_L
    return out


def _with_targets(group: Group, columns: Sequence[Mapping[Column, Array]]) -> Group:
    members = zip(group.members, columns, strict=True)
    return Group(task=group.task, members=tuple(m.with_columns(c) for m, c in members))
