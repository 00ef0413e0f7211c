"""Log-probs of what was written, by a frozen policy or by the learner before its update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from posttrain.core import clock
from posttrain.core.provenance import FloatArray
from posttrain.core.trajectory import Column, Group, Trajectory
from posttrain.parts.base import Columns, PolicyRef, Signal
from posttrain.parts.columns import attach, trajectories_of
from posttrain.parts.memory import Memory
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools
from posttrain.protocols import Policy


@part
class ReferenceLogprobs(Signal):
    """Log-probs of the written tokens under a frozen policy."""

    policy: PolicyRef = "input"
    provides: ClassVar[Columns] = frozenset({Column.REFERENCE_LOGPROB})
    remembered: ClassVar[bool] = True

    def references(self) -> tuple[PolicyRef, ...]:
        """The policy."""
        return (self.policy,)

    def prepare(self, tools: Tools) -> None:
        """Load the policy: its tokens must be the learner's."""
        tools.policy(self.policy)

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``REFERENCE_LOGPROB`` [T] on every member."""
        with clock.timed("reference"):
            policy = tools.policy(self.policy)
            values = remembered_logprobs(policy, trajectories_of(groups), tools.memory)
        return attach(groups, [{Column.REFERENCE_LOGPROB: v} for v in values])


@part
class TrainerLogprobs(Signal):
    """The learner's own log-probs of what its sampler wrote, before the update.

    Sampler and trainer compute the same policy in different ways; terms with ``mismatch`` correct
    for what is left between them, and the step shows how large it is.
    """

    untempered: ClassVar[bool] = True
    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.TRAINER_LOGPROB})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``TRAINER_LOGPROB`` [T] on every member."""
        return _by_learner(groups, tools)


@part
class OwnLogprobs(Signal):
    """The learner's log-probs of other people's answers, at the moment they were drawn.

    With ``updates_per_draw`` above 1 the later updates of a draw move away from them. For answers
    that the learner wrote itself, ``trainer_logprobs`` is the signal.
    """

    provides: ClassVar[Columns] = frozenset({Column.TRAINER_LOGPROB})

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with ``TRAINER_LOGPROB`` [T] on every member."""
        return _by_learner(groups, tools)


def _by_learner(groups: Sequence[Group], tools: Tools) -> list[Group]:
    values = tools.live.logprobs(trajectories_of(groups))
    return attach(groups, [{Column.TRAINER_LOGPROB: v} for v in values])


def remembered_logprobs(
    policy: Policy, trajectories: Sequence[Trajectory], memory: Memory | None
) -> list[FloatArray]:
    """[T] per trajectory, asked of the policy only where the memory does not know them."""
    if memory is None:
        return policy.logprobs(trajectories)
    return memory.logprobs(policy, trajectories)
