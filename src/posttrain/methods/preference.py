"""Preference methods: on fixed pairs, on labelled answers, and on fresh pairs of rollouts."""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec.structs import replace

from posttrain.composition import (
    Aggregate,
    Composition,
    CrossEntropy,
    Dataset,
    Judge,
    Limit,
    PairwiseLogistic,
    PolicyRef,
    RankPairs,
    ReferenceLogprobs,
    SamplingSpec,
    SignalSpec,
    TermSpec,
    Verify,
)
from posttrain.composition.preference import (
    ContrastiveLogistic,
    OddsRatio,
    PairwiseAnchored,
    PairwiseDiscovered,
    PairwiseDivergence,
    PairwiseExact,
    PairwiseHinge,
    PairwiseMean,
    PairwiseNoiseContrastive,
    PairwiseRobust,
    PairwiseSelfPlay,
    PairwiseShared,
    PairwiseSquared,
    PairwiseWeighted,
    TargetMargin,
)
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.methods.moving_preference import MovingPreferenceMethod
from posttrain.methods.on_rollouts import rollouts
from posttrain.methods.unpaired import UnpairedMethod


class OnPairs(Config):
    """What methods on a file of pairs share."""

    data: Dataset

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "preference pairs"
    tendency: ClassVar[str] = "reshaping"


class OnPairsWithReference(OnPairs):
    """What methods on pairs share that stay close to a frozen policy."""

    reference: PolicyRef = "input"


def _on_pairs(method: OnPairs, *terms: TermSpec) -> Composition:
    """Pairs; reference log-probs where the method has a reference; the terms."""
    signals: tuple[SignalSpec, ...] = ()
    if isinstance(method, OnPairsWithReference):
        signals = (ReferenceLogprobs(policy=method.reference),)
    source = replace(method.data, preference=True)
    return Composition(source=source, signals=signals, terms=terms)


def _chosen(*, weight: float, aggregate: Aggregate) -> tuple[TermSpec, ...]:
    """Cross-entropy on chosen answers, or nothing at weight 0."""
    if weight < 0:
        raise ConfigError(f"nll_weight={weight}", expected="0 or more")
    limit = Limit(preference="chosen")
    return (CrossEntropy(weight=weight, aggregate=aggregate, limit=limit),) if weight else ()


# --- pairs, relative to a reference ----------------------------------------------------------


class Dpo(OnPairsWithReference, tag="dpo", tag_field="name"):
    """Direct preference optimisation on fixed pairs. With label smoothing it is cDPO.

    Unconfirmed: cDPO's smoothing is from general knowledge of a note; DPO itself is confirmed.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    formula: ClassVar[str] = "-log sigmoid(beta (rho_chosen - rho_rejected)), rho = log pi/pi_ref"
    paper: ClassVar[str] = "2305.18290"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; pairwise logistic loss."""
        term = PairwiseLogistic(beta=self.beta, label_smoothing=self.label_smoothing)
        return _on_pairs(self, term)


class RobustDpo(OnPairsWithReference, tag="robust_dpo", tag_field="name"):
    """DPO that corrects for a known share of flipped labels."""

    beta: float = 0.1
    flip_rate: float = 0.1

    formula: ClassVar[str] = "(-(1-e) log sigmoid(z) + e log sigmoid(-z)) / (1-2e), z = beta gap"
    paper: ClassVar[str] = "2403.00409"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; debiased logistic loss."""
        return _on_pairs(self, PairwiseRobust(beta=self.beta, flip_rate=self.flip_rate))


class Ipo(OnPairsWithReference, tag="ipo", tag_field="name"):
    """A bounded gap: the log-ratio gap per token is pulled to 1/(2 tau), and no further.

    Its tau belongs to means over tokens and is not comparable with a beta on sums, such as DPO's.
    """

    tau: float = 0.1

    formula: ClassVar[str] = "(rho_chosen/n - rho_rejected/m - 1/(2 tau))^2"
    paper: ClassVar[str] = "2310.12036"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; squared distance of the gap from its target."""
        return _on_pairs(self, PairwiseSquared(tau=self.tau))


