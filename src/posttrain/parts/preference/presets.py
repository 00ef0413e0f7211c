"""Preference methods: on given pairs with a second term, and on pairs of rollouts.

    irpo, orpo, cpo, alphapo     file of pairs ─────────────────────────▶ terms
    online_dpo, iterative_dpo    rollouts ─ rewards, rank_pairs ─▶ pairs ─▶ terms

A method that is one term is made with its term, in pairs.py, unpaired.py and reference_free.py.
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.core.bounds import NonNegative, Number, Positive, Size, Tokens
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.parts import unions
from posttrain.parts.base import Aggregate, Limit, PolicyRef, Term
from posttrain.parts.composition import Composition, Method
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.shapes import rollouts
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.preference.ranking import RankPairs
from posttrain.parts.preference.reference_free import ContrastiveLogistic, OddsRatio, Simpo
from posttrain.parts.preference.shapes import PairMethod, on_pairs
from posttrain.parts.registry import part, tag_of
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.supervised.likelihood import CrossEntropy


def _chosen(*, weight: float, aggregate: Aggregate) -> tuple[Term, ...]:
    """Cross-entropy on chosen answers, or nothing at weight 0."""
    if weight < 0:
        raise ConfigError(f"nll_weight={weight}", expected="0 or more")
    limit = Limit(preference="chosen")
    return (CrossEntropy(weight=weight, aggregate=aggregate, limit=limit),) if weight else ()


@part
class Irpo(PairMethod):
    """DPO plus cross-entropy on chosen answers, which keeps their likelihood from falling.

    This is one round of iterative RPO on given pairs. RPO (2405.16436) has the same two terms with
    ``nll_weight: 0.005``.
    """

    reference: PolicyRef = "input"
    beta: Positive = 0.1
    nll_weight: NonNegative = 1.0
    aggregate: Aggregate = "sequence_mean"

    formula: ClassVar[str] = "DPO - nll_weight log pi(chosen)/n"
    paper: ClassVar[str] = "2404.19733"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; DPO and cross-entropy on the chosen."""
        nll = _chosen(weight=self.nll_weight, aggregate=self.aggregate)
        return on_pairs(self.data, Dpo(beta=self.beta), *nll, reference=self.reference)


@part
class Orpo(PairMethod):
    """Cross-entropy on chosen answers plus an odds ratio, without a reference."""

    odds_weight: NonNegative = 0.1
    aggregate: Aggregate = "sequence_mean"

    formula: ClassVar[str] = "-log pi(chosen)/n - odds_weight log s(log odds_w - log odds_l)"
    paper: ClassVar[str] = "2403.07691"

    def compose(self) -> Composition:
        """Pairs; cross-entropy on the chosen and odds ratio."""
        nll = _chosen(weight=1.0, aggregate=self.aggregate)
        return on_pairs(self.data, *nll, OddsRatio(weight=self.odds_weight))


@part
class Cpo(PairMethod):
    """Contrastive preference optimisation: DPO with a uniform reference, plus cross-entropy."""

    beta: Positive = 0.1
    nll_weight: NonNegative = 1.0
    aggregate: Aggregate = "token_mean"

    formula: ClassVar[str] = "-log s(beta (log pi(chosen) - log pi(rejected))) - w log pi(chosen)"
    paper: ClassVar[str] = "2401.08417"

    def compose(self) -> Composition:
        """Pairs; contrastive loss and cross-entropy on the chosen."""
        nll = _chosen(weight=self.nll_weight, aggregate=self.aggregate)
        return on_pairs(self.data, ContrastiveLogistic(beta=self.beta), *nll)


@part
class Alphapo(PairMethod):
    """SimPO with another reward function than the logarithm.

    Unconfirmed: the shape is derived from a description and from TRL's option of that name.
    """

    alpha: Number = 0.25
    beta: Positive = 2.5
    gamma: NonNegative = 0.1

    formula: ClassVar[str] = "SimPO with reward (1 - p^-alpha)/alpha, p = exp(log pi(y)/n)"
    paper: ClassVar[str] = "2501.03884"

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise ConfigError("alphapo with alpha=0", expected="another alpha: 0 is simpo")

    def compose(self) -> Composition:
        """Pairs; SimPO with shaped rewards."""
        return on_pairs(self.data, Simpo(beta=self.beta, gamma=self.gamma, alpha=self.alpha))


class OnRankedRollouts(Method):
    """Base class of methods that rank rollouts into pairs."""

    tasks: tuple[str, ...]
    group_size: Size = 2
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    rewards: tuple[unions.AnyJudge, ...] = (Verify(),)
    beta: Positive = 0.1
    reference: PolicyRef = "input"

    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"


def _on_ranked(method: OnRankedRollouts, policy: PolicyRef, *terms: Term) -> Composition:
    """Rollouts of a policy; rewards; best against worst; reference log-probs; the terms."""
    if method.group_size < 2:
        raise ConfigError(
            f"{tag_of(method)} with group_size={method.group_size}",
            expected="at least 2: one answer makes no pair",
        )
    return Composition(
        source=rollouts(method, policy=policy),
        signals=(*method.rewards, RankPairs(), ReferenceLogprobs(policy=method.reference)),
        terms=(Dpo(beta=method.beta), *terms),
    )


@part
class OnlineDpo(OnRankedRollouts):
    """DPO on the learner's own rollouts, the best of a group against the worst.

    The paper ranks two samples with a judge; here the verifier does, and more samples make ties
    less likely. For another loss on pairs use ``compose``.
    """

    provenance: ClassVar[str] = "on-policy"
    formula: ClassVar[str] = "DPO on (best, worst) of a group of rollouts of pi"
    paper: ClassVar[str] = "2402.04792"

    def compose(self) -> Composition:
        """Live rollouts; verifier and ranking; DPO."""
        return _on_ranked(self, "learner")


@part
class IterativeDpo(OnRankedRollouts):
    """One round of iterative RPO: pairs come from the policy that the round started from.

    A pipeline of such stages is the whole method: each round samples from its input and uses it as
    the reference.
    """

    nll_weight: NonNegative = 1.0
    aggregate: Aggregate = "sequence_mean"

    provenance: ClassVar[str] = "off-policy"
    formula: ClassVar[str] = "DPO - nll_weight log pi(best)/n on rollouts of the input policy"
    paper: ClassVar[str] = "2404.19733"

    def compose(self) -> Composition:
        """Rollouts of the input; verifier and ranking; DPO and cross-entropy."""
        nll = _chosen(weight=self.nll_weight, aggregate=self.aggregate)
        return _on_ranked(self, "input", *nll)
