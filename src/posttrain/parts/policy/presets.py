"""Policy-gradient methods named after their loss."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.core.bounds import Count, Inner, NonNegative, Positive, Size
from posttrain.core.errors import ConfigError
from posttrain.parts.base import Aggregate, Limit, PolicyRef, Signal
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.selection import (
    ClipCovariance,
    DropCutOff,
    KeepInformative,
    MarkCovariance,
    MarkEntropy,
)
from posttrain.parts.credit.shaping import SoftLengthPenalty
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient, Gspo, PolicyGradient, clipped
from posttrain.parts.policy.ratio import Mismatch
from posttrain.parts.policy.regularisers import AdaptiveEntropyBonus, LogRatioPenalty, ReferenceKL
from posttrain.parts.policy.shapes import OnRollouts, on_rollouts, redrawn
from posttrain.parts.registry import part
from posttrain.parts.rewards.verify import Verify


@part
class Grpo(OnRollouts):
    """Group-relative policy optimisation on the learner's own rollouts.

    With ``group_size: 2`` it is 2-GRPO (arXiv 2510.00977).
    """

    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    kl_weight: NonNegative = 0.0
    reference: PolicyRef = "input"
    aggregate: Aggregate = "sequence_mean"
    mismatch: Mismatch | None = None

    formula: ClassVar[str] = "-min(r A, clip(r) A), A = (R - mean) / std over the group"
    paper: ClassVar[str] = "2402.03300"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"grpo with group_size={self.group_size}",
                expected="at least 2: a group of one has no baseline",
            )

    def compose(self) -> Composition:
        """Live rollouts; verifier and group advantage; clipped policy gradient, optional KL."""
        term = clipped(self, aggregate=self.aggregate, mismatch=self.mismatch)
        if not self.kl_weight:
            return on_rollouts(self, (GroupAdvantage(),), (term,), mismatch=self.mismatch)
        signals = (GroupAdvantage(), ReferenceLogprobs(policy=self.reference))
        kl = ReferenceKL(weight=self.kl_weight, aggregate=self.aggregate)
        return on_rollouts(self, signals, (term, kl), mismatch=self.mismatch)


@part
class DrGrpo(OnRollouts):
    """GRPO without its two biases: no std, and token sums divided by a constant length."""

    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    formula: ClassVar[str] = "-min(r A, clip(r) A) summed / max_new_tokens, A = R - group mean"
    paper: ClassVar[str] = "2503.20783"

    def compose(self) -> Composition:
        """Group mean; clipped policy gradient over the longest possible answer."""
        term = clipped(self, aggregate="sequence_sum", weight=1 / self.max_new_tokens)
        return on_rollouts(self, (GroupAdvantage(scale="none"),), (term,))


@part
class Dapo(OnRollouts):
    """GRPO with a higher upper clip, token mean, dynamic sampling, and overlong reward shaping.

    ``overlong``: ``penalty`` lowers the reward over the last fifth of ``max_new_tokens`` (the
    paper's 4096 of 20480), ``filter`` leaves truncated answers out of the loss. ``max_draws`` is
    the maximum number of draws to fill a step with informative groups; at 1 dropped groups are not
    replaced.
    """

    group_size: Size = 16
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.28
    overlong: Literal["penalty", "filter", "ignore"] = "penalty"
    max_draws: Count = 10
    mismatch: Mismatch | None = None

    formula: ClassVar[str] = "-min(r A, clip(r) A) per token, over groups of unequal rewards"
    paper: ClassVar[str] = "2503.14476"

    def __post_init__(self) -> None:
        if self.max_draws > 1 and self.rewards != (Verify(),):
            raise ConfigError(
                f"dapo with max_draws={self.max_draws} and rewards of others than the verifier",
                expected="max_draws: 1: drawing again asks the verifier, and no model",
            )

    def compose(self) -> Composition:
        """Length penalty; group advantage; informative groups; clipped policy gradient."""
        limit = self.max_new_tokens
        penalty = SoftLengthPenalty(max_tokens=limit, cache_tokens=max(limit // 5, 1))
        long: dict[str, tuple[Signal, ...]] = {"penalty": (penalty,), "filter": (DropCutOff(),)}
        signals = (*long.get(self.overlong, ()), GroupAdvantage(), KeepInformative())
        term = clipped(self, mismatch=self.mismatch)
        once = on_rollouts(self, signals, (term,), mismatch=self.mismatch)
        return redrawn(self, once, keep=(Verify(), KeepInformative()), max_draws=self.max_draws)


@part
class Luspo(OnRollouts):
    """GSPO times the sequence's length, so that long answers do not lose weight."""

    clip_low: NonNegative = 2e-3
    clip_high: NonNegative = 2.5e-3

    formula: ClassVar[str] = "-|y| min(s A, clip(s) A), s = exp(mean log r)"
    paper: ClassVar[str] = "2602.05261"

    def compose(self) -> Composition:
        """Group advantage; clipped sequence ratio, summed over tokens."""
        term = Gspo(clip_low=self.clip_low, clip_high=self.clip_high, aggregate="sequence_sum")
        return on_rollouts(self, (GroupAdvantage(),), (term,))


@part
class ClipCov(OnRollouts):
    """GRPO without a gradient at a few tokens of high covariance, to keep entropy.

    The authors' code chooses them among the tokens of a micro-batch; here among those of a draw, so
    that the cut of a step changes nothing.
    """

    share: Inner = 2e-4
    clip: NonNegative = 0.2

    formula: ClassVar[str] = "-min(r A, clip(r) A), A = 0 at some tokens of high covariance"
    paper: ClassVar[str] = "2505.22617"

    def compose(self) -> Composition:
        """Group advantage; covariance clip; clipped policy gradient."""
        signals = (GroupAdvantage(), ClipCovariance(share=self.share))
        term = ClippedPolicyGradient(clip_low=self.clip, clip_high=self.clip)
        return on_rollouts(self, signals, (term,))


@part
class KlCov(OnRollouts):
    """No clip; a KL penalty on the tokens of highest covariance, to keep entropy.

    It differs from the unclipped gradient from the second update on a draw.
    """

    share: Inner = 2e-4
    penalty: NonNegative = 1.0

    formula: ClassVar[str] = "-r A + |log r| at tokens of the highest covariance"
    paper: ClassVar[str] = "2505.22617"

    def compose(self) -> Composition:
        """Group advantage; marked covariance; policy gradient and a penalty."""
        signals = (GroupAdvantage(), MarkCovariance(share=self.share))
        return on_rollouts(self, signals, (PolicyGradient(), LogRatioPenalty(weight=self.penalty)))


@part
class HighEntropy(OnRollouts):
    """A gradient only at the fifth of the tokens of highest entropy.

    ``over: draw`` compares the tokens of a whole draw, as the paper does with a batch, in one more
    pass over it; ``sequence`` those of each answer, without an extra pass.
    """

    over: Literal["draw", "sequence"] = "draw"
    entropy_share: Inner = 0.2
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.28

    formula: ClassVar[str] = "-min(r A, clip(r) A) at the tokens of highest entropy"
    paper: ClassVar[str] = "2506.01939"

    def compose(self) -> Composition:
        """Group advantage, marks; clipped policy gradient, limited by entropy."""
        whole = self.over == "draw"
        limit = Limit(marked=True) if whole else Limit(entropy_share=self.entropy_share)
        marks = (MarkEntropy(share=self.entropy_share),) if whole else ()
        term = ClippedPolicyGradient(clip_low=self.clip_low, clip_high=self.clip_high, limit=limit)
        return on_rollouts(self, (GroupAdvantage(), *marks), (term,))


@part
class AdaptiveEntropy(OnRollouts):
    """GRPO with an entropy bonus of adaptive weight that keeps a target entropy.

    The loss of Skywork-OR1: a token mean, no KL, and no length normalisation. The right target
    depends on the policy. Defaults are those of the authors' scripts, where c starts at 0; the
    report also tries steps of 0.005.
    """

    target: Positive = 0.2
    initial: NonNegative = 0.0
    step: Positive = 1e-4
    cap: NonNegative = 0.005
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    formula: ClassVar[str] = "GRPO - c H [H <= target]; c + step where H < target, else c - step"
    paper: ClassVar[str] = "2505.22312"

    def compose(self) -> Composition:
        """Group advantage; clipped policy gradient and adaptive entropy bonus."""
        term = clipped(self)
        bonus = AdaptiveEntropyBonus(
            target=self.target, initial=self.initial, step=self.step, cap=self.cap
        )
        return on_rollouts(self, (GroupAdvantage(),), (term, bonus))
