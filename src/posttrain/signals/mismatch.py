"""Signals that ask the live learner: its own log-probs, and its likeliest answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.core.protocols import Policy, Request, Signal
from posttrain.core.provenance import Role, Sampling, Span
from posttrain.core.trajectory import Column, Group, Scored, Trajectory


@final
@dataclass(frozen=True, slots=True, eq=False)
class TrainerLogprobsSignal:
    """Adds ``TRAINER_LOGPROB`` [T]: the learner's scoring of what its sampler wrote."""

    policy: Policy  # the live one, asked before the update

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the column on every member."""
        values = iter(self.policy.logprobs([m.trajectory for g in groups for m in g.members]))
        return [
            Group(
                task=g.task,
                members=tuple(
                    m.with_columns({Column.TRAINER_LOGPROB: next(values)}) for m in g.members
                ),
            )
            for g in groups
        ]


@final
@dataclass(frozen=True, slots=True, eq=False)
class GreedyBaselineSignal:
    """Adds ``BASELINE``: the reward of the learner's likeliest answer to the group's prompt."""

    policy: Policy  # the live one
    judge: Signal  # writes REWARD
    max_new_tokens: int

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the scalar on every member."""
        firsts = [g.members[0].trajectory for g in groups]
        greedy = Sampling(temperature=0)
        completions = self.policy.generate(
            [
                Request(
                    prompt=t.tokens[: t.prompt_length],
                    sampling=greedy,
                    max_new_tokens=self.max_new_tokens,
                )
                for t in firsts
            ]
        )
        asked = [
            Group(task=t.task, members=(Scored(trajectory=self._answer(t, c.tokens)),))
            for t, c in zip(firsts, completions, strict=True)
        ]
        judged = self.judge.score(asked)
        return [_with_baseline(g, j) for g, j in zip(groups, judged, strict=True)]

    def _answer(self, like: Trajectory, tokens: np.ndarray) -> Trajectory:
        """The prompt of ``like`` with other words after it. It is judged, and then forgotten."""
        version = self.policy.version
        span = Span(
            length=len(tokens),
            role=Role.ASSISTANT,
            producer=self.policy.producer,
            versions=None if version is None else (version, version),
            sampling=Sampling(temperature=0),
        )
        cut = like.prompt_length
        return Trajectory(
            task=like.task,
            tokens=np.concatenate([like.tokens[:cut], tokens]).astype(np.int32),
            prompt_length=cut,
            spans=(*_spans_before(like, cut), span),
        )


def mismatch_metrics(groups: Sequence[Group]) -> Mapping[str, float]:
    """How far the sampler's probabilities are from the trainer's; empty without the column.

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
    logs = logs[np.isfinite(logs)]  # others' tokens were sampled by nobody we know
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


def _spans_before(trajectory: Trajectory, cut: int) -> list[Span]:
    """The spans that tile the prompt."""
    out, at = list[Span](), 0
    for span in trajectory.spans:
        if at >= cut:
            break
        out.append(span)
        at += span.length
    return out


def _with_baseline(group: Group, judged: Group) -> Group:
    baseline = judged.members[0].columns[Column.REWARD]
    members = tuple(m.with_columns({Column.BASELINE: baseline}) for m in group.members)
    return Group(task=group.task, members=members)
