"""Signals: pairs from rewards or authors, and baselines of losses on preferences.

    REWARD ──rank_pairs──▶ PREFERENCE                               (online pairs)
    authors ──prefer_demonstration──▶ PREFERENCE                    (spin)
    LABEL, REFERENCE_LOGPROB ──log_ratio_centre──▶ LOG_RATIO_CENTRE (bco)
                               mismatched_kl──▶ MISMATCHED_KL       (kto)
    PREFERENCE, REFERENCE_LOGPROB ──match_quantiles──▶ QUANTILE     (aot)

Baselines are one number per draw, computed with the weights before the update. They are columns:
constants, equal in every micro-batch.

Shape legend: ``P`` pairs of the draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from posttrain.core.errors import LegalityError
from posttrain.core.provenance import FloatArray, Kind, Span
from posttrain.core.trajectory import Array, Column, Discard, Group, Trajectory
from posttrain.parts.base import Columns, PolicyRef, Signal, StageContext
from posttrain.parts.columns import attach, discarded
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class RankPairs(Signal):
    """The best of a group by reward is chosen, the worst rejected; the others are not trained on.

    A group of equal rewards makes no pair. Members without a pair are discarded with their reason,
    so the ledger counts them. Of equal members the first is used.
    """

    needs: ClassVar[Columns] = frozenset({Column.REWARD})
    provides: ClassVar[Columns] = frozenset({Column.PREFERENCE, Column.DISCARD})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``PREFERENCE`` (+1, −1, else 0) and ``DISCARD`` on every member."""
        return [self._score(g) for g in groups]

    def _score(self, group: Group) -> Group:
        rewards = np.array([m.columns[Column.REWARD] for m in group.members], np.float64)
        before = [discarded(m) for m in group.members]
        open_ = np.flatnonzero(np.array(before) == Discard.KEPT.code)
        signs = np.zeros(len(rewards))
        reason = Discard.EQUAL_REWARDS
        if len(open_) and rewards[open_].max() > rewards[open_].min():
            reason = Discard.UNRANKED
            signs[open_[rewards[open_].argmax()]] = 1.0
            signs[open_[rewards[open_].argmin()]] = -1.0
        members = tuple(
            m.with_columns(
                {
                    Column.PREFERENCE: np.asarray(sign),
                    Column.DISCARD: np.asarray(float(reason.code) if not (sign or old) else old),
                }
            )
            for m, sign, old in zip(group.members, signs, before, strict=True)
        )
        return Group(task=group.task, members=members)


@part
class PreferDemonstration(Signal):
    """The members of a group by ``author`` are chosen, all others rejected (SPIN, 2401.01335).

    A sample equal to a demonstration is discarded, and so are members that then have no
    counterpart.
    """

    author: Kind = Kind.EXTERNAL

    formula: ClassVar[str] = "+1 for the author's members, -1 for all others"
    paper: ClassVar[str] = "2401.01335"
    provides: ClassVar[Columns] = frozenset({Column.PREFERENCE, Column.DISCARD})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``PREFERENCE`` and ``DISCARD`` on every member."""
        return [self._score(g) for g in groups]

    def _score(self, group: Group) -> Group:
        shown = [self.author in m.trajectory.authors for m in group.members]
        texts = [m.trajectory.tokens.tobytes() for m in group.members]
        demonstrations = {t for t, s in zip(texts, shown, strict=True) if s}
        verdicts = [discarded(m) for m in group.members]
        for i, (text, given) in enumerate(zip(texts, shown, strict=True)):
            if not given and text in demonstrations:
                verdicts[i] = verdicts[i] or float(Discard.DUPLICATE.code)
        left = {s for s, v in zip(shown, verdicts, strict=True) if not v}
        if left != {True, False}:
            verdicts = [v or float(Discard.UNRANKED.code) for v in verdicts]
        members = tuple(
            m.with_columns(
                {
                    Column.PREFERENCE: np.asarray(0.0 if v else 1.0 if s else -1.0),
                    Column.DISCARD: np.asarray(v),
                }
            )
            for m, s, v in zip(group.members, shown, verdicts, strict=True)
        )
        return Group(task=group.task, members=members)


@part
class MatchQuantiles(Signal):
    """The target of each answer in optimal transport: the value of its rank (2406.05882).

    ``margins``: a pair's margin of log-probs, log π(y_w) − log π(y_l), is compared with the margin
    of the same rank among those of the reference. ``rewards``: the log-ratio of a chosen answer is
    compared with that of the same rank among the rejected of all pairs, and the other way round.

    Sorting needs all pairs of a draw, so ranks are computed here, with the weights before the
    update, and are constants in the loss: independent of micro-batches. Further updates on the
    same draw keep the ranks, and for ``rewards`` the other side's values.
    """

    of: Literal["margins", "rewards"] = "margins"

    formula: ClassVar[str] = "the i-th smallest of the other sample, for the i-th smallest of one"
    paper: ClassVar[str] = "2406.05882"
    needs: ClassVar[Columns] = frozenset({Column.PREFERENCE, Column.REFERENCE_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.QUANTILE})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``QUANTILE`` on every member; 0 on those in no pair.

        Raises:
            LegalityError: a group with more than one pair, whose values could not be assigned.
        """
        places = [_pair(g) for g in groups]
        members = [g.members[i] for g, p in zip(groups, places, strict=True) if p for i in p]
        scored = tools.live.logprobs([m.trajectory for m in members])
        pi_P2 = np.array([np.nansum(v, dtype=np.float64) for v in scored]).reshape(-1, 2)
        reference = [m.columns[Column.REFERENCE_LOGPROB] for m in members]
        ref_P2 = np.array([np.nansum(v, dtype=np.float64) for v in reference]).reshape(-1, 2)
        values = iter(quantiles(pi_P2, ref_P2, of=self.of))
        return [
            _with_quantiles(g, p, next(values) if p else None)
            for g, p in zip(groups, places, strict=True)
        ]