class Hinge(OnPairsWithReference, tag="hinge", tag_field="name"):
    """SLiC's hinge on log-ratios, as RSO uses it: pairs beyond the margin teach nothing more."""

    beta: float = 0.05

    formula: ClassVar[str] = "max(0, 1 - beta (rho_chosen - rho_rejected))"
    paper: ClassVar[str] = "2309.06657"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; hinge loss."""
        return _on_pairs(self, PairwiseHinge(beta=self.beta))


class Exo(OnPairsWithReference, tag="exo", tag_field="name"):
    """Efficient exact optimisation: reverse KL to the smoothed labels."""

    beta: float = 0.1
    label_smoothing: float = 1e-3

    formula: ClassVar[str] = "KL(q || (1-e, e)), q = sigmoid(beta (rho_chosen - rho_rejected))"
    paper: ClassVar[str] = "2402.00856"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; reverse KL over the two answers."""
        term = PairwiseExact(beta=self.beta, label_smoothing=self.label_smoothing)
        return _on_pairs(self, term)


class Nca(OnPairsWithReference, tag="nca", tag_field="name"):
    """Noise-contrastive alignment: the chosen answer has a target of its own."""

    beta: float = 0.01

    formula: ClassVar[str] = "-log s(r_w) - log s(-r_w)/2 - log s(-r_l)/2, r = beta rho"
    paper: ClassVar[str] = "2402.05369"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; three logistic losses."""
        return _on_pairs(self, PairwiseNoiseContrastive(beta=self.beta))


class Sppo(OnPairsWithReference, tag="sppo", tag_field="name"):
    """Self-play preference optimisation with hard labels, on given pairs."""

    beta: float = 1e-3

    formula: ClassVar[str] = "(rho_chosen - 1/(2 beta))^2 + (rho_rejected + 1/(2 beta))^2"
    paper: ClassVar[str] = "2405.00675"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; two squared distances."""
        return _on_pairs(self, PairwiseSelfPlay(beta=self.beta))


class Apo(OnPairsWithReference, tag="apo", tag_field="name"):
    """Anchored preferences: ``zero`` for chosen answers better than the model's, ``down`` else."""

    direction: Literal["zero", "down"] = "zero"
    beta: float = 0.1

    formula: ClassVar[str] = "zero: 1 - s(r_w) + s(r_l); down: s(r_w) + 1 - s(r_w - r_l)"
    paper: ClassVar[str] = "2408.06266"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; one sigmoid per side."""
        return _on_pairs(self, PairwiseAnchored(direction=self.direction, beta=self.beta))


class FDpo(OnPairsWithReference, tag="f_dpo", tag_field="name"):
    """DPO for another divergence from the reference than reverse KL."""

    divergence: Literal["forward_kl", "js", "alpha"] = "js"
    alpha: float | None = None
    beta: float = 0.1

    formula: ClassVar[str] = "-log s(beta f'(exp rho_chosen) - beta f'(exp rho_rejected))"
    paper: ClassVar[str] = "2309.16240"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; logistic loss on the divergence's derivative."""
        term = PairwiseDivergence(divergence=self.divergence, alpha=self.alpha, beta=self.beta)
        return _on_pairs(self, term)


class LnDpo(OnPairsWithReference, tag="ln_dpo", tag_field="name"):
    """Length-normalised DPO: log-ratios per token. Its beta is not comparable with DPO's."""

    beta: float = 5.0

    formula: ClassVar[str] = "-log sigmoid(beta (rho_chosen/n - rho_rejected/m))"
    paper: ClassVar[str] = "2411.15124"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; logistic loss on means."""
        return _on_pairs(self, PairwiseMean(beta=self.beta))


class LdDpo(OnPairsWithReference, tag="ld_dpo", tag_field="name"):
    """Length-desensitised DPO: what one answer is longer than the other counts less."""

    beta: float = 0.1
    tail: float = 0.5

    formula: ClassVar[str] = "DPO, tokens beyond the shorter answer's length weighted by tail"
    paper: ClassVar[str] = "2409.06411"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; logistic loss on shortened sums."""
        return _on_pairs(self, PairwiseShared(beta=self.beta, tail=self.tail))


