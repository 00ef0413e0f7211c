"""The algebra of methods, as data: a source, signals, and weighted objective terms.

    source ──draws──▶ groups ──signals──▶ columns beside them ──pack──▶ terms ──sum──▶ loss

A method is a :class:`Composition` of specifications. Each specification says what it provides and
what it needs, so a wrong composition is refused before a model is loaded (``legality.py``). The
code behind a specification lives in the folder of its kind: ``sources``, ``signals``,
``objectives``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.config import Config
from posttrain.errors import ConfigError
from posttrain.provenance import Kind, Sampling
from posttrain.trajectory import Column

ANYONE = frozenset(Kind) - {Kind.TEMPLATE, Kind.ENVIRONMENT}
"""Every kind of producer that authors assistant turns."""

PolicyRef = str
"""``learner``; ``input`` (the policy the stage started from); ``base``; an earlier stage's name;
or ``path:<folder or hub id>``."""


# --- sources ---------------------------------------------------------------------------------


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


# --- signals ---------------------------------------------------------------------------------


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
    provides: ClassVar[frozenset[Column]] = frozenset(
        {Column.TEACHER_IDS, Column.TEACHER_LOGPROBS}
    )

    def __post_init__(self) -> None:
        if not self.routes or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(
                f"teacher routes {self.routes} with top_k={self.top_k}",
                expected="at least one route and top_k >= 1 or null",
            )


SignalSpec = Verify | GroupAdvantage | ReferenceLogprobs | TeacherDistribution


# --- objective terms -------------------------------------------------------------------------

Aggregate = Literal["token_mean", "sequence_mean"]
"""``token_mean``: every token counts alike. ``sequence_mean``: every sequence counts alike,
its tokens are averaged first. The choice changes the objective (survey section 5, trap 3)."""


class CrossEntropy(Config, frozen=True, kw_only=True, tag="cross_entropy", tag_field="type"):
    """Negative log-likelihood of the written tokens: −log π(y_t)."""

    weight: float = 1.0
    where: tuple[Kind, ...] = ()  # empty: every author
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = ANYONE


class PairwiseLogistic(
    Config, frozen=True, kw_only=True, tag="pairwise_logistic", tag_field="type"
):
    """DPO on a pair (arXiv 2305.18290), with optional label smoothing ε (cDPO).

    −(1−ε) log σ(βΔ) − ε log σ(−βΔ), Δ the chosen minus the rejected sum over tokens of
    log π − log π_ref.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "pair"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.REFERENCE_LOGPROB, Column.PREFERENCE})
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"beta={self.beta}, label_smoothing={self.label_smoothing}",
                expected="beta > 0 and 0 <= label_smoothing < 0.5",
            )


class ClippedPolicyGradient(
    Config, frozen=True, kw_only=True, tag="clipped_policy_gradient", tag_field="type"
):
    """−min(r A, clip(r, 1−ε_low, 1+ε_high) A), r = π / behaviour (arXiv 1707.06347).

    The ratio is against the recorded behaviour log-probs, so only tokens of the live learner
    qualify: a ratio to somebody else's policy is not this objective.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.ADVANTAGE})
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1 or self.clip_high <= 0:
            raise ConfigError(
                f"clip_low={self.clip_low}, clip_high={self.clip_high}",
                expected="0 < clip_low <= 1 and clip_high > 0",
            )


class ReferenceKL(Config, frozen=True, kw_only=True, tag="reference_kl", tag_field="type"):
    """KL(π ‖ π_ref) on the learner's own tokens, whose *gradient* is that of the KL.

    The value is the k3 estimate e^{−u} + u − 1 with u = log π − log π_ref. Differentiating k3
    itself gives the gradient of another divergence (survey section 5, trap 11); on samples of π
    the unbiased gradient is that of r·k3 with r = π / behaviour, which is what is used here
    (arXiv 2512.02556).
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 0.001
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset(
        {Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB}
    )
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


class TeacherReverseKL(
    Config, frozen=True, kw_only=True, tag="teacher_reverse_kl", tag_field="type"
):
    """Σ_v π(v) log(π(v) / π_T(v)) at every written token (MiniLLM, GKD; arXiv 2306.13649).

    With a teacher's top-k the rest of the vocabulary is one more outcome, "any other token", so
    the sum stays a true KL (a lower bound of the full one) and is zero when both agree.
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS})
    accepts: ClassVar[frozenset[Kind]] = ANYONE


TermSpec = CrossEntropy | PairwiseLogistic | ClippedPolicyGradient | ReferenceKL | TeacherReverseKL


class Composition(Config, frozen=True, kw_only=True):
    """A method spelt out: where trajectories come from, who judges them, what is minimised."""

    source: SourceSpec
    terms: tuple[TermSpec, ...]
    signals: tuple[SignalSpec, ...] = ()
