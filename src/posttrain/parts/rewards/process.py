"""Signals on steps: process reward models, and labels by roll-outs from prefixes.

    process model ──score after each step──▶ process_reward ──▶ STEP_REWARD, then REWARD
                                                                (min, product, last)
                                                                or TOKEN_REWARD (dense, progress)
    policy ──continuations from each step──▶ verifier ──▶ step_labels ──▶ STEP_LABEL

Shape legend: ``T`` tokens of a trajectory, ``K`` steps of an answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from posttrain.core.bounds import Size, Tokens
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import IntArray, Role, Sampling, Span
from posttrain.core.trajectory import Array, Column, Group, Scored, Trajectory
from posttrain.parts.base import Columns, PolicyRef, Signal, StageContext
from posttrain.parts.columns import trajectories_of
from posttrain.parts.credit.shaping import add_token_rewards
from posttrain.parts.registry import part
from posttrain.parts.rewards.judges import LearntJudge, sigmoid
from posttrain.parts.rewards.steps import NO_STEP, Steps, step_ends
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.tools import Tools
from posttrain.protocols import Policy, Request


@part
class ProcessReward(LearntJudge):
    """``STEP_REWARD``: a frozen process model's score of every step, p_k = σ(s_k) after its end.

    | ``use`` | writes |
    |---|---|
    | ``min`` | ``REWARD`` = the smallest p_k: an answer is as good as its weakest step |
    | ``product`` | ``REWARD`` = the product of all p_k |
    | ``last`` | ``REWARD`` = p of the last step |
    | ``dense`` | ``TOKEN_REWARD`` p_k where step k ends: the more steps, the more reward |
    | ``progress`` | ``TOKEN_REWARD`` p_k − p_{k−1} where step k ends, p_0 = 0; the sum is p_last |

    All times ``weight``. ``add`` adds to the existing ``REWARD``. Token rewards always add up, and
    also need a ``REWARD`` (0 is enough). ``progress`` is a difference of scores, not the advantage
    under a prover that PAV defines.

    Unconfirmed: ``min`` and ``product`` are from general knowledge.
    """

    use: Literal["min", "product", "last", "dense", "progress"] = "min"
    steps: Steps = Steps()

    formula: ClassVar[str] = "p_k = sigmoid(s_k) after step k; min, product, last or differences"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.add and self.per_token:
            raise ConfigError(
                f"process_reward with use={self.use} and add",
                expected="add with min, product or last: token rewards add up by themselves",
                fix="drop add",
            )

    @property
    def per_token(self) -> bool:
        """True when it rewards tokens, and not the whole answer."""
        return self.use in ("dense", "progress")

    @property
    def provides(self) -> Columns:
        """Step rewards, and the rewards or token rewards from them."""
        made = Column.TOKEN_REWARD if self.per_token else Column.REWARD
        return frozenset({Column.STEP_REWARD, made})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with step rewards, and rewards or token rewards, on every member."""
        scores = iter(tools.policy(self.model).scores(trajectories_of(groups)))
        judged, earned = list[Group](), list[list[Array]]()
        for group in groups:
            pairs = [self._judged(m, next(scores), tools) for m in group.members]
            judged.append(Group(task=group.task, members=tuple(m for m, _ in pairs)))
            earned.append([earned_T for _, earned_T in pairs])
        return add_token_rewards(judged, earned) if self.per_token else judged

    def _judged(self, member: Scored, scores_T: Array, tools: Tools) -> tuple[Scored, Array]:
        """The member with its step rewards, and [T] their token rewards."""
        ends, steps_K = self._steps(member.trajectory, scores_T, tools)
        step_T = np.full(len(member.trajectory), np.nan)
        step_T[ends] = steps_K
        scored, earned_T = member.with_columns({Column.STEP_REWARD: step_T}), np.zeros(len(step_T))
        if not self.per_token:
            return self.rewarded(scored, aggregated(steps_K, use=self.use)), earned_T
        gains_K = np.diff(steps_K, prepend=0.0) if self.use == "progress" else steps_K
        earned_T[ends] = self.weight * gains_K
        return scored, earned_T

    def _steps(self, trajectory: Trajectory, scores_T: Array, tools: Tools) -> tuple[Array, Array]:
        """[K] step ends, and the probabilities that the steps are right."""
        ends = step_ends(tools.renderer, trajectory, self.steps)
        if not len(ends):
            raise LegalityError(
                f"a trajectory of task {trajectory.task} without a step to judge",
                expected="at least one trained token",
            )
        return ends, np.array([sigmoid(float(s)) for s in scores_T[ends]])


