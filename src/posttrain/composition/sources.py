"""Where trajectories come from."""

from __future__ import annotations

from typing import Literal

from posttrain.composition.base import PolicyRef
from posttrain.config import Config
from posttrain.errors import ConfigError
from posttrain.provenance import Kind, Sampling
from posttrain.trajectory import Column


class SamplingSpec(Config, frozen=True, kw_only=True):
    """How a policy is sampled. Defaults are the policy's own distribution, untouched."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def with_seed(self, seed: int) -> Sampling:
        """The exact distribution of one request."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
        )

    @property
    def is_truncated(self) -> bool:
        """True when ratios against the model's own distribution would be wrong."""
        return self.with_seed(0).is_truncated


class Dataset(Config, frozen=True, kw_only=True, tag="dataset", tag_field="type"):
    """Trajectories from a JSONL or Parquet file (off-policy).

    ``format`` is detected from the columns: prompt/completion, messages, or
    prompt/chosen/rejected. ``author`` and ``licence`` go into the ledger.
    """

    path: str
    format: Literal["auto", "completion", "messages", "preference"] = "auto"
    author: Kind = Kind.EXTERNAL
    name: str | None = None  # default: the file name
    licence: str | None = None
    too_long: Literal["error", "skip"] = "error"
    assistant_mask: Literal["template", "prefix"] = "template"
    preference: bool = False  # set by pairwise methods; checked against the file

    @property
    def provides(self) -> frozenset[Column]:
        """Preferences, for a file of pairs."""
        return frozenset({Column.PREFERENCE}) if self.preference else frozenset()

    @property
    def writes(self) -> frozenset[Kind]:
        """Who authors the assistant turns."""
        return frozenset({self.author})


class Rollouts(Config, frozen=True, kw_only=True, tag="rollouts", tag_field="type"):
    """Groups of completions sampled from a policy on the training prompts of task sets.

    With ``policy: learner`` this is on-policy; any other policy is frozen, hence off-policy.
    """

    tasks: tuple[str, ...]
    policy: PolicyRef = "learner"
    group_size: int = 8
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.max_new_tokens < 1 or not self.tasks:
            raise ConfigError(
                f"rollouts over tasks={list(self.tasks)} with group_size={self.group_size}, "
                f"max_new_tokens={self.max_new_tokens}",
                expected="at least one task set, one member and one token",
            )

    @property
    def provides(self) -> frozenset[Column]:
        """Log-probs of the sampled distribution."""
        return frozenset({Column.BEHAVIOUR_LOGPROB})

    @property
    def writes(self) -> frozenset[Kind]:
        """The live learner, or a frozen policy."""
        return frozenset({Kind.LEARNER if self.policy == "learner" else Kind.TEACHER})


SourceSpec = Dataset | Rollouts
