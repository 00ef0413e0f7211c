"""Selection of trajectories and tokens for an update.

    keep_informative, drop_cut_off, imitate_failures ──▶ DISCARD     trajectories left out
    clip_covariance ──▶ ADVANTAGE 0                                  tokens without a gradient
    mark_covariance, mark_entropy ──▶ MARK                           tokens that terms select by

A verdict is a column: ``DISCARD`` holds a reason, admission acts on it, and the record keeps the
trajectory with that reason.

Shape legend: ``N`` trained tokens of a draw, ``T`` tokens of a trajectory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

from posttrain.core.bounds import Inner, Number, Whole
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Array, Column, Discard, End, Group, Scored
from posttrain.parts.base import Columns, Signal
from posttrain.parts.columns import discarded, with_verdicts
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class KeepInformative(Signal):
    """Discards groups whose verifier rewards are all equal (DAPO's dynamic sampling, 2503.14476).

    They give no gradient; without them a token mean is over the other groups only. Discarded
    trajectories stay in the record with their reason. The paper also draws more groups until the
    batch is full; here a step is smaller when groups are discarded.
    """

    paper: ClassVar[str] = "2503.14476"
    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})
    sieves: ClassVar[bool] = True
    min_group: ClassVar[int] = 2

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``DISCARD`` on every member."""
        return [with_verdicts(g, self._verdict(g)) for g in groups]

    def _verdict(self, group: Group) -> Callable[[Scored], Discard]:
        rewards = [m.scalar(Column.REWARD) for m in group.members]
        if len(rewards) < self.min_group or None in rewards:
            raise LegalityError(
                f"task {group.task}: a group of {len(rewards)} with rewards {rewards}",
                expected="at least two members, each with a reward",
                fix="raise group_size; add the verify signal before keep_informative",
            )
        reason = Discard.EQUAL_REWARDS if len(set(rewards)) == 1 else Discard.KEPT
        return lambda member: reason


@part
class DropCutOff(Signal):
    """Discards truncated answers (DAPO's overlong filtering, 2503.14476).

    They count in their group's mean and std, as in the paper, but not in the loss.
    """

    paper: ClassVar[str] = "2503.14476"
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})
    sieves: ClassVar[bool] = True

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``DISCARD`` on every member."""

        def verdict(member: Scored) -> Discard:
            done = member.trajectory.end is End.COMPLETED
            return Discard.KEPT if done else Discard.CUT_OFF

        return [with_verdicts(g, verdict) for g in groups]


@part
class ClipCovariance(Signal):
    """No gradient at a few tokens of high covariance, against entropy loss (Clip-Cov, 2505.22617).

    A token's covariance is (A − mean A)(log π − mean log π) over the draw's trained tokens, with
    the log-probs it was sampled with. Of those strictly between ``low`` and ``high`` a random
    ``share`` of all tokens (at least one) gets advantage 0, and still counts in every mean.
    """

    share: Inner = 2e-4
    low: Number = 1.0
    high: Number = 5.0

    formula: ClassVar[str] = "A = 0 at a random share of tokens with low < covariance < high"
    paper: ClassVar[str] = "2505.22617"
    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE, Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.low >= self.high:
            raise ConfigError(
                f"clip_covariance with share={self.share}, low={self.low}, high={self.high}",
                expected="0 < share < 1 and low < high",
            )

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``ADVANTAGE`` 0 at the chosen tokens."""
        cov_N = covariances(groups)
        chosen = np.flatnonzero((cov_N > self.low) & (cov_N < self.high))
        most = max(int(self.share * len(cov_N)), 1)
        # Seeded by the draw's tokens, so that a resumed run repeats it.
        ids = "".join(m.trajectory.id for g in groups for m in g.members)
        rng = np.random.default_rng(zlib.crc32(ids.encode()))
        picked = rng.permutation(chosen)[:most]
        return _at_tokens(groups, picked, _without_advantage)