@part
class MismatchedKL(Signal):
    """KTO's baseline (arXiv 2402.01306): mean log-ratio of answers under other prompts.

    Every prompt of the draw is paired with the answer to another one, scored by both the live
    policy and the reference. One number per draw, from the weights before the update. A draw with
    a single prompt is refused. ``policy`` must be that of ``reference_logprobs``.
    """

    policy: PolicyRef = "input"

    formula: ClassVar[str] = "mean of log pi(y'|x) - log pi_ref(y'|x), y' of another prompt"
    paper: ClassVar[str] = "2402.01306"
    provides: ClassVar[Columns] = frozenset({Column.MISMATCHED_KL})

    def references(self) -> tuple[PolicyRef, ...]:
        """The policy."""
        return (self.policy,)

    def check(self, at: StageContext) -> None:
        """Baseline and log-ratios must use the same reference."""
        compared = (s for s in at.signals if Column.REFERENCE_LOGPROB in s.provides)
        known = {ref for s in compared for ref in s.references()}
        if self.policy not in known:
            raise at.refuse(
                f"mismatched_kl against {[self.policy]}, reference_logprobs of {sorted(known)}",
                expected="one reference: the zero point is that of the log-ratios",
                fix="name the same policy in both signals",
            )

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the scalar ``MISMATCHED_KL``, equal on all members.

        Raises:
            LegalityError: all prompts of the draw are equal.
        """
        reference = tools.policy(self.policy)
        context = min(tools.live.context, reference.context)
        crossed = mismatched([m.trajectory for g in groups for m in g.members], context=context)
        pairs = zip(tools.live.logprobs(crossed), reference.logprobs(crossed), strict=True)
        estimate = np.mean([_summed(ours - theirs) for ours, theirs in pairs])
        return _everywhere(groups, {Column.MISMATCHED_KL: np.asarray(estimate)})


@part
class LogRatioCentre(Signal):
    """BCO's shift (2404.04656): half of (mean log-ratio of good answers + mean of bad ones).

    One number per draw, from the weights before the update. With answers of one kind only, it is
    their mean.
    """

    formula: ClassVar[str] = "(mean rho of good answers + mean rho of bad answers) / 2"
    paper: ClassVar[str] = "2404.04656"
    needs: ClassVar[Columns] = frozenset({Column.LABEL, Column.REFERENCE_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.LOG_RATIO_CENTRE})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the scalar ``LOG_RATIO_CENTRE``, equal on all members."""
        members = [m for g in groups for m in g.members]
        scored = tools.live.logprobs([m.trajectory for m in members])
        ratios = [
            _summed(ours - m.columns[Column.REFERENCE_LOGPROB])
            for ours, m in zip(scored, members, strict=True)
        ]
        good = np.array([float(m.columns[Column.LABEL]) > 0 for m in members])
        sides = [np.array(ratios)[side].mean() for side in (good, ~good) if side.any()]
        return _everywhere(groups, {Column.LOG_RATIO_CENTRE: np.asarray(np.mean(sides))})


