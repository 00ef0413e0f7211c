"""Guided methods: demonstrations inside the learner's own rollouts.

guided_grpo  prefix │ rollout             trained: rollouts
uft          prefix │ rollout             trained: rollouts, and prefixes with a small weight
prefix_rft   one prefix │ rollout         trained: both, as if sampled by the learner
luffy        one whole demonstration      trained: both, with different ratios
hpt          one whole demonstration      trained: it where rollouts fail, else the rollouts
"""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec.structs import replace

from posttrain.core.bounds import (
    Count,
    Inner,
    NonNegative,
    Number,
    Positive,
    Share,
    Size,
    Tokens,
    Whole,
)
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.parts import unions
from posttrain.parts.base import Limit, Signal, Term
from posttrain.parts.composition import Composition, Method
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.selection import ImitateFailures
from posttrain.parts.guided.external import AssumedCertainGradient, AssumedOwnGradient
from posttrain.parts.logprobs import OwnLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient, clipped
from posttrain.parts.policy.regularisers import EntropyBonus
from posttrain.parts.policy.shapes import demonstrated, rollouts
from posttrain.parts.registry import part, tag_of
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.members import Guided
from posttrain.parts.supervised.likelihood import CrossEntropy


class OnGuided(Method):
    """Base class of guided methods: prompts, demonstrations and decoding.

    ``demonstration`` is the task's column with the demonstration: ``answer``, or another.
    """

    tasks: tuple[str, ...]
    demonstration: str = "answer"
    author: Kind = Kind.EXTERNAL
    group_size: Size = 8
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    rewards: tuple[unions.AnyJudge, ...] = (Verify(),)

    interface: ClassVar[str] = "verifier reward and demonstrations"
    tendency: ClassVar[str] = "reshaping, with expansion by the demonstrations"


def _guided(
    method: OnGuided, members: Guided, signals: tuple[Signal, ...], *terms: Term
) -> Composition:
    """Guided rollouts, the method's ``rewards``, then ``signals``, and the terms."""
    if method.group_size < 2:
        raise ConfigError(
            f"{tag_of(method)} with group_size={method.group_size}",
            expected="at least 2: a group of one has no baseline",
        )
    source = rollouts(method, members=members)
    return Composition(source=source, signals=(*method.rewards, *signals), terms=terms)


def _beginning(
    method: GuidedGrpo | Uft | PrefixRft,
    *,
    end: float,
    length: Literal["share", "binomial", "uniform"],
    slices: int = 5,
    count: int | None = None,
    learn: bool = False,
) -> Guided:
    """A prefix of a demonstration, which gets shorter over the method's ``draws``."""
    return Guided(
        column=method.demonstration,
        author=method.author,
        count=count,
        start=method.start,
        end=end,
        draws=method.draws,
        length=length,
        slices=slices,
        learn=learn,
    )


@part
class GuidedGrpo(OnGuided):
    """GRPO on completions of a prefix of a right answer.

    All members of a group have the same prefix, which is not trained on. Its share falls from
    ``start`` to ``end`` over ``draws`` draws, so that hard prompts start where they can be solved.
    ``length: binomial`` draws the prefix length for every prompt, which mixes short and long ones.
    The schedule replaces those of the papers: QuestA has two levels (one half, then one quarter),
    BREAD (arXiv 2506.17211) searches the shortest prefix that helps.

    Unconfirmed: the papers were read at second hand, the schedule is ours.
    """

    start: Share = 0.75
    end: Share = 0.0
    draws: Count = 100
    length: Literal["share", "binomial"] = "share"
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    provenance: ClassVar[str] = "on-policy, after the beginning of a demonstration"
    formula: ClassVar[str] = "GRPO on y_{>L} given y*_{<=L}, L = floor(share |y*|)"
    paper: ClassVar[str] = "2507.13266"

    def compose(self) -> Composition:
        """Rollouts from given prefixes; group advantage; clipped policy gradient."""
        members = _beginning(self, end=self.end, length=self.length)
        return _guided(self, members, (GroupAdvantage(),), clipped(self, aggregate="sequence_mean"))


@part
class Uft(OnGuided):
    """Unified fine-tuning: guided GRPO, and cross-entropy on the given prefix.

    The number of given slices is drawn per prompt. A slice is a fifth of the demonstration's
    tokens; the paper cuts at steps of the solution. Its KL term is left out.

    The authors' code averages over tokens, and adds an entropy bonus of 0.001; here every sequence
    counts alike, and there is none.
    """

    group_size: Size = 4
    start: Share = 0.95
    end: Share = 0.05
    draws: Count = 300
    slices: Count = 5
    nll_weight: NonNegative = 0.001

    provenance: ClassVar[str] = "mixed"
    formula: ClassVar[str] = "GRPO on y_{>L} - nll_weight log pi(y*_{<=L}), L by Binomial(5, p)"
    paper: ClassVar[str] = "2505.16984"

    def compose(self) -> Composition:
        """Rollouts from prefixes of random length; GRPO, and cross-entropy on the prefixes."""
        members = _beginning(self, end=self.end, length="binomial", slices=self.slices, learn=True)
        given = CrossEntropy(weight=self.nll_weight, where=(self.author,))
        grpo = ClippedPolicyGradient(aggregate="sequence_mean")
        return _guided(self, members, (GroupAdvantage(),), grpo, given)


