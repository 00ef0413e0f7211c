"""Offline RL: logged answers with rewards, from whoever wrote them."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.core.bounds import Inner, NonNegative, Number, Positive, Share
from posttrain.parts.base import Aggregate, PolicyRef, Signal
from posttrain.parts.composition import Composition, Method
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.offline.filters import KeepPositiveAdvantages
from posttrain.parts.offline.weighted import AdvantageWeighted, LeftoverLunch, RewardGold
from posttrain.parts.registry import part
from posttrain.parts.sources.dataset import Dataset


def logged_advantage(baseline: float | None) -> GroupAdvantage:
    """R − baseline; the mean reward of the draw when there is none.

    A log with one answer per prompt has no baseline of the prompt's own, and there is no value
    model here.
    """
    if baseline is None:
        return GroupAdvantage(baseline="batch_mean", scale="none")
    return GroupAdvantage(baseline="constant", value=baseline, scale="none")


@part
class Awr(Method):
    """Advantage-weighted regression on logged answers.

    The paper's experiments standardise the advantages first, and subtract a value function. Here
    they are differences of rewards: choose ``beta`` on their scale.

    Unconfirmed: the formula and its defaults are from general knowledge.
    """

    data: Dataset
    beta: Positive = 1.0
    max_weight: Positive = 20.0
    baseline: Number | None = None  # null: the mean reward of the draw
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "logged reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-min(exp(A / beta), max_weight) log pi(y_t), A = R - baseline"
    paper: ClassVar[str] = "1910.00177"

    def compose(self) -> Composition:
        """Logged answers; advantage over the draw; weighted cross-entropy."""
        term = AdvantageWeighted(
            beta=self.beta, max_weight=self.max_weight, aggregate=self.aggregate
        )
        return Composition(
            source=self.data, signals=(logged_advantage(self.baseline),), terms=(term,)
        )


@part
class ALol(Method):
    """Advantage-leftover-lunch RL: logged answers better than the baseline, each as one action.

    The paper subtracts a value head trained on the reference's own answers; here the baseline is
    a constant or the draw's mean. It also draws answers in proportion to their advantage; here
    each is drawn alike and weighted by it.
    """

    data: Dataset
    ratio: Literal["sequence", "token", "none"] = "sequence"
    clip: Inner = 0.9
    kl_weight: NonNegative = 0.0
    baseline: Number | None = None  # null: the mean reward of the draw
    reference: PolicyRef = "input"
    aggregate: Aggregate = "sequence_sum"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "logged reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-sg(clip(pi(y) / pi_ref(y))) A log pi(y) where A > 0"
    paper: ClassVar[str] = "2305.14718"

    def compose(self) -> Composition:
        """Logged answers; advantage, those above zero, the reference where it is compared with."""
        term = LeftoverLunch(
            ratio=self.ratio, clip=self.clip, kl_weight=self.kl_weight, aggregate=self.aggregate
        )
        signals: list[Signal] = [logged_advantage(self.baseline), KeepPositiveAdvantages()]
        if self.ratio != "none" or self.kl_weight:
            signals.append(ReferenceLogprobs(policy=self.reference))
        return Composition(source=self.data, signals=tuple(signals), terms=(term,))


@part
class RGold(Method):
    """GOLD with rewards: likely tokens of well-paid answers, no reference and no baseline."""

    data: Dataset
    floor: Share = 0.1
    aggregate: Aggregate = "sequence_sum"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "logged reward"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-sg(max(pi(y_t), floor)) R log pi(y_t)"
    paper: ClassVar[str] = "2009.07839"

    def compose(self) -> Composition:
        """Logged answers; no signals; the weighted likelihood."""
        term = RewardGold(floor=self.floor, aggregate=self.aggregate)
        return Composition(source=self.data, terms=(term,))