def mismatched(trajectories: Sequence[Trajectory], *, context: int) -> list[Trajectory]:
    """Each prompt with the answer of the next trajectory that has another prompt.

    Answers are truncated at ``context``. The authors of the answer's tokens stay, without their
    sampling and log-probs, since the sequence was not sampled.

    Raises:
        LegalityError: there is only one prompt.
    """
    prompts = [t.tokens[: t.prompt_length].tobytes() for t in trajectories]
    if len(set(prompts)) < 2:
        raise LegalityError(
            f"a draw of {len(trajectories)} answers to {len(set(prompts))} prompt",
            expected="at least two prompts: the baseline is over answers to other prompts",
            fix="raise groups_per_step",
        )
    crossed = []
    for index, own in enumerate(trajectories):
        ring = ((index + k) % len(trajectories) for k in range(1, len(trajectories)))
        other = next(i for i in ring if prompts[i] != prompts[index])
        crossed.append(_cross(own, trajectories[other], context=context))
    return crossed


def _cross(own: Trajectory, other: Trajectory, *, context: int) -> Trajectory:
    stop = min(len(other), other.prompt_length + max(context - own.prompt_length, 1))
    answer = slice(other.prompt_length, stop)
    return Trajectory(
        task=own.task,
        tokens=np.concatenate([own.tokens[: own.prompt_length], other.tokens[answer]]),
        prompt_length=own.prompt_length,
        spans=(*_cut(own.spans, 0, own.prompt_length), *_cut(other.spans, answer.start, stop)),
        end=other.end,
    )


def _cut(spans: Sequence[Span], start: int, stop: int) -> Iterator[Span]:
    """The spans between two positions, with authors but without sampling or log-probs."""
    at = 0
    for span in spans:
        length = min(at + span.length, stop) - max(at, start)
        at += span.length
        if length > 0:
            # A live author would imply a learner version, but this was not sampled.
            kind = Kind.TEACHER if span.is_live else span.producer.kind
            author = replace(span.producer, kind=kind)
            yield Span(length=length, role=span.role, producer=author)


def _summed(values_T: FloatArray | Array) -> float:
    """Sum over scored tokens; the others are NaN."""
    return float(np.nansum(values_T, dtype=np.float64))


def _everywhere(groups: Sequence[Group], columns: Mapping[Column, Array]) -> list[Group]:
    return attach(groups, [columns for g in groups for _ in g.members])


def quantiles(pi_P2: Array, ref_P2: Array, *, of: str) -> Array:
    """[P, 2] targets of the (chosen, rejected) answers of each pair.

    Args:
        pi_P2: [P, 2] log-probs of the policy, (chosen, rejected).
        ref_P2: [P, 2] those of the reference.
        of: ``margins`` or ``rewards``.

    Example:
        >>> pi, ref = np.array([[3.0, 0.0], [1.0, 0.0]]), np.array([[5.0, 0.0], [2.0, 0.0]])
        >>> quantiles(pi, ref, of="margins").tolist()
        [[5.0, 5.0], [2.0, 2.0]]
        >>> quantiles(pi, ref, of="rewards").tolist()  # log-ratios −2, −1 and 0, 0
        [[0.0, -2.0], [0.0, -1.0]]
    """
    if of == "margins":
        matched = _of_same_rank(pi_P2[:, 0] - pi_P2[:, 1], ref_P2[:, 0] - ref_P2[:, 1])
        return np.stack([matched, matched], 1)
    chosen, rejected = (pi_P2 - ref_P2).T
    return np.stack([_of_same_rank(chosen, rejected), _of_same_rank(rejected, chosen)], 1)


def _of_same_rank(values: Array, others: Array) -> Array:
    """For every value the one of the same rank in ``others``; ties keep their order."""
    out = np.empty_like(values)
    out[values.argsort(kind="stable")] = np.sort(others)
    return out


def _pair(group: Group) -> tuple[int, int] | None:
    """Indices of the chosen and the rejected member to train on; None without a pair."""
    signs = [0.0 if discarded(m) else (m.scalar(Column.PREFERENCE) or 0.0) for m in group.members]
    chosen, rejected = ([i for i, s in enumerate(signs) if s * side > 0] for side in (1, -1))
    if not chosen or not rejected:
        return None
    if len(chosen) + len(rejected) > 2:
        raise LegalityError(
            f"task {group.task}: {len(chosen)} chosen and {len(rejected)} rejected answers",
            expected="one of each: match_quantiles ranks pairs",
            fix="rank_pairs leaves one pair of a group",
        )
    return chosen[0], rejected[0]


def _with_quantiles(group: Group, pair: tuple[int, int] | None, values: Array | None) -> Group:
    found = dict(zip(pair, values, strict=True)) if pair and values is not None else {}
    members = tuple(
        m.with_columns({Column.QUANTILE: np.asarray(float(found.get(i, 0.0)))})
        for i, m in enumerate(group.members)
    )
    return Group(task=group.task, members=members)
