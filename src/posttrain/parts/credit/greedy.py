"""The reward of the learner's likeliest answer, as a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from posttrain.core.protocols import Policy, Request
from posttrain.core.provenance import IntArray, Role, Sampling, Span
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.parts.base import (
    Columns,
    Signal,
)
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools


@part
class GreedyBaseline(Signal):
    """The reward of the learner's likeliest answer to each prompt (ReMax, arXiv 2310.10505).

    One more completion per group, at temperature 0. It is judged and never trained on, so it is
    no member of the group and leaves no trace but its reward.
    """

    provides: ClassVar[Columns] = frozenset({Column.BASELINE})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the scalar on every member."""
        firsts = [g.members[0].trajectory for g in groups]
        greedy = Sampling(temperature=0)
        completions = tools.live.generate(
            [
                Request(
                    prompt=t.tokens[: t.prompt_length],
                    sampling=greedy,
                    max_new_tokens=tools.longest,
                )
                for t in firsts
            ]
        )
        asked = [
            Group(task=t.task, members=(Scored(trajectory=answered(tools.live, t, c.tokens)),))
            for t, c in zip(firsts, completions, strict=True)
        ]
        judged = tools.judge(asked)
        return [_with_baseline(g, j) for g, j in zip(groups, judged, strict=True)]


def answered(policy: Policy, like: Trajectory, tokens: IntArray) -> Trajectory:
    """The prompt of ``like`` with other words after it. It is judged, and then forgotten."""
    version = policy.version
    span = Span(
        length=len(tokens),
        role=Role.ASSISTANT,
        producer=policy.producer,
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
