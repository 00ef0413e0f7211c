"""Preference methods in which more moves than the learner: references, opponents, ranks."""

from __future__ import annotations

from typing import ClassVar

from msgspec.structs import replace

from posttrain.composition import (
    MOVING,
    Composition,
    Dataset,
    ExplorationBonus,
    Judge,
    MatchQuantiles,
    MovingReference,
    PairwiseLogistic,
    PairwiseTransport,
    PolicyRef,
    PreferDemonstration,
    RankPairs,
    ReferenceLogprobs,
    Rival,
    SamplingSpec,
    TransportedReward,
    Verify,
)
from posttrain.core.config import Config
from posttrain.core.provenance import Kind
from posttrain.methods.on_rollouts import demonstrated, rollouts


class TrDpo(Config, tag="tr_dpo", tag_field="name"):
    """DPO whose reference follows the learner: trust-region DPO.

    ``rate: 1`` is the paper's hard update, a copy. A stage of fewer than ``every`` steps is DPO.
    """

    data: Dataset
    beta: float = 0.05
    every: int = 512
    rate: float = 0.6

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "DPO; ref <- (1-rate) ref + rate pi, after each `every` steps"
    paper: ClassVar[str] = "2404.09656"

    def compose(self) -> Composition:
        """Pairs; log-probs of a reference that moves; pairwise logistic loss."""
        return Composition(
            source=replace(self.data, preference=True),
            signals=(ReferenceLogprobs(policy=MOVING),),
            terms=(PairwiseLogistic(beta=self.beta),),
            moving=MovingReference(every=self.every, rate=self.rate),
        )


class Spin(Config, tag="spin", tag_field="name"):
    """Self-play fine-tuning: demonstrations against the answers of an earlier self.

    One stage is one iteration: the opponent, who is the reference too, is the policy that the
    stage started from, and a pipeline of such stages is the method. With ``every`` the opponent is
    a copy of the learner taken every so many steps: several iterations in one stage.

    Unconfirmed: the formula was read at second hand.
    """

    tasks: tuple[str, ...]
    demonstration: str = "answer"
    author: Kind = Kind.EXTERNAL
    every: int | None = None
    beta: float = 0.1
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()

    group_size: ClassVar[int] = 2  # a demonstration and an answer
    provenance: ClassVar[str] = "off-policy: demonstrations, and an earlier self's answers"
    interface: ClassVar[str] = "demonstrations"
    tendency: ClassVar[str] = "reshaping, with expansion by the demonstrations"
    formula: ClassVar[str] = "DPO on (demonstration, answer of pi_t), pi_t also the reference"
    paper: ClassVar[str] = "2401.01335"

    def compose(self) -> Composition:
        """Demonstrations and an opponent's rollouts; chosen by author; pairwise logistic loss."""
        opponent = "input" if self.every is None else MOVING
        return Composition(
            source=rollouts(self, policy=opponent, company=demonstrated(self)),
            signals=(PreferDemonstration(author=self.author), ReferenceLogprobs(policy=opponent)),
            terms=(PairwiseLogistic(beta=self.beta),),
            moving=None if self.every is None else MovingReference(every=self.every),
        )


class Xpo(Config, tag="xpo", tag_field="name"):
    """Exploratory preference optimisation: the learner against the reference, with a bonus.

    Every group has one answer of the reference; the best of a group is chosen and the worst
    rejected. What the reference says is made less likely as such, by ``bonus``; at 0 this is
    online DPO in that company. Pairs without a winner teach nothing, the bonus included.

    Unconfirmed: the bonus's sign is derived: what is minimised must make the reference's own
    answers less likely, or it would not explore.
    """

    tasks: tuple[str, ...]
    beta: float = 0.1
    bonus: float = 1e-5
    reference: PolicyRef = "input"
    group_size: int = 2
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    rewards: tuple[Judge, ...] = (Verify(),)

    provenance: ClassVar[str] = "mixed"
    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping, with exploration"
    formula: ClassVar[str] = "DPO on (best, worst) + bonus log pi(y~), y~ of the reference"
    paper: ClassVar[str] = "2405.21046"

    def compose(self) -> Composition:
        """Rollouts of learner and reference; verifier and ranking; DPO and the bonus."""
        bonus = (ExplorationBonus(weight=self.bonus),) if self.bonus else ()
        return Composition(
            source=rollouts(self, company=Rival(policy=self.reference)),
            signals=(*self.rewards, RankPairs(), ReferenceLogprobs(policy=self.reference)),
            terms=(PairwiseLogistic(beta=self.beta), *bonus),
        )


class Aot(Config, tag="aot", tag_field="name"):
    """Alignment by optimal transport: the sorted margins of a draw are compared, not each pair's.

    The policy's margins are compared with the reference's, rank by rank. Ranks are taken over a
    whole draw: larger ``groups_per_step`` help.
    """

    data: Dataset
    beta: float = 0.01
    reference: PolicyRef = "input"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-log s(beta (m_(i) - m_ref_(i))), m_(i) the i-th smallest margin"
    paper: ClassVar[str] = "2406.05882"

    def compose(self) -> Composition:
        """Pairs; reference log-probs and ranks; logistic loss on margins of the same rank."""
        return Composition(
            source=replace(self.data, preference=True),
            signals=(ReferenceLogprobs(policy=self.reference), MatchQuantiles(of="margins")),
            terms=(PairwiseTransport(beta=self.beta),),
        )


class AotUnpaired(Config, tag="aot_unpaired", tag_field="name"):
    """Alignment by optimal transport between all chosen and all rejected answers of a draw.

    Rewards of chosen answers are compared with those of rejected ones, rank by rank, whatever
    prompt they answer. Here there are as many of one as of the other, since they come in pairs.
    """

    data: Dataset
    beta: float = 0.01
    reference: PolicyRef = "input"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-log s(beta (rho_w_(i) - rho_l_(i))), rho_(i) the i-th smallest"
    paper: ClassVar[str] = "2406.05882"

    def compose(self) -> Composition:
        """Pairs; reference log-probs and ranks; logistic loss on rewards of the same rank."""
        return Composition(
            source=replace(self.data, preference=True),
            signals=(ReferenceLogprobs(policy=self.reference), MatchQuantiles(of="rewards")),
            terms=(TransportedReward(beta=self.beta),),
        )


MovingPreferenceMethod = TrDpo | Spin | Xpo | Aot | AotUnpaired
