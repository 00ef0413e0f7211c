"""Policy-gradient methods named after their advantage."""

from __future__ import annotations

from typing import ClassVar

from posttrain.core.bounds import NonNegative, Number, Positive, Size, Tokens
from posttrain.parts.base import PolicyRef
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import BestOfKAdvantage, DecoupledAdvantage, GroupAdvantage
from posttrain.parts.credit.greedy import GreedyBaseline
from posttrain.parts.credit.shaping import SoftLengthPenalty
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient, PolicyGradient
from posttrain.parts.policy.regularisers import ReferenceKL
from posttrain.parts.policy.shapes import OnRollouts, kl_in_reward, on_rollouts
from posttrain.parts.registry import part

EXPECTED_REWARD = PolicyGradient(aggregate="sequence_sum")
"""Its gradient is that of the expected reward."""


@part
class Reinforce(OnRollouts):
    """The vanilla policy gradient, with the mean reward of the draw or a constant as baseline."""

    group_size: Size = 1
    baseline: Number | None = None  # null: the mean of the draw

    formula: ClassVar[str] = "-(R - b) log pi, summed over tokens"
    paper: ClassVar[str] = "Williams 1992"

    def compose(self) -> Composition:
        """Baseline of the draw; unclipped policy gradient."""
        if self.baseline is None:
            credit = GroupAdvantage(baseline="batch_mean", scale="none")
        else:
            credit = GroupAdvantage(baseline="constant", value=self.baseline, scale="none")
        return on_rollouts(self, (credit,), (EXPECTED_REWARD,))


@part
class Rloo(OnRollouts):
    """REINFORCE with the mean of the siblings as baseline, and the KL in the reward."""

    group_size: Size = 4
    kl_beta: NonNegative = 0.03  # 0: no reference
    reference: PolicyRef = "input"

    formula: ClassVar[str] = "-(R - mean of the others' R) log pi, R with -beta log pi/pi_ref"
    paper: ClassVar[str] = "2402.14740"

    def compose(self) -> Composition:
        """k1 in the reward; leave-one-out baseline; unclipped policy gradient."""
        credit = GroupAdvantage(baseline="leave_one_out", scale="none")
        signals = (*kl_in_reward(self.kl_beta, self.reference), credit)
        return on_rollouts(self, signals, (EXPECTED_REWARD,))


@part
class ReinforcePlusPlus(OnRollouts):
    """PPO without a value function: returns to go, whitened over the draw's tokens.

    Unconfirmed: the paper's KL weight depends on the task; the default here is ours.
    """

    group_size: Size = 1
    kl_beta: NonNegative = 0.01  # 0: no reference
    reference: PolicyRef = "input"
    clip: NonNegative = 0.2

    formula: ClassVar[str] = "-min(r A, clip(r) A), A = whitened return to go with token KL"
    paper: ClassVar[str] = "2501.03262"

    def compose(self) -> Composition:
        """k1 per token; returns to go, whitened; clipped policy gradient."""
        credit = GroupAdvantage(
            baseline="constant",
            value=0.0,
            scale="whiten",
            credit="to_go" if self.kl_beta else "outcome",
        )
        signals = (*kl_in_reward(self.kl_beta, self.reference), credit)
        term = ClippedPolicyGradient(clip_low=self.clip, clip_high=self.clip)
        return on_rollouts(self, signals, (term,))


@part
class ReinforcePlusPlusBaseline(OnRollouts):
    """REINFORCE++ over groups: minus the group's mean, then whitened over the draw's tokens.

    Whitening subtracts the draw's mean, so a group of equal rewards has a small gradient.

    Unconfirmed: that the paper's KL is k2 in the loss.
    """

    kl_weight: NonNegative = 0.0
    reference: PolicyRef = "input"
    clip: NonNegative = 0.2

    formula: ClassVar[str] = "-min(r A, clip(r) A), A = whitened (R - group mean)"
    paper: ClassVar[str] = "2501.03262"

    def compose(self) -> Composition:
        """Group mean, whitened; clipped policy gradient, optional KL."""
        credit = GroupAdvantage(scale="whiten")
        term = ClippedPolicyGradient(clip_low=self.clip, clip_high=self.clip)
        if not self.kl_weight:
            return on_rollouts(self, (credit,), (term,))
        kl = ReferenceKL(estimator="k2", weight=self.kl_weight)
        return on_rollouts(self, (ReferenceLogprobs(policy=self.reference), credit), (term, kl))


