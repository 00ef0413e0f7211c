"""Supervised methods: likelihoods of given answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition import (
    Aggregate,
    Composition,
    CrossEntropy,
    Dataset,
    DynamicCrossEntropy,
    Limit,
    OwnLogprobs,
    PolicyRef,
    ProbabilityLoss,
    ProximalCrossEntropy,
    TeacherDistribution,
    TeacherForwardKL,
    WeightedCrossEntropy,
)
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError


class Sft(Config, tag="sft", tag_field="name"):
    """Supervised fine-tuning: the likelihood of somebody else's answers."""

    data: Dataset
    aggregate: Aggregate = "token_mean"
    limit: Limit = Limit()

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "expansion or reshaping, decided by the data"
    formula: ClassVar[str] = "-log pi(y_t)"
    paper: ClassVar[str] = "-"

    def compose(self) -> Composition:
        """Data set; no signals; cross-entropy."""
        term = CrossEntropy(aggregate=self.aggregate, limit=self.limit)
        return Composition(source=self.data, terms=(term,))


class WeightedSft(Config, tag="weighted_sft", tag_field="name"):
    """Supervised fine-tuning in which rows count by a weight, or by their logged reward.

    Name the column in the data set: ``data: {path: ..., weight: <column>}``, or ``reward:`` with
    ``by: reward`` (weighted behaviour cloning).
    """

    data: Dataset
    by: Literal["weight", "reward"] = "weight"
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets, weighted"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-w log pi(y_t)"
    paper: ClassVar[str] = "2305.14718"

    def compose(self) -> Composition:
        """Data set with a column of numbers; weighted cross-entropy."""
        term = WeightedCrossEntropy(by=self.by, aggregate=self.aggregate)
        return Composition(source=self.data, terms=(term,))


class Dft(Config, tag="dft", tag_field="name"):
    """Dynamic fine-tuning: cross-entropy without its preference for unlikely tokens."""

    data: Dataset
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "-sg(pi(y_t)) log pi(y_t)"
    paper: ClassVar[str] = "2508.05629"

    def compose(self) -> Composition:
        """Data set; no signals; cross-entropy weighted by the policy's own probability."""
        return Composition(source=self.data, terms=(DynamicCrossEntropy(aggregate=self.aggregate),))


class Asft(Config, tag="asft", tag_field="name"):
    """Anchored supervised fine-tuning: DFT, held near the policy that it started from.

    The penalty is the KL over the full vocabulary, the anchor first; ``kl_weight: 0`` is DFT.

    Unconfirmed: the KL's direction was read at second hand; its weight is ours.
    """

    data: Dataset
    kl_weight: float = 0.1
    anchor: PolicyRef = "input"
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "reshaping, with little drift"
    formula: ClassVar[str] = "-sg(pi(y_t)) log pi(y_t) + kl_weight KL(pi_anchor || pi)"
    paper: ClassVar[str] = "2509.23753"

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ConfigError(f"asft with kl_weight={self.kl_weight}", expected="0 or more")

    def compose(self) -> Composition:
        """Data set; the anchor's distributions; DFT and a forward KL."""
        dft = DynamicCrossEntropy(aggregate=self.aggregate)
        if not self.kl_weight:
            return Composition(source=self.data, terms=(dft,))
        anchored = TeacherForwardKL(weight=self.kl_weight, aggregate=self.aggregate)
        signal = TeacherDistribution(routes={"*": self.anchor})
        return Composition(source=self.data, signals=(signal,), terms=(dft, anchored))


class ProbabilitySft(Config, tag="probability_sft", tag_field="name"):
    """A function of the probability in place of its logarithm: small ``alpha`` for a model that
    knows little about the task, 1 and more for one that knows much.

    Unconfirmed: the family was derived from a description at second hand.
    """

    data: Dataset
    alpha: float = 1.0
    at_least: float = 0.0
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "reshaping"
    formula: ClassVar[str] = "(1 - pi(y_t)^alpha) / alpha where pi(y_t) >= at_least"
    paper: ClassVar[str] = "2510.00526"

    def compose(self) -> Composition:
        """Data set; no signals; one loss of the family."""
        term = ProbabilityLoss(alpha=self.alpha, at_least=self.at_least, aggregate=self.aggregate)
        return Composition(source=self.data, terms=(term,))


class Psft(Config, tag="psft", tag_field="name"):
    """Proximal supervised fine-tuning: no token is pushed further once it has gained its share.

    The snapshot is taken at every draw: set the stage's ``updates_per_draw`` to 8, the paper's
    interval. With 1 the ratio never leaves 1, and this is supervised fine-tuning.
    """

    data: Dataset
    clip_high: float = 0.28
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "reshaping, with little drift"
    formula: ClassVar[str] = "-min(r, 1 + clip_high), r = pi(y_t) / pi_old(y_t)"
    paper: ClassVar[str] = "2508.17784"

    def compose(self) -> Composition:
        """Data set; the learner's log-probs when drawn; clipped likelihood ratio."""
        term = ProximalCrossEntropy(clip_high=self.clip_high, aggregate=self.aggregate)
        return Composition(source=self.data, signals=(OwnLogprobs(),), terms=(term,))


SupervisedMethod = Sft | WeightedSft | Dft | Asft | ProbabilitySft | Psft