class Wpo(OnPairsWithReference, tag="wpo", tag_field="name"):
    """DPO that counts pairs by how likely the learner is to write them."""

    beta: float = 0.01

    formula: ClassVar[str] = "min(1, w_w w_l) DPO, w = exp(mean(log pi(y) - log sum_v pi(v)^2))"
    paper: ClassVar[str] = "2406.11827"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; weighted logistic loss."""
        return _on_pairs(self, PairwiseWeighted(beta=self.beta))


class DiscoPop(OnPairsWithReference, tag="discopop", tag_field="name"):
    """A loss that a language model proposed: logistic and exponential, blended by the gap.

    With the paper's tau, a learner that starts at its reference learns the opposite of the pairs:
    raise tau above 0.11, or start from a policy that already prefers the chosen answers.
    """

    beta: float = 0.05
    tau: float = 0.05

    formula: ClassVar[str] = "(1-m) (-log s(z)) + m exp(-z), m = s(z/tau), z = beta gap"
    paper: ClassVar[str] = "2406.08414"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; blended loss."""
        return _on_pairs(self, PairwiseDiscovered(beta=self.beta, tau=self.tau))


class Irpo(OnPairsWithReference, tag="irpo", tag_field="name"):
    """DPO plus the likelihood of chosen answers, which keeps them from sinking.

    This is one round of iterative RPO on given pairs. RPO (2405.16436) has the same two terms with
    ``nll_weight: 0.005``.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    aggregate: Aggregate = "sequence_mean"

    formula: ClassVar[str] = "DPO - nll_weight log pi(chosen)/n"
    paper: ClassVar[str] = "2404.19733"

    def compose(self) -> Composition:
        """Pairs; reference log-probs; logistic loss and cross-entropy on the chosen."""
        nll = _chosen(weight=self.nll_weight, aggregate=self.aggregate)
        return _on_pairs(self, PairwiseLogistic(beta=self.beta), *nll)


# --- pairs, without a reference --------------------------------------------------------------


class Orpo(OnPairs, tag="orpo", tag_field="name"):
    """Likelihood of chosen answers plus an odds ratio, in one stage and without a reference."""

    odds_weight: float = 0.1
    aggregate: Aggregate = "sequence_mean"

    formula: ClassVar[str] = "-log pi(chosen)/n - odds_weight log s(log odds_w - log odds_l)"
    paper: ClassVar[str] = "2403.07691"

    def compose(self) -> Composition:
        """Pairs; cross-entropy on the chosen and odds ratio."""
        nll = _chosen(weight=1.0, aggregate=self.aggregate)
        return _on_pairs(self, *nll, OddsRatio(weight=self.odds_weight))


class Cpo(OnPairs, tag="cpo", tag_field="name"):
    """Contrastive preference optimisation: DPO with a uniform reference, plus likelihood."""

    beta: float = 0.1
    nll_weight: float = 1.0
    aggregate: Aggregate = "token_mean"

    formula: ClassVar[str] = "-log s(beta (log pi(chosen) - log pi(rejected))) - w log pi(chosen)"
    paper: ClassVar[str] = "2401.08417"

    def compose(self) -> Composition:
        """Pairs; contrastive loss and cross-entropy on the chosen."""
        nll = _chosen(weight=self.nll_weight, aggregate=self.aggregate)
        return _on_pairs(self, ContrastiveLogistic(beta=self.beta), *nll)


class SimPo(OnPairs, tag="simpo", tag_field="name"):
    """Mean log-probs as reward, with a margin to reach, and no reference.

    Its beta multiplies means over tokens and is not comparable with one on sums, such as DPO's.
    """

    beta: float = 2.5
    gamma: float = 1.375

    formula: ClassVar[str] = "-log s(beta (log pi(chosen)/n - log pi(rejected)/m) - gamma)"
    paper: ClassVar[str] = "2405.14734"

    def compose(self) -> Composition:
        """Pairs; logistic loss on means beyond a margin."""
        return _on_pairs(self, TargetMargin(beta=self.beta, gamma=self.gamma))


class AlphaPo(OnPairs, tag="alphapo", tag_field="name"):
    """SimPO with another shape of reward than the logarithm.

    Unconfirmed: the shape is derived from a description and from TRL's option of that name.
    """

    alpha: float = 0.25
    beta: float = 2.5
    gamma: float = 0.1

    formula: ClassVar[str] = "SimPO with reward (1 - p^-alpha)/alpha, p = exp(log pi(y)/n)"
    paper: ClassVar[str] = "2501.03884"

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise ConfigError("alphapo with alpha=0", expected="another alpha: 0 is simpo")

    def compose(self) -> Composition:
        """Pairs; logistic loss on shaped rewards beyond a margin."""
        return _on_pairs(self, TargetMargin(beta=self.beta, gamma=self.gamma, alpha=self.alpha))


# --- fresh pairs -----------------------------------------------------------------------------


class OnRankedRollouts(Config):
    """What methods share that make their own pairs."""

    tasks: tuple[str, ...]
    group_size: int = 2
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    rewards: tuple[Judge, ...] = (Verify(),)
    beta: float = 0.1
    reference: PolicyRef = "input"

    interface: ClassVar[str] = "verifier reward"
    tendency: ClassVar[str] = "reshaping"


def _on_ranked(method: OnRankedRollouts, policy: PolicyRef, *terms: TermSpec) -> Composition:
    """Rollouts of a policy; its judges; best against worst; reference log-probs; the terms."""
    if method.group_size < 2:
        raise ConfigError(
            f"{method.__struct_config__.tag} with group_size={method.group_size}",
            expected="at least 2: one answer makes no pair",
        )
    return Composition(
        source=rollouts(method, policy=policy),
        signals=(*method.rewards, RankPairs(), ReferenceLogprobs(policy=method.reference)),
        terms=(PairwiseLogistic(beta=method.beta), *terms),
    )


class OnlineDpo(OnRankedRollouts, tag="online_dpo", tag_field="name"):
    """DPO on the learner's own rollouts, the best of a group against the worst.

    The paper ranks two samples with a judge; here the verifier does, and more samples make a
    strict order likelier. Any other loss on pairs goes with ``compose``.
    """

    provenance: ClassVar[str] = "on-policy"
    formula: ClassVar[str] = "DPO on (best, worst) of a group of rollouts of pi"
    paper: ClassVar[str] = "2402.04792"

    def compose(self) -> Composition:
        """Live rollouts; verifier and ranking; pairwise logistic loss."""
        return _on_ranked(self, "learner")


class IterativeDpo(OnRankedRollouts, tag="iterative_dpo", tag_field="name"):
    """One round of iterative RPO: pairs come from the policy that the round started from.

    A pipeline of such stages is the whole method: each round samples, and stays close to, its own
    input.
    """

    nll_weight: float = 1.0
    aggregate: Aggregate = "sequence_mean"

    provenance: ClassVar[str] = "off-policy"
    formula: ClassVar[str] = "DPO - nll_weight log pi(best)/n on rollouts of the input policy"
    paper: ClassVar[str] = "2404.19733"

    def compose(self) -> Composition:
        """Rollouts of the input; verifier and ranking; logistic loss and cross-entropy."""
        nll = _chosen(weight=self.nll_weight, aggregate=self.aggregate)
        return _on_ranked(self, "input", *nll)


PairMethod = (
    Dpo
    | RobustDpo
    | Ipo
    | Hinge
    | Exo
    | Nca
    | Sppo
    | Apo
    | FDpo
    | LnDpo
    | LdDpo
    | Wpo
    | DiscoPop
    | Irpo
    | Orpo
    | Cpo
    | SimPo
    | AlphaPo
    | OnlineDpo
    | IterativeDpo
)
PreferenceMethod = PairMethod | MovingPreferenceMethod | UnpairedMethod
