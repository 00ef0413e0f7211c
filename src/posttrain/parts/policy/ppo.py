"""Policy gradients with a learned value."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.core.bounds import NonNegative, Positive, Share, Size
from posttrain.core.learner import ScalarHead
from posttrain.core.provenance import Kind
from posttrain.parts.base import Limit, PolicyRef
from posttrain.parts.composition import Composition
from posttrain.parts.credit.gae import Gae
from posttrain.parts.policy.losses import ClippedPolicyGradient, clipped
from posttrain.parts.policy.shapes import OnRollouts, kl_in_reward, on_rollouts
from posttrain.parts.policy.value import ValueLoss
from posttrain.parts.registry import part
from posttrain.parts.supervised.likelihood import CrossEntropy


@part
class Ppo(OnRollouts):
    """Proximal policy optimisation, with a critic and GAE per token.

    The critic is a separate model, or a head on the policy (``critic: shared``, cheaper; its loss
    then also trains the policy). It starts from ``critic_start``: the policy, a reward model, or a
    stage of ``value_pretraining``. The KL to the reference is part of the reward. A draw is split
    into ``updates_per_draw`` updates; each token is used once.
    """

    group_size: Size = 1
    gamma: Share = 1.0
    lam: Share = 0.95
    whiten: bool = True
    clip: NonNegative = 0.2
    value_clip: NonNegative | None = 0.2
    value_weight: NonNegative = 0.1
    kl_beta: NonNegative = 0.05
    reference: PolicyRef = "input"
    critic: Literal["separate", "shared"] = "separate"
    critic_start: PolicyRef = "input"
    critic_lr: NonNegative | None = None

    formula: ClassVar[str] = (
        "-min(r A, clip(r) A) + value_weight/2 max((V - R)^2, (clip(V) - R)^2), A by GAE"
    )
    paper: ClassVar[str] = "1707.06347"

    def compose(self) -> Composition:
        """Live rollouts; verifier and KL in the reward; GAE; clipped gradient and value loss."""
        kl = kl_in_reward(self.kl_beta, self.reference)
        gae = Gae(gamma=self.gamma, lam=self.lam, whiten=self.whiten)
        terms = (
            ClippedPolicyGradient(clip_low=self.clip, clip_high=self.clip),
            ValueLoss(clip=self.value_clip, weight=self.value_weight),
        )
        head = ScalarHead(trunk=self.critic, start=self.critic_start, lr=self.critic_lr)
        return on_rollouts(self, (*kl, gae), terms, scalar_head=head)


@part
class Vapo(OnRollouts):
    """PPO for long answers: λ = 1 for the critic, a length-dependent λ for the policy, and
    cross-entropy on right answers.

    The policy's λ is 1 − 1/(α l) for an answer of l tokens. Run a stage of ``value_pretraining``
    before it and start from its critic: the paper's largest ablation effect.

    Unconfirmed: formulas and defaults were read at second hand.
    """

    group_size: Size = 16
    length_alpha: Positive = 0.05
    whiten: bool = True
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.28
    value_clip: NonNegative | None = 0.2
    value_weight: NonNegative = 1.0
    imitation_weight: NonNegative = 0.1
    critic_start: PolicyRef = "input"
    critic_lr: NonNegative | None = None

    formula: ClassVar[str] = (
        "PPO with lambda 1 - 1/(alpha l) for the policy, 1 for the critic, - mu log pi where R > 0"
    )
    paper: ClassVar[str] = "2504.05118"

    def compose(self) -> Composition:
        """Live rollouts; verifier; decoupled GAE; clipped gradient, value loss, imitation."""
        gae = Gae(value_lam=1.0, length_alpha=self.length_alpha, whiten=self.whiten)
        both = (clipped(self), ValueLoss(clip=self.value_clip, weight=self.value_weight))
        right = Limit(rewards="positive")
        imitate = CrossEntropy(weight=self.imitation_weight, where=(Kind.LEARNER,), limit=right)
        terms = (*both, imitate) if self.imitation_weight else both
        head = ScalarHead(start=self.critic_start, lr=self.critic_lr)
        return on_rollouts(self, (gae,), terms, scalar_head=head)


@part
class ValuePretraining(OnRollouts):
    """Fits a critic to the returns of a fixed policy.

    The stage leaves the policy unchanged and adds a critic that ``ppo`` and ``vapo`` can start
    from. Watch ``critic/explained_variance``: the paper trains until it converges.

    Unconfirmed: read at second hand, like ``vapo``.
    """

    group_size: Size = 1
    gamma: Share = 1.0
    critic_start: PolicyRef = "input"

    tendency: ClassVar[str] = "none: the policy does not change"
    formula: ClassVar[str] = "(V - R)^2 / 2, R the return that was really earned"
    paper: ClassVar[str] = "2504.05118"

    def compose(self) -> Composition:
        """Live rollouts; verifier; GAE with λ = 1; value loss alone."""
        gae = Gae(gamma=self.gamma, lam=1.0, whiten=False)
        head = ScalarHead(start=self.critic_start)
        return on_rollouts(self, (gae,), (ValueLoss(clip=None),), scalar_head=head)
