"""The reward of the learner's likeliest answer, as a baseline.

    prompt ──greedy decoding──▶ answer ──the stage's judges──▶ its reward ──▶ BASELINE

The answer itself is not recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from posttrain.core.provenance import IntArray, Role, Sampling, Span
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.parts.base import Columns, Signal
from posttrain.parts.columns import attach
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools
from posttrain.protocols import Policy, Request


@part
class GreedyBaseline(Signal):
    """The reward of the learner's likeliest answer to each prompt (ReMax, arXiv 2310.10505).

    One more completion per group, at temperature 0. It is judged by the stage's own judges and
    never trained on: it is no member of the group, and only its reward is recorded.
    """

    paper: ClassVar[str] = "2310.10505"
    provides: ClassVar[Columns] = frozenset({Column.BASELINE})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the scalar ``BASELINE`` on every member."""
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
            Group(task=t.task, members=(Scored(trajectory=_answered(tools.live, t, c.tokens)),))
            for t, c in zip(firsts, completions, strict=True)
        ]
        rewards = [g.members[0].columns[Column.REWARD] for g in tools.judge(asked)]
        rows = zip(groups, rewards, strict=True)
        return attach(groups, [{Column.BASELINE: r} for g, r in rows for _ in g.members])


def _answered(policy: Policy, like: Trajectory, tokens: IntArray) -> Trajectory:
    """The prompt of ``like``, with these tokens as the policy's answer."""
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
