"""Credit assignment: from rewards to an advantage per token.

    REWARD [scalar] ──┐
                      ├─ + ─▶ returns ── − baseline ──▶ ÷ scale ──▶ ADVANTAGE [T]
    TOKEN_REWARD [T] ─┘

Shape legend: ``G`` members of a group, ``T`` tokens of a trajectory, ``M`` members of a draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import ClassVar, Literal, get_args

import numpy as np

from posttrain.core.bounds import Number, Positive, Size
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.trajectory import Array, Column, Group, Scored
from posttrain.parts.base import Columns, Signal
from posttrain.parts.columns import attach, discarded
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools

GroupBaseline = Literal["group_mean", "leave_one_out", "length_weighted"]
"""Baselines from a member's own group."""

Baseline = Literal[
    "group_mean", "leave_one_out", "length_weighted", "batch_mean", "greedy", "constant"
]
Scale = Literal["std", "none", "batch_std", "whiten", "informative"]

EPSILON = 1e-6
"""Added to the standard deviation, as in GRPO's reference code."""


@part
class GroupAdvantage(Signal):
    """The return R minus a baseline b, scaled, spread over the completion's tokens.

    | ``baseline`` | b_i | source |
    |---|---|---|
    | ``group_mean`` | mean of the group | GRPO 2402.03300, Dr.GRPO 2503.20783 |
    | ``leave_one_out`` | mean of the siblings, so A = G/(G−1)·(R − mean) | RLOO 2402.14740 |
    | ``length_weighted`` | Σ_j l_j R_j / Σ_j l_j, l tokens written | OPO 2505.23585 |
    | ``batch_mean`` | mean of the draw | REINFORCE |
    | ``greedy`` | reward of the likeliest answer | ReMax 2310.10505 |
    | ``constant`` | ``value`` | REINFORCE |

    | ``scale`` | divides R − b by | source |
    |---|---|---|
    | ``std`` | unbiased std of the group's R, + 1e-6 | GRPO |
    | ``none`` | 1 | Dr.GRPO, RLOO, OPO |
    | ``batch_std`` | unbiased std of the draw's R, + 1e-6 | Lite-PPO 2508.08221 |
    | ``whiten`` | subtracts the mean and divides by the std of R − b over the draw's trained tokens | REINFORCE++ 2501.03262 |
    | ``informative`` | share of members whose group has unequal R | GPG 2504.02546 |

    ``credit: to_go`` gives a token the token rewards at or after it, not all of them.
    ``kept_only`` compares members with those of their group that no earlier signal discarded; the
    others, and groups with too few of them, get exactly 0.
    A group of equal returns gets exactly 0 with a baseline of the group (with ``whiten``, when
    the whole draw is equal). Baselines of the group refuse a group of one.
    """  # noqa: E501

    baseline: Baseline = "group_mean"
    value: Number | None = None
    scale: Scale = "std"
    credit: Literal["outcome", "to_go"] = "outcome"
    kept_only: bool = False

    formula: ClassVar[str] = "A = (R - b) / scale"
    paper: ClassVar[str] = "2402.03300"
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if (self.baseline == "constant") != (self.value is not None):
            raise ConfigError(
                f"group_advantage with baseline={self.baseline}, value={self.value}",
                expected="a value with baseline constant, and with no other",
            )
        if self.scale in ("std", "informative") and not self.of_the_group:
            raise ConfigError(
                f"group_advantage with baseline={self.baseline}, scale={self.scale}",
                expected="a baseline of the group: group_mean, leave_one_out or length_weighted",
                fix="scale none, batch_std or whiten",
            )

    @property
    def of_the_group(self) -> bool:
        """True when the baseline comes from the member's own group."""
        return self.baseline in get_args(GroupBaseline)

    @property
    def needs(self) -> Columns:
        """The reward, and the columns that the options need."""
        extra = {Column.BASELINE} if self.baseline == "greedy" else set()
        extra |= {Column.TOKEN_REWARD} if self.credit == "to_go" else set()
        extra |= {Column.DISCARD} if self.kept_only else set()
        return frozenset({Column.REWARD}) | extra

    @property
    def min_group(self) -> int:
        """Members that a group must have."""
        return 2 if self.of_the_group else 1

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE`` [T] on every member."""
        return self._among_remaining(groups) if self.kept_only else self._of_all(groups)

    def _among_remaining(self, groups: Sequence[Group]) -> list[Group]:
        """Advantages among the members not discarded; 0 for the others."""
        kept = [[m for m in g.members if not discarded(m)] for g in groups]
        enough = [ms if len(ms) >= self.min_group else [] for ms in kept]
        among = [
            Group(task=g.task, members=tuple(ms))
            for g, ms in zip(groups, enough, strict=True)
            if ms
        ]
        found = {
            id(m.trajectory): m.columns[Column.ADVANTAGE]
            for g in self._of_all(among)
            for m in g.members
        }
        values = [
            [found.get(id(m.trajectory), np.zeros(len(m.trajectory))) for m in g.members]
            for g in groups
        ]
        return with_advantages(groups, values)

    def _of_all(self, groups: Sequence[Group]) -> list[Group]:
        if not groups:
            return []
        returns = [member_returns(g, at_least=self.min_group) for g in groups]
        centred = [r - b for r, b in zip(returns, self._baselines(groups, returns), strict=True)]
        values = [
            [self._per_token(m, float(a)) for m, a in zip(g.members, c, strict=True)]
            for g, c in zip(groups, centred, strict=True)
        ]
        return with_advantages(groups, self._scaled(groups, returns, values))

    def _baselines(self, groups: Sequence[Group], returns: Sequence[Array]) -> list[Array]:
        if self.baseline == "constant":
            return [np.full_like(r, self.value) for r in returns]
        if self.baseline == "greedy":
            return [
                np.array([float(m.columns[Column.BASELINE]) for m in g.members]) for g in groups
            ]
        if self.baseline == "batch_mean":
            every = self._whole_draw(returns)
            same = bool((every == every[0]).all())
            return [np.full_like(r, every[0] if same else every.mean()) for r in returns]
        return [
            group_baseline(r, kind=self.baseline, lengths_G=_lengths(g))
            for g, r in zip(groups, returns, strict=True)
        ]

    def _per_token(self, member: Scored, centred: float) -> Array:
        """[T] float64, before scaling."""
        values = np.full(len(member.trajectory), centred)
        if self.credit == "to_go":
            earned = token_rewards(member)
            values -= np.cumsum(earned) - earned  # what was earned before the token
        return values

    def _scaled(
        self, groups: Sequence[Group], returns: Sequence[Array], values: list[list[Array]]
    ) -> list[list[Array]]:
        scale = self.scale
        if scale == "whiten":
            return whitened(groups, values)
        if scale == "std":
            divisors = [float(r.std(ddof=1)) + EPSILON for r in returns]
        elif scale == "batch_std":
            divisors = [float(self._whole_draw(returns).std(ddof=1)) + EPSILON] * len(groups)
        elif scale == "informative":
            unequal = sum(len(r) for r in returns if not _equal(r))
            # Without any difference every advantage is 0, for any divisor.
            divisors = [unequal / sum(map(len, returns)) if unequal else 1.0] * len(groups)
        else:
            divisors = [1.0] * len(groups)
        return [[v / d for v in vs] for vs, d in zip(values, divisors, strict=True)]

    def _whole_draw(self, returns: Sequence[Array]) -> Array:
        """[M] returns of the whole draw, which must hold at least two."""
        every = np.concatenate(returns)
        if len(every) < 2:
            raise LegalityError(
                f"group_advantage with baseline={self.baseline}, scale={self.scale} "
                "on one trajectory",
                expected="at least two in the draw: one has no mean to differ from",
                fix="raise groups_per_step or group_size",
            )
        return every


@part
class BestOfKAdvantage(Signal):
    """A member's contribution to the best of k (arXiv 2503.19595).

    The mean of max R_S − max R_{S without it} over the sets S of k members that hold it. With
    rewards 0 and 1 the best of k is pass@k.

    Σ_i A_i ∇log π_i is an unbiased gradient of the expected best of k, times G/k. For k = G only
    the best member has credit: its margin over the second best. ``k: null`` is the group's size.
    """

    k: Size | None = None

    formula: ClassVar[str] = "A = mean of max R_S - max R_(S without i) over k-sets S with i"
    paper: ClassVar[str] = "2503.19595"
    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 2:
            raise ConfigError(
                f"best_of_k_advantage with k={self.k}",
                expected="at least 2: with k = 1 there is nothing to compare with",
                fix="group_advantage with baseline leave_one_out is the advantage for k = 1",
            )

    @property
    def min_group(self) -> int:
        """Members that a group must have."""
        return self.k or 2

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE`` [T] on every member."""
        values = []
        for group in groups:
            returns = member_returns(group, at_least=self.min_group)
            credit = best_of_k(returns, k=self.k or len(returns))
            rows = zip(group.members, credit, strict=True)
            values.append([np.full(len(m.trajectory), a) for m, a in rows])
        return with_advantages(groups, values)


