"""Who judges trajectories, and what they write beside them."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import PolicyRef
from posttrain.config import Config
from posttrain.errors import ConfigError
from posttrain.trajectory import Column


class Verify(Config, frozen=True, kw_only=True, tag="verify", tag_field="type"):
    """The task set's own scorer, or the user's reward function: one reward per trajectory."""

    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.REWARD})


class GroupAdvantage(Config, frozen=True, kw_only=True, tag="group_advantage", tag_field="type"):
    """Reward relative to the group, spread over the completion's tokens.

    ``scale: std`` is GRPO, (r − mean) / (std + 1e-6) with the unbiased std (arXiv 2402.03300);
    ``scale: none`` is Dr.GRPO, r − mean (arXiv 2503.20783). A group with equal rewards gets
    exactly 0. A group of one is refused: its advantage would be the raw reward.
    """

    scale: Literal["std", "none"] = "std"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.REWARD})
    provides: ClassVar[frozenset[Column]] = frozenset({Column.ADVANTAGE})


class ReferenceLogprobs(
    Config, frozen=True, kw_only=True, tag="reference_logprobs", tag_field="type"
):
    """Log-probs of the written tokens under a frozen policy."""

    policy: PolicyRef = "input"
    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.REFERENCE_LOGPROB})


class TeacherDistribution(
    Config, frozen=True, kw_only=True, tag="teacher_distribution", tag_field="type"
):
    """A frozen policy's next-token distribution at every written token.

    ``routes`` chooses the teacher by task set; ``"*"`` is the default. ``top_k`` keeps the
    teacher's K most likely tokens; null keeps the full vocabulary.
    """

    routes: dict[str, PolicyRef]
    top_k: int | None = None
    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS})

    def __post_init__(self) -> None:
        if not self.routes or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(
                f"teacher routes {self.routes} with top_k={self.top_k}",
                expected="at least one route and top_k >= 1 or null",
            )


SignalSpec = Verify | GroupAdvantage | ReferenceLogprobs | TeacherDistribution
