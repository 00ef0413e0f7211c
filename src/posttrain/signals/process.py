"""Judges of steps: a process model's rewards, and labels by roll-outs from prefixes.

    answer        s₁ ⏎ s₂ ⏎ s₃        step ends of posttrain.steps
    process       p₁   p₂   p₃        σ(score) after each end
    roll-outs     s₁ ⏎ ~~~~~ right    share of continuations that succeed = label of s₁
                  s₁ ⏎ ~~~~~ wrong

Shape legend: ``T`` tokens of a trajectory, ``K`` steps of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition.reward_models import ProcessReward, StepLabels
from posttrain.core.errors import LegalityError, TaskError
from posttrain.core.protocols import Policy, Renderer, Request, Signal
from posttrain.core.provenance import IntArray, Role, Sampling, Span
from posttrain.core.trajectory import Array, Column, Group, Scored, Trajectory
from posttrain.signals.reward_model import rewarded, sigmoid
from posttrain.signals.shaping import add_token_rewards
from posttrain.steps import NO_STEP, step_ends


@final
@dataclass(frozen=True, slots=True, eq=False)
class ProcessScores:
    """Writes ``STEP_REWARD`` [T], NaN between step ends, and what its ``use`` makes of it.

    Raises:
        LegalityError: the policy has no scalar head.
    """

    spec: ProcessReward
    policy: Policy
    renderer: Renderer  # the learner's

    def __post_init__(self) -> None:
        self.policy.scores([])  # refuses a model without a head before anything is drawn

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with step rewards, and rewards or token rewards, on every member."""
        scores = iter(self.policy.scores([m.trajectory for g in groups for m in g.members]))
        spec = self.spec
        judged, dense = list[Group](), list[list[Array]]()
        for group in groups:
            members, extra = list[Scored](), list[Array]()
            for member in group.members:
                ends, steps_K = self._steps(member.trajectory, next(scores))
                step_T = np.full(len(member.trajectory), np.nan)
                step_T[ends] = steps_K
                scored = member.with_columns({Column.STEP_REWARD: step_T})
                earned = np.zeros(len(step_T))
                if spec.use in ("dense", "progress"):
                    gains = np.diff(steps_K, prepend=0.0) if spec.use == "progress" else steps_K
                    earned[ends] = spec.weight * gains
                else:
                    value = aggregated(steps_K, use=spec.use)
                    scored = rewarded(scored, value, weight=spec.weight, add=spec.add)
                members.append(scored)
                extra.append(earned)
            judged.append(Group(task=group.task, members=tuple(members)))
            dense.append(extra)
        return add_token_rewards(judged, dense) if spec.use in ("dense", "progress") else judged

    def _steps(self, trajectory: Trajectory, scores_T: Array) -> tuple[Array, Array]:
        """[K] step ends, and the probabilities that the steps are good."""
        ends = step_ends(self.renderer, trajectory, self.spec.steps)
        if not len(ends):
            raise LegalityError(
                f"a trajectory of task {trajectory.task} without a step to judge",
                expected="at least one trained token",
            )
        return ends, np.array([sigmoid(float(s)) for s in scores_T[ends]])


def aggregated(steps_K: Array, *, use: str) -> float:
    """One number for an answer from those of its steps: ``min``, ``product`` or ``last``.

    Example:
        >>> [aggregated(np.array([0.5, 0.25, 1.0]), use=u) for u in ("min", "product", "last")]
        [0.25, 0.125, 1.0]
    """
    if use == "last":
        return float(steps_K[-1])
    return float(steps_K.min() if use == "min" else steps_K.prod())


@final
@dataclass(frozen=True, slots=True, eq=False)
class StepLabelsByRollout:
    """Writes ``STEP_LABEL`` [T]: 0 to 1 at step ends, −1 elsewhere.

    Everything random follows from ``seed`` and the trajectory.
    """

    spec: StepLabels
    policy: Policy  # writes the continuations
    judge: Signal  # writes REWARD
    success: Mapping[str, float]  # by task set: a reward of at least this counts
    renderer: Renderer  # the learner's
    seed: int

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the column on every member."""
        members = [m for g in groups for m in g.members]
        ends = [step_ends(self.renderer, m.trajectory, self.spec.steps) for m in members]
        asked = [self._requests(m.trajectory, e) for m, e in zip(members, ends, strict=True)]
        done = iter(self.policy.generate([r for requests in asked for r in requests]))
        tried: list[Group] = []
        for member, requests in zip(members, asked, strict=True):
            # The answer itself stands last: its own success is the label of its last step.
            whole = [np.concatenate([r.prompt, next(done).tokens]) for r in requests]
            tried.append(self._attempts(member.trajectory, [*whole, member.trajectory.tokens]))
        judged = self.judge.score(tried)
        labelled = iter(
            member.with_columns({Column.STEP_LABEL: self._labels(member.trajectory, e, group)})
            for member, e, group in zip(members, ends, judged, strict=True)
        )
        return [
            Group(task=g.task, members=tuple(next(labelled) for _ in g.members)) for g in groups
        ]

    def _requests(self, trajectory: Trajectory, ends: Array) -> list[Request]:
        """``samples`` continuations from every end but the last, step by step."""
        return [
            Request(
                prompt=trajectory.tokens[: end + 1],
                sampling=Sampling(seed=self._seed(trajectory, end, number)),
                max_new_tokens=self.spec.max_new_tokens,
            )
            for end in ends[:-1].tolist()
            for number in range(self.spec.samples)
        ]

    def _seed(self, trajectory: Trajectory, end: int, number: int) -> int:
        return zlib.crc32(f"{self.seed}/{trajectory.id}/{end}/{number}".encode())

    def _attempts(self, trajectory: Trajectory, texts: Sequence[IntArray]) -> Group:
        """Prompt and another answer each. They are judged, and then forgotten."""
        version = self.policy.version
        cut = trajectory.prompt_length
        members = []
        for tokens in texts:
            span = Span(
                length=len(tokens),
                role=Role.ASSISTANT,
                producer=self.policy.producer,
                versions=None if version is None else (version, version),
            )
            attempt = Trajectory(
                task=trajectory.task,
                tokens=tokens.astype(np.int32),
                prompt_length=cut,
                spans=(span,),
            )
            members.append(Scored(trajectory=attempt))
        return Group(task=trajectory.task, members=tuple(members))

    def _labels(self, trajectory: Trajectory, ends: Array, judged: Group) -> Array:
        """[T] from the rewards of the attempts."""
        taskset = trajectory.task.rpartition("/")[0]
        if taskset not in self.success:
            raise TaskError(
                f"a trajectory of task {trajectory.task}, and no task set {taskset!r}",
                expected=f"one of {', '.join(sorted(self.success)) or '(none)'}",
            )
        right = [float(m.columns[Column.REWARD]) >= self.success[taskset] for m in judged.members]
        *tries, own = right
        by_step = np.array(tries, np.float64).reshape(len(ends[:-1]), self.spec.samples)
        labels = np.full(len(trajectory), NO_STEP)
        if len(ends):
            shares = by_step.max(-1) if self.spec.labels == "hard" else by_step.mean(-1)
            labels[ends[:-1]], labels[ends[-1]] = shares, float(own)
        return labels