@part
class DecoupledAdvantage(Signal):
    """Each reward is normalised separately within its group (GDPO, arXiv 2601.05242).

    a_i = Σ_k w_k (r_ik − mean_k) / (std_k + 1e-6), then a is normalised over the draw.

    The two rewards are the verifier's and the sum of the token rewards (such as a length penalty).
    If they were summed first, the one of larger variance would dominate.
    """

    weights: tuple[Positive, Positive] = (1.0, 1.0)

    formula: ClassVar[str] = "A = normalised sum of w_k (r_k - mean_k) / std_k"
    paper: ClassVar[str] = "2601.05242"
    needs: ClassVar[Columns] = frozenset({Column.REWARD, Column.TOKEN_REWARD})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})
    min_group: ClassVar[int] = 2

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE`` [T] on every member."""
        if not groups:
            return []
        sums = []
        for group in groups:
            given = member_rewards(group, at_least=self.min_group)
            earned = np.array([token_rewards(m).sum() for m in group.members])
            parts = zip(self.weights, (given, earned), strict=True)
            sums.append(sum((w * group_advantages(r, scale="std") for w, r in parts), given * 0))
        every = np.concatenate(sums)
        mean, std = float(every.mean()), float(every.std(ddof=1)) + EPSILON
        if _equal(every):
            mean, std = float(every[0]), 1.0
        values = [
            [
                np.full(len(m.trajectory), (a - mean) / std)
                for m, a in zip(g.members, s, strict=True)
            ]
            for g, s in zip(groups, sums, strict=True)
        ]
        return with_advantages(groups, values)


def group_advantages(rewards_G: Array, *, scale: Literal["std", "none"]) -> Array:
    """[G] rewards -> [G] advantages over the group's mean, with or without the std.

    Example:
        >>> group_advantages(np.array([1.0, 0.0]), scale="none").tolist()
        [0.5, -0.5]
        >>> group_advantages(np.array([3.0, 3.0]), scale="std").tolist()
        [0.0, 0.0]
    """
    centred = rewards_G - group_baseline(rewards_G, kind="group_mean", lengths_G=rewards_G)
    return centred / (float(rewards_G.std(ddof=1)) + EPSILON) if scale == "std" else centred


def group_baseline(returns_G: Array, *, kind: GroupBaseline, lengths_G: Array) -> Array:
    """[G] baseline of each member; the return itself when all are equal.

    Args:
        returns_G: at least two.
        kind: as in the table of :class:`GroupAdvantage`.
        lengths_G: trained tokens per member.

    Example:
        >>> group_baseline(np.array([3.0, 0.0, 0.0]), kind="leave_one_out",
        ...                lengths_G=np.ones(3)).tolist()
        [0.0, 1.5, 1.5]
        >>> group_baseline(np.array([1.0, 0.0]), kind="length_weighted",
        ...                lengths_G=np.array([3.0, 1.0])).tolist()
        [0.75, 0.75]
    """
    if _equal(returns_G):
        return returns_G  # exactly: rounding noise divided by EPSILON would be large
    if kind == "leave_one_out":
        return (float(returns_G.sum()) - returns_G) / (len(returns_G) - 1)
    if kind == "length_weighted":
        return np.full_like(returns_G, float(lengths_G @ returns_G) / float(lengths_G.sum()))
    return np.full_like(returns_G, float(returns_G.mean()))


def best_of_k(returns_G: Array, *, k: int) -> Array:
    """[G] mean over all k-sets S that hold a member of max R_S − max R_{S without it}.

    Sorted, member j is the largest of C(j, k−2) of the C(G−1, k−1) sets of siblings.

    Example:
        >>> best_of_k(np.array([1.0, 0.0, 0.25]), k=3).tolist()
        [0.75, 0.0, 0.0]
        >>> best_of_k(np.array([1.0, 1.0, 0.0]), k=2).tolist()
        [0.5, 0.5, 0.0]
    """
    out = np.zeros(len(returns_G))
    share = [comb(j, k - 2) / comb(len(returns_G) - 1, k - 1) for j in range(len(returns_G) - 1)]
    for i, own in enumerate(returns_G):
        siblings = np.sort(np.delete(returns_G, i))
        out[i] = float(np.maximum(own - siblings, 0) @ np.array(share))
    return out


def whitened(groups: Sequence[Group], values: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """Values with mean 0 and unbiased standard deviation 1 over the draw's *trained* tokens."""
    flat = [
        v[m.trajectory.trainable]
        for g, vs in zip(groups, values, strict=True)
        for m, v in zip(g.members, vs, strict=True)
    ]
    every = np.concatenate(flat)
    if not len(every) or _equal(every):
        return [[np.zeros_like(v) for v in vs] for vs in values]
    mean, std = float(every.mean()), float(every.std(ddof=1)) + EPSILON
    return [[(v - mean) / std for v in vs] for vs in values]