@part
class MarkCovariance(Signal):
    """Marks the ``share`` of tokens of largest covariance (KL-Cov, arXiv 2505.22617).

    At least one; the covariance is that of ``clip_covariance``. The ``log_ratio_penalty`` term
    reads the marks.
    """

    share: Inner = 2e-4

    paper: ClassVar[str] = "2505.22617"
    needs: ClassVar[Columns] = frozenset({Column.ADVANTAGE, Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.MARK})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``MARK`` on every member."""
        cov_N = covariances(groups)
        most = max(int(self.share * len(cov_N)), 1)
        return _at_tokens(groups, np.argsort(-cov_N, kind="stable")[:most], _marked)


@part
class MarkEntropy(Signal):
    """Marks the ⌈share · N⌉ of a draw's N trained tokens with the highest entropy.

    Entropies are those of the sampled distribution, at its temperature.

    For terms with ``limit: {marked: true}`` (arXiv 2506.01939, which takes a fifth of a batch).
    One more pass over the draw, with the weights before the update. Discarded answers neither
    count nor are marked. Of equal entropies the earlier token is marked.
    """

    share: Inner = 0.2

    paper: ClassVar[str] = "2506.01939"
    provides: ClassVar[Columns] = frozenset({Column.MARK})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``MARK`` on every member."""
        members = [m for g in groups for m in g.members]
        scored = tools.live.entropies([m.trajectory for m in members])
        parts = [
            np.where(bool(discarded(m)), -np.inf, v[m.trajectory.trainable])
            for m, v in zip(members, scored, strict=True)
        ]
        entropy_N = np.concatenate(parts) if parts else np.zeros(0)
        # Without a prompt the first token has no prediction: its entropy is NaN.
        entropy_N = np.where(np.isnan(entropy_N), -np.inf, entropy_N)
        # Minus 1e-9: 0.1 * 30 must not become 4 by rounding.
        most = int(np.ceil(self.share * np.isfinite(entropy_N).sum() - 1e-9))
        return _at_tokens(groups, np.argsort(-entropy_N, kind="stable")[:most], _marked)


@part
class ImitateFailures(Signal):
    """Failing groups train on the demonstration, others on their rollouts (HPT, 2509.04419).

    A group in which at most ``gate`` rollouts have a reward of ``success`` or more keeps its
    members by ``author`` and discards the rollouts; any other group does the opposite.
    """

    gate: Whole = 0
    success: Number = 1.0
    author: Kind = Kind.EXTERNAL

    paper: ClassVar[str] = "2509.04419"
    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.DISCARD})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``DISCARD`` on every member."""
        return [with_verdicts(g, self._verdict(g)) for g in groups]

    def _verdict(self, group: Group) -> Callable[[Scored], Discard]:
        def shown(member: Scored) -> bool:
            return self.author in member.trajectory.authors

        rewards = [float(m.columns[Column.REWARD]) for m in group.members if not shown(m)]
        failed = sum(r >= self.success for r in rewards) <= self.gate
        if failed:
            return lambda member: Discard.KEPT if shown(member) else Discard.IMITATED
        return lambda member: Discard.NOT_NEEDED if shown(member) else Discard.KEPT


def covariances(groups: Sequence[Group]) -> Array:
    """[N] (A − mean A)(log π − mean log π) over the draw's trained tokens, in order."""

    def flat(column: Column) -> Array:
        parts = [m.columns[column][m.trajectory.trainable] for g in groups for m in g.members]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)

    advantage_N, logprob_N = flat(Column.ADVANTAGE), flat(Column.BEHAVIOUR_LOGPROB)
    if not len(advantage_N):
        return advantage_N
    centred_N = advantage_N - float(advantage_N.mean())
    return np.asarray(centred_N * (logprob_N - float(logprob_N.mean())))


def _without_advantage(member: Scored, chosen: Array) -> Scored:
    advantage = np.where(chosen, np.float32(0), member.columns[Column.ADVANTAGE])
    return member.with_columns({Column.ADVANTAGE: advantage})


def _marked(member: Scored, chosen: Array) -> Scored:
    return member.with_columns({Column.MARK: chosen.astype(np.float32)})


def _at_tokens(
    groups: Sequence[Group], picked: Array, change: Callable[[Scored, Array], Scored]
) -> list[Group]:
    """``change`` applied to every member with its [T] mask of picked tokens."""
    at, out = 0, []
    for group in groups:
        members = []
        for member in group.members:
            trained = np.flatnonzero(member.trajectory.trainable)
            chosen = np.zeros(len(member.trajectory), np.bool_)
            chosen[trained] = np.isin(np.arange(at, at + len(trained)), picked)
            at += len(trained)
            members.append(change(member, chosen))
        out.append(Group(task=group.task, members=tuple(members)))
    return out