@part
class Remax(OnRollouts):
    """REINFORCE with the reward of the greedy answer as baseline."""

    group_size: Size = 1
    kl_beta: NonNegative = 0.0
    reference: PolicyRef = "input"

    formula: ClassVar[str] = "-(R - R of the greedy answer) log pi"
    paper: ClassVar[str] = "2310.10505"

    def compose(self) -> Composition:
        """One greedy answer per prompt, scored and not trained on; unclipped policy gradient."""
        credit = GroupAdvantage(baseline="greedy", scale="none")
        signals = (*kl_in_reward(self.kl_beta, self.reference), GreedyBaseline(), credit)
        return on_rollouts(self, signals, (EXPECTED_REWARD,))


@part
class Opo(OnRollouts):
    """REINFORCE with the minimum-variance baseline, if gradients grow with length."""

    formula: ClassVar[str] = "-(R - sum l R / sum l) log pi, l = length"
    paper: ClassVar[str] = "2505.23585"

    def compose(self) -> Composition:
        """Length-weighted group mean; unclipped policy gradient."""
        credit = GroupAdvantage(baseline="length_weighted", scale="none")
        return on_rollouts(self, (credit,), (EXPECTED_REWARD,))


@part
class Gpg(OnRollouts):
    """Group policy gradient: groups of equal rewards do not dilute the step.

    Unconfirmed: the factor is all members over those in unequal groups; one library divides by the
    number of non-zero rewards instead.
    """

    formula: ClassVar[str] = "-alpha (R - mean) log pi, alpha = members / members of unequal groups"
    paper: ClassVar[str] = "2504.02546"

    def compose(self) -> Composition:
        """Group mean over the informative share; unclipped policy gradient per token."""
        return on_rollouts(self, (GroupAdvantage(scale="informative"),), (PolicyGradient(),))


@part
class LitePpo(OnRollouts):
    """GRPO with two changes: the group's mean with the draw's std, and a token mean."""

    clip: NonNegative = 0.2

    formula: ClassVar[str] = "-min(r A, clip(r) A), A = (R - group mean) / std of the draw"
    paper: ClassVar[str] = "2508.08221"

    def compose(self) -> Composition:
        """Group mean, batch std; clipped policy gradient per token."""
        term = ClippedPolicyGradient(clip_low=self.clip, clip_high=self.clip)
        return on_rollouts(self, (GroupAdvantage(scale="batch_std"),), (term,))


@part
class Gdpo(OnRollouts):
    """Two rewards, for correctness and length, each normalised in its group before they are added.

    With more rewards, the signals in ``rewards`` add up to the first.

    Unconfirmed: the formula was read at second hand.
    """

    length_cache: Tokens  # the last tokens of max_new_tokens, over which the penalty falls to -1
    weights: tuple[Positive, Positive] = (1.0, 1.0)  # of correctness, of length
    clip: NonNegative = 0.2

    formula: ClassVar[str] = "-min(r A, clip(r) A), A = normalised sum of w_k (r_k - mean) / std"
    paper: ClassVar[str] = "2601.05242"

    def compose(self) -> Composition:
        """Verifier and length penalty, decoupled; clipped policy gradient."""
        short = SoftLengthPenalty(max_tokens=self.max_new_tokens, cache_tokens=self.length_cache)
        term = ClippedPolicyGradient(
            clip_low=self.clip, clip_high=self.clip, aggregate="sequence_mean"
        )
        return on_rollouts(self, (short, DecoupledAdvantage(weights=self.weights)), (term,))


@part
class PassAtK(OnRollouts):
    """Trains the best of k answers instead of the average one.

    Unconfirmed: k below the group's size is derived, and proven to be unbiased by enumeration.
    """

    k: Size | None = None  # null: the whole group

    formula: ClassVar[str] = "-A log pi, A = what an answer adds to the best of k"
    paper: ClassVar[str] = "2503.19595"

    def compose(self) -> Composition:
        """Best-of-k credit; unclipped policy gradient."""
        return on_rollouts(self, (BestOfKAdvantage(k=self.k),), (EXPECTED_REWARD,))