@part
class StepLabels(Signal):
    """``STEP_LABEL`` by roll-outs from prefixes: Math-Shepherd (arXiv 2312.08935).

    From the end of every step but the last, ``policy`` samples ``samples`` continuations, which
    the verifier scores. ``hard`` is 1 if any succeeded, ``soft`` the share that did. The last
    step's label is whether the answer itself succeeded. Success is a score of at least the task
    set's ``success``.
    """

    policy: PolicyRef = "input"
    samples: Size = 8
    labels: Literal["soft", "hard"] = "hard"
    steps: Steps = Steps()
    max_new_tokens: Tokens = 64

    formula: ClassVar[str] = "1 if any continuation from step k succeeds; soft: the share that does"
    paper: ClassVar[str] = "2312.08935"
    may_ask_learner: ClassVar[bool] = True
    provides: ClassVar[Columns] = frozenset({Column.STEP_LABEL})

    def references(self) -> tuple[PolicyRef, ...]:
        """The policy that samples the continuations."""
        return (self.policy,)

    def check(self, at: StageContext) -> None:
        """Continuations need tasks to be verified."""
        for source in at.rows:
            raise at.refuse(
                f"step_labels on rows of {source.files[0]}",
                expected="rollouts: continuations are verified, and rows of a file have no task",
                fix="use rollouts, or a data set that has labels",
            )

    def prepare(self, tools: Tools) -> None:
        """Load the policy: its tokens must be the learner's."""
        tools.policy(self.policy)

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the column on every member.

        Raises:
            TaskError: a trajectory of a task that no task set holds.
        """
        members = [m for g in groups for m in g.members]
        ends = [step_ends(tools.renderer, m.trajectory, self.steps) for m in members]
        seed, policy = tools.seed_of("step_labels"), tools.policy(self.policy)
        asked = [self._requests(m.trajectory, e, seed) for m, e in zip(members, ends, strict=True)]
        done = iter(policy.generate([r for requests in asked for r in requests]))
        tried: list[Group] = []
        for member, requests in zip(members, asked, strict=True):
            # The answer itself is last: its own success is the label of its last step.
            whole = [np.concatenate([r.prompt, next(done).tokens]) for r in requests]
            texts = [*whole, member.trajectory.tokens]
            tried.append(_attempts(policy, member.trajectory, texts))
        judged = Verify().score(tried, tools)
        labelled = iter(
            member.with_columns(
                {Column.STEP_LABEL: self._labels(member.trajectory, e, group, tools)}
            )
            for member, e, group in zip(members, ends, judged, strict=True)
        )
        return [
            Group(task=g.task, members=tuple(next(labelled) for _ in g.members)) for g in groups
        ]

    def _requests(self, trajectory: Trajectory, ends: Array, seed: int) -> list[Request]:
        """``samples`` continuations from every end but the last, step by step."""
        return [
            Request(
                prompt=trajectory.tokens[: end + 1],
                sampling=Sampling(
                    seed=zlib.crc32(f"{seed}/{trajectory.id}/{end}/{number}".encode())
                ),
                max_new_tokens=self.max_new_tokens,
            )
            for end in ends[:-1].tolist()
            for number in range(self.samples)
        ]

    def _labels(self, trajectory: Trajectory, ends: Array, judged: Group, tools: Tools) -> Array:
        """[T] from the rewards of the attempts."""
        taskset, _ = tools.tasks[trajectory.task]
        success = tools.tasksets[taskset].success
        *tries, own = (float(m.columns[Column.REWARD]) >= success for m in judged.members)
        by_step = np.array(tries, np.float64).reshape(len(ends[:-1]), self.samples)
        labels = np.full(len(trajectory), NO_STEP)
        if len(ends):
            shares = by_step.max(-1) if self.labels == "hard" else by_step.mean(-1)
            labels[ends[:-1]], labels[ends[-1]] = shares, float(own)
        return labels


def aggregated(steps_K: Array, *, use: str) -> float:
    """The reward of an answer from those of its steps: ``min``, ``product`` or ``last``.

    Example:
        >>> [aggregated(np.array([0.5, 0.25, 1.0]), use=u) for u in ("min", "product", "last")]
        [0.25, 0.125, 1.0]
    """
    if use == "last":
        return float(steps_K[-1])
    return float(steps_K.min() if use == "min" else steps_K.prod())


def _attempts(policy: Policy, trajectory: Trajectory, texts: Sequence[IntArray]) -> Group:
    """The prompt with each of these answers, as a temporary group for the verifier."""
    version, cut = policy.version, trajectory.prompt_length
    members = []
    for tokens in texts:
        span = Span(
            length=len(tokens),
            role=Role.ASSISTANT,
            producer=policy.producer,
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