@part
class PrefixRft(OnGuided):
    """One rollout of a group continues a prefix of a demonstration, which is trained on too.

    The prefix's tokens are treated as if sampled by the learner, at the fifth of highest entropy.
    Both terms are sums over tokens divided by the same constant.

    In the authors' code members with a prefix are compared among themselves, so that one alone is
    its own mean; here all members of a group share the mean.

    Unconfirmed: read from the authors' code and notes; the constant is ours.
    """

    start: Share = 0.95
    draws: Count = 100
    entropy_share: Inner = 0.2
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    provenance: ClassVar[str] = "mixed"
    formula: ClassVar[str] = "-min(r A, clip(r) A), also on y*_{<=L}, L ~ U(low, .95) |y*|"
    paper: ClassVar[str] = "2507.01679"

    def compose(self) -> Composition:
        """One guided member; group advantage; a clipped policy gradient for either author."""
        members = _beginning(self, end=0.0, length="uniform", count=1, learn=True)
        # Each term is divided by its own number of sequences: G per group, and one per group.
        own = clipped(self, aggregate="sequence_sum", weight=1 / self.max_new_tokens)
        given = AssumedOwnGradient(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            aggregate="sequence_sum",
            weight=1 / (self.max_new_tokens * self.group_size),
            where=(self.author,),
            limit=Limit(entropy_share=self.entropy_share),
        )
        return _guided(self, members, (OwnLogprobs(), GroupAdvantage()), own, given)


@part
class Luffy(OnGuided):
    """One demonstration is a member of each group of rollouts, and shares their baseline.

    Its ratio assumes a behaviour probability of 1, and is shaped so that unlikely tokens keep a
    gradient. Both terms are sums over tokens divided by the same constant.

    The authors' runs do not clip, and have the entropy bonus on the demonstration too; here own
    tokens are clipped, and the bonus is theirs alone.
    """

    gamma: Positive = 0.1
    entropy_weight: NonNegative = 0.001
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    provenance: ClassVar[str] = "mixed"
    formula: ClassVar[str] = "-min(r A, clip(r) A) on own, -pi / (pi + gamma) A on given tokens"
    paper: ClassVar[str] = "2504.14945"

    def compose(self) -> Composition:
        """One demonstration per group; group mean without std; a term for either author."""
        size, longest = self.group_size, self.max_new_tokens
        own = clipped(self, aggregate="sequence_sum", weight=(size - 1) / (size * longest))
        given = AssumedCertainGradient(
            gamma=self.gamma,
            aggregate="sequence_sum",
            weight=1 / (size * longest),
            where=(self.author,),
        )
        bonus = (EntropyBonus(weight=self.entropy_weight),) if self.entropy_weight else ()
        mean = GroupAdvantage(scale="none")
        return _guided(self, demonstrated(self), (mean,), own, given, *bonus)


@part
class Hpt(OnGuided):
    """Hybrid post-training: SFT on prompts that fail, RL on all others.

    Where at most ``gate`` of a group's rollouts are right, the demonstration is trained on and the
    rollouts are left out; elsewhere the opposite.

    The authors' scripts weigh demonstrations by 0.3 for a model of 1.5B, and by 1 elsewhere.

    Unconfirmed: that the policy gradient is Dr.GRPO's.
    """

    group_size: Size = 8
    gate: Whole = 0
    success: Number = 1.0
    nll_weight: NonNegative = 1.0
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    provenance: ClassVar[str] = "mixed"
    formula: ClassVar[str] = "-log pi(y*) where at most gate rollouts are right, else Dr.GRPO"
    paper: ClassVar[str] = "2509.04419"

    def compose(self) -> Composition:
        """Rollouts and a demonstration; one of the two is discarded; a loss for each."""
        imitate = CrossEntropy(weight=self.nll_weight, where=(self.author,))
        explore = clipped(self, aggregate="sequence_sum", weight=1 / self.max_new_tokens)
        gate = ImitateFailures(gate=self.gate, success=self.success, author=self.author)
        signals = (gate, GroupAdvantage(scale="none", kept_only=True))
        more = replace(self, group_size=self.group_size + 1)  # group_size counts the rollouts
        return _guided(more, demonstrated(self), signals, imitate, explore)
