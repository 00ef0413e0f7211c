"""Preference methods with moving references and opponents.

tr_dpo   a file of pairs                          reference: follows the learner
spin     demonstration > answer of an opponent    reference: the opponent
xpo      best > worst of learner and reference    reference: frozen, with an exploration bonus
"""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from posttrain.core.bounds import Count, NonNegative, Positive, Rate, Size, Tokens
from posttrain.core.learner import MOVING, MovingReference
from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.parts import unions
from posttrain.parts.base import PolicyRef
from posttrain.parts.composition import Composition, Method
from posttrain.parts.guided.external import ExplorationBonus
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.shapes import demonstrated, rollouts
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.preference.ranking import PreferDemonstration, RankPairs
from posttrain.parts.registry import part
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.members import Rival


@part
class TrDpo(Method):
    """DPO whose reference follows the learner: trust-region DPO.

    ``rate: 1`` is the paper's hard update, a copy. A stage of fewer than ``every`` steps is DPO.
    """

    data: Dataset
    beta: Positive = 0.05
    every: Count = 512
    rate: Rate = 0.6

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "DPO; ref <- (1-rate) ref + rate pi, after each `every` steps"
    paper: ClassVar[str] = "2404.09656"

    def compose(self) -> Composition:
        """Pairs; log-probs of a moving reference; DPO."""
        return Composition(
            source=replace(self.data, preference=True),
            signals=(ReferenceLogprobs(policy=MOVING),),
            terms=(Dpo(beta=self.beta),),
            moving=MovingReference(every=self.every, rate=self.rate),
        )


@part
class Spin(Method):
    """Self-play fine-tuning: demonstrations against the answers of an earlier checkpoint.

    One stage is one iteration: the opponent, also the reference, is the policy that the stage
    started from, and a pipeline of such stages is the method. With ``every`` the opponent is a
    copy of the learner, taken every ``every`` steps: several iterations in one stage.

    Unconfirmed: the formula was read at second hand.
    """

    tasks: tuple[str, ...]
    demonstration: str = "answer"
    author: Kind = Kind.EXTERNAL
    every: Count | None = None
    beta: Positive = 0.1
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()

    provenance: ClassVar[str] = "off-policy: demonstrations, and an earlier self's answers"
    interface: ClassVar[str] = "demonstrations"
    tendency: ClassVar[str] = "reshaping, with expansion by the demonstrations"
    formula: ClassVar[str] = "DPO on (demonstration, answer of pi_t), pi_t also the reference"
    paper: ClassVar[str] = "2401.01335"
    group_size: ClassVar[int] = 2  # a demonstration and an answer

    def compose(self) -> Composition:
        """Demonstrations and an opponent's rollouts; chosen by author; DPO."""
        opponent = "input" if self.every is None else MOVING
        return Composition(
            source=rollouts(self, policy=opponent, members=demonstrated(self)),
            signals=(PreferDemonstration(author=self.author), ReferenceLogprobs(policy=opponent)),
            terms=(Dpo(beta=self.beta),),
            moving=None if self.every is None else MovingReference(every=self.every),
        )


@part
class Xpo(Method):
    """Exploratory preference optimisation: the learner against the reference, with a bonus.

    Every group has one answer of the reference; the best of a group is chosen and the worst
    rejected. ``bonus`` lowers the likelihood of the reference's answers; at 0 this is online DPO
    with an answer of the reference in every group. Groups without a strict order have no loss,
    bonus included.

    Unconfirmed: the bonus's sign is derived: minimising it must make the reference's own answers
    less likely, or it would not explore.
    """

    tasks: tuple[str, ...]
    beta: Positive = 0.1
    bonus: NonNegative = 1e-5
    reference: PolicyRef = "input"
    group_size: Size = 2
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    rewards: tuple[unions.AnyJudge, ...] = (Verify(),)

    provenance: ClassVar[str] = "mixed"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping, with exploration"
    formula: ClassVar[str] = "DPO on (best, worst) + bonus log pi(y~), y~ of the reference"
    paper: ClassVar[str] = "2405.21046"

    def compose(self) -> Composition:
        """Rollouts of learner and reference; verifier and ranking; DPO and the bonus."""
        bonus = (ExplorationBonus(weight=self.bonus),) if self.bonus else ()
        return Composition(
            source=rollouts(self, members=Rival(policy=self.reference)),
            signals=(*self.rewards, RankPairs(), ReferenceLogprobs(policy=self.reference)),
            terms=(Dpo(beta=self.beta), *bonus),
        )
