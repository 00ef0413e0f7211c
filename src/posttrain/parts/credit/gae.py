"""Generalised advantage estimation with the learner's own value head.

    REWARD, TOKEN_REWARD ──┐
                           ├── gae ──▶ ADVANTAGE
    value head (learner) ──┘     └───▶ OLD_VALUE, RETURN   targets of the critic

Shape legend: ``T`` tokens of a trajectory, ``L`` its trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from posttrain.core.bounds import Positive, Share
from posttrain.core.errors import LegalityError
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Array, Column, Group, Scored
from posttrain.parts.base import Columns, Signal, StageContext
from posttrain.parts.columns import attach
from posttrain.parts.credit.advantages import token_rewards, whitened, with_advantages
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class Gae(Signal):
    """Generalised advantage estimation (arXiv 1506.02438) with the learner's own value head.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = Σ_k (γλ)^k δ_{t+k} over the trained tokens of a
    trajectory. r_t is the token's ``TOKEN_REWARD``, where there is one; the last token also gets
    ``REWARD``. The value after the last token is 0, also for truncated answers. With λ = 1, A_t is
    the discounted return minus V_t; with λ = 0 it is δ_t.

    ``value_lam`` is the λ of ``RETURN`` = V_t + A_t(value_lam), the critic's target; null takes
    ``lam``. ``length_alpha`` α replaces ``lam`` by 1 − 1/(α l) for an answer of l tokens, at
    least 0, so that longer answers have a longer horizon (VAPO, arXiv 2504.05118).

    ``whiten`` gives the advantages of the draw's trained tokens mean 0 and unbiased standard
    deviation 1. Values come from the weights before the update.
    """

    gamma: Share = 1.0
    lam: Share = 0.95
    value_lam: Share | None = None
    length_alpha: Positive | None = None
    whiten: bool = True

    formula: ClassVar[str] = "A_t = sum_k (gamma lam)^k (r + gamma V' - V)_(t+k)"
    paper: ClassVar[str] = "1506.02438"
    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE, Column.OLD_VALUE, Column.RETURN})

    def lam_of(self, length: int) -> float:
        """The λ of the advantages of an answer with ``length`` trained tokens.

        Example:
            >>> Gae(lam=0.9).lam_of(40), Gae(length_alpha=0.05).lam_of(40)
            (0.9, 0.5)
            >>> Gae(length_alpha=0.05).lam_of(10)
            0.0
        """
        if self.length_alpha is None:
            return self.lam
        return max(0.0, 1 - 1 / (self.length_alpha * max(length, 1)))

    def check(self, at: StageContext) -> None:
        """Some term must train the value head: an untrained critic is no baseline."""
        if not any(Stat.VALUE in term.reads for term in at.terms):
            raise at.refuse(
                "gae, and no term trains the value that it reads",
                expected="a value_loss term: an untrained critic is no baseline",
                fix="add value_loss, or use group_advantage",
            )

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE``, ``OLD_VALUE`` and ``RETURN`` [T] on every member.

        Raises:
            LegalityError: a member without a reward, or a learner without a scalar head.
        """
        values = iter(tools.live.values([m.trajectory for g in groups for m in g.members]))
        found = [[self._estimate(m, next(values)) for m in g.members] for g in groups]
        advantages = [[advantage for advantage, _ in members] for members in found]
        if self.whiten and groups:
            advantages = whitened(groups, advantages)
        targets = [columns for members in found for _, columns in members]
        return attach(with_advantages(groups, advantages), targets)

    def _estimate(self, member: Scored, values_T: Array) -> tuple[Array, Mapping[Column, Array]]:
        """[T] advantages in float64, and the critic's two columns."""
        trained = predicted(member)
        values_L = values_T[trained].astype(np.float64)
        rewards_L = _rewards(member)[trained]
        lam = self.lam_of(len(trained))
        advantage_L = gae(rewards_L, values_L, gamma=self.gamma, lam=lam)
        value_lam = self.lam if self.value_lam is None else self.value_lam
        return_L = values_L + gae(rewards_L, values_L, gamma=self.gamma, lam=value_lam)
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


def predicted(member: Scored) -> Array:
    """[L] indices of the trained tokens that have a value: all but the first of a text."""
    trained = np.flatnonzero(member.trajectory.trainable)
    return trained[trained > 0]


def _rewards(member: Scored) -> Array:
    """[T] reward of each token; the last trained one also has the trajectory's reward."""
    reward = member.scalar(Column.REWARD)
    if reward is None:
        raise LegalityError(
            f"a trajectory of task {member.trajectory.task} has no reward",
            expected="a reward on every member",
            fix="add the verify or reward_model signal before gae",
        )
    earned = token_rewards(member)
    trained = predicted(member)
    if len(trained):
        earned[trained[-1]] += reward
    return earned


def _placed(values_L: Array, at: Array, num: int, *, fill: float = np.nan) -> Array:
    out = np.full(num, fill)
    out[at] = values_L
    return out