def token_rewards(member: Scored) -> Array:
    """[T] float64 rewards of single tokens; 0 outside trained tokens, and without a column."""
    mask = member.trajectory.trainable
    given = member.columns.get(Column.TOKEN_REWARD)
    return np.zeros(len(mask)) if given is None else np.where(mask, given.astype(np.float64), 0.0)


def member_rewards(group: Group, *, at_least: int) -> Array:
    """[G] the verifier's rewards.

    Raises:
        LegalityError: fewer members than ``at_least``, or one without a reward.
    """
    rewards = [m.scalar(Column.REWARD) for m in group.members]
    if len(rewards) < at_least or any(r is None for r in rewards):
        raise LegalityError(
            f"task {group.task}: a group of {len(rewards)} with rewards {rewards}",
            expected=f"at least {_count(at_least)}, each with a reward",
            fix="raise group_size; add the verify signal before the one that assigns credit",
        )
    return np.array(rewards, np.float64)


def member_returns(group: Group, *, at_least: int) -> Array:
    """[G] the verifier's reward plus every token reward."""
    earned = np.array([token_rewards(m).sum() for m in group.members])
    return np.asarray(member_rewards(group, at_least=at_least) + earned)


def with_advantages(groups: Sequence[Group], values: Sequence[Sequence[Array]]) -> list[Group]:
    """The groups with ``ADVANTAGE`` [T] in float32 on every member."""
    return attach(groups, [{Column.ADVANTAGE: v.astype(np.float32)} for vs in values for v in vs])


def _lengths(group: Group) -> Array:
    return np.array([float(m.trajectory.trainable.sum()) for m in group.members])


def _equal(values: Array) -> bool:
    return bool((values == values[0]).all())


def _count(at_least: int) -> str:
    return {1: "one member", 2: "two members"}.get(at_least, f"{at_least} members")
