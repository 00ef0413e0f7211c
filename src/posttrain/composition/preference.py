"""Terms on preferences: pairs of a chosen and a rejected answer, or answers judged one by one.

The code behind a term is in ``objectives/preference.py``. Throughout, ρ = log π(y) − log π_ref(y)
summed over an answer's trained tokens, w the chosen and l the rejected answer, Δ = ρ_w − ρ_l.
A bar is an average over tokens: ρ̄ = ρ/|y|.

β multiplies a *sum* in most terms and a *mean* in ``pairwise_squared`` (there τ),
``pairwise_mean`` and ``target_margin``. An answer of 100 tokens makes the two differ by 100:
never carry a β over from one kind to the other.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from posttrain.composition.base import ANYONE, Term
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column


class PairTerm(Term):
    """What every loss on pairs has. ``where`` keeps pairs written by these kinds on both sides."""

    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "pair"
    aggregate: ClassVar[str] = "pair_mean"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.REFERENCE_LOGPROB, Column.PREFERENCE})
    accepts: ClassVar[frozenset[Kind]] = ANYONE


def _require(ok: bool, found: str, expected: str) -> None:
    if not ok:
        raise ConfigError(found, expected=expected)


def _positive(name: str, value: float) -> None:
    _require(0 < value < math.inf, f"{name}={value}", f"{name} > 0, and finite")


# --- pairs, relative to a reference ----------------------------------------------------------


class PairwiseLogistic(PairTerm, tag="pairwise_logistic", tag_field="type"):
    """DPO on a pair (arXiv 2305.18290), with optional label smoothing ε (cDPO).

    −(1−ε) log σ(βΔ) − ε log σ(−βΔ), Δ the chosen minus the rejected sum over tokens of
    log π − log π_ref.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _require(
            0 < self.beta < math.inf and 0 <= self.label_smoothing < 0.5,
            f"beta={self.beta}, label_smoothing={self.label_smoothing}",
            "beta > 0 and 0 <= label_smoothing < 0.5",
        )


class PairwiseRobust(PairTerm, tag="pairwise_robust", tag_field="type"):
    """Robust DPO (arXiv 2403.00409): DPO's loss, unbiased when a share ε of pairs is flipped.

    [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε). It is not bounded below: flipped pairs pull the
    other way for ever. It grows without limit as ε approaches 1/2.
    """

    beta: float = 0.1
    flip_rate: float = 0.1

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _require(
            0 <= self.flip_rate < 0.5,
            f"flip_rate={self.flip_rate}",
            "0 <= flip_rate < 0.5: at one half labels say nothing, and the loss divides by zero",
        )


class PairwiseSquared(PairTerm, tag="pairwise_squared", tag_field="type"):
    """IPO (arXiv 2310.12036): (ρ̄_w − ρ̄_l − 1/(2τ))², on log-ratios *averaged* over tokens.

    The paper writes sums; averages are what its authors meant and what libraries do. The minimum
    is at a gap of 1/(2τ), so preferences cannot push the policy further away than that.
    """

    tau: float = 0.1

    def __post_init__(self) -> None:
        _positive("tau", self.tau)


class PairwiseHinge(PairTerm, tag="pairwise_hinge", tag_field="type"):
    """max(0, 1 − βΔ): SLiC's loss (arXiv 2305.10425) on log-ratios, as in RSO (2309.06657)."""

    beta: float = 0.05

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class PairwiseExact(PairTerm, tag="pairwise_exact", tag_field="type"):
    """EXO on a pair (arXiv 2402.00856): reverse KL from the policy's preference to the labels'.

    q log(q / (1−ε)) + (1−q) log((1−q) / ε), q = σ(βΔ). Its minimum is at q = 1−ε. Without
    smoothing it would be infinite, so ε = 0 is refused.
    """

    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _require(
            0 < self.label_smoothing < 0.5,
            f"label_smoothing={self.label_smoothing}",
            "0 < label_smoothing < 0.5: the loss holds log label_smoothing",
        )


class PairwiseNoiseContrastive(PairTerm, tag="pairwise_noise_contrastive", tag_field="type"):
    """NCA on a pair (arXiv 2402.05369): −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l), r = βρ.

    Unlike DPO it has an absolute target for the chosen answer (σ(r_w) = 2/3, at r_w = log 2), so
    its likelihood does not sink with the rejected one's.
    """

    beta: float = 0.01

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class PairwiseSelfPlay(PairTerm, tag="pairwise_self_play", tag_field="type"):
    """SPPO with hard labels (arXiv 2405.00675): (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))².

    The paper's β of 0.001 asks for log-ratios of ±500 and is meant for tiny learning rates.
    """

    beta: float = 1e-3

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class PairwiseAnchored(PairTerm, tag="pairwise_anchored", tag_field="type"):
    """APO (arXiv 2408.06266): each side has a direction of its own.

    ``zero``: 1 − σ(βρ_w) + σ(βρ_l), chosen up and rejected down, for chosen answers better than
    what the model says now. ``down``: σ(βρ_w) + 1 − σ(βΔ), both down and rejected further, for
    chosen answers worse than the model's own.
    """

    direction: Literal["zero", "down"] = "zero"
    beta: float = 0.1

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class PairwiseDivergence(PairTerm, tag="pairwise_divergence", tag_field="type"):
    """f-DPO (arXiv 2309.16240): −log σ(β f'(e^{ρ_w}) − β f'(e^{ρ_l})).

    ``forward_kl``: f' = −e^{−ρ}; ``js`` (Jensen-Shannon): f' = log σ(ρ); ``alpha``:
    f' = (1 − e^{−αρ})/α, which is DPO as α → 0 and forward KL at α = 1. Constants that cancel
    are left out. Exponentials go on as straight lines above e^20, so that they cannot overflow.
    """

    divergence: Literal["forward_kl", "js", "alpha"] = "js"
    alpha: float | None = None  # of the alpha divergence, and of no other
    beta: float = 0.1

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        named = self.divergence == "alpha"
        _require(
            (self.alpha is not None) == named and (self.alpha is None or 0 < self.alpha < 1),
            f"divergence={self.divergence} with alpha={self.alpha}",
            "0 < alpha < 1 with divergence: alpha, and no alpha with the others",
        )


class PairwiseMean(PairTerm, tag="pairwise_mean", tag_field="type"):
    """DPO on log-ratios averaged over tokens: −log σ(β(ρ̄_w − ρ̄_l)) (Tülu 3, arXiv 2411.15124).

    At equal lengths n it is DPO with β/n.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class PairwiseShared(PairTerm, tag="pairwise_shared", tag_field="type"):
    """LD-DPO (arXiv 2409.06411): what is longer than the other side counts α.

    DPO in which tokens up to the shorter side's length count 1 and the rest ``tail``, in π and
    π_ref alike. ``tail: 1`` is DPO. (TRL shortens π only, which leaves −(1−α) log π_ref of the
    tail in the margin; here the margin is 0 when both policies are equal.)
    """

    beta: float = 0.1
    tail: float = 0.5

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _require(0 <= self.tail < 1, f"tail={self.tail}", "0 <= tail < 1: 1 is pairwise_logistic")


class PairwiseWeighted(PairTerm, tag="pairwise_weighted", tag_field="type"):
    """WPO (arXiv 2406.11827): DPO, each pair weighted by how likely the policy is to write it.

    min(1, w_w w_l) · −log σ(βΔ), w = exp(mean_t [log π(y_t) − log Σ_v π(v)²]), no gradient
    through the weight. The upper bound 1 is that of the authors' code.
    """

    beta: float = 0.01

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class PairwiseDiscovered(PairTerm, tag="pairwise_discovered", tag_field="type"):
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414).

    (1−m) · −log σ(z) + m · e^{−z}, z = βΔ, m = σ(z/τ): logistic on pairs that are still wrong,
    exponential on those that are right. It is not convex: at these defaults a policy that equals
    its reference stands on the wrong side of a hump (local minimum at z = −0.12, maximum at
    0.07), so it moves the wrong way and stays there. At 0 the slope is −¾ + (1 − log 2)/(4τ): a
    stage that starts at its reference needs τ above 0.1023.
    """

    beta: float = 0.05
    tau: float = 0.05

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _positive("tau", self.tau)


class PairwiseTransport(PairTerm, tag="pairwise_transport", tag_field="type"):
    """AOT on pairs (arXiv 2406.05882): −log σ(β(m − q)), m = log π(y_w) − log π(y_l).

    q is the reference's margin of the same rank in the draw, from ``match_quantiles`` of margins.
    Summed over a draw it is the cost of transporting one sorted sample of margins to the other: it
    asks of the distribution of margins, not of each pair, to be larger than the reference's. With
    a single pair it is DPO.
    """

    beta: float = 0.01
    needs: ClassVar[frozenset[Column]] = frozenset({Column.PREFERENCE, Column.QUANTILE})

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


# --- pairs, without a reference --------------------------------------------------------------


class FreePairTerm(PairTerm):
    """A loss on pairs that reads nothing but the policy."""

    needs: ClassVar[frozenset[Column]] = frozenset({Column.PREFERENCE})


class OddsRatio(FreePairTerm, tag="odds_ratio", tag_field="type"):
    """ORPO's second term (arXiv 2403.07691): −log σ(log odds_w − log odds_l).

    odds = p̄ / (1 − p̄), p̄ = exp of the mean token log-prob. The method adds cross-entropy on the
    chosen answers with weight 1; the paper's λ is this term's weight.
    """

    weight: float = 0.1


class ContrastiveLogistic(FreePairTerm, tag="contrastive_logistic", tag_field="type"):
    """CPO's first term (arXiv 2401.08417): −log σ(β(log π(y_w) − log π(y_l))), sums over tokens.

    DPO with a uniform reference. The method adds cross-entropy on the chosen answers.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class TargetMargin(FreePairTerm, tag="target_margin", tag_field="type"):
    """SimPO (arXiv 2405.14734) and AlphaPO (2501.03884): −log σ(β(r_w − r_l) − γ).

    r is the mean token log-prob m for α = 0 (SimPO), else (1 − e^{−αm})/α (AlphaPO), which tends
    to m as α → 0.
    """

    beta: float = 2.5
    gamma: float = 1.375
    alpha: float = 0.0

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _require(
            0 <= self.gamma < math.inf and math.isfinite(self.alpha),
            f"gamma={self.gamma}, alpha={self.alpha}",
            "gamma >= 0, and both finite",
        )


# --- answers judged one by one ---------------------------------------------------------------


class UnpairedTerm(Term):
    """A loss on answers that are good or bad by themselves. Every answer counts alike."""

    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "sequence"
    aggregate: ClassVar[str] = "per_sequence"
    accepts: ClassVar[frozenset[Kind]] = ANYONE


class ProspectValue(UnpairedTerm, tag="prospect_value", tag_field="type"):
    """KTO (arXiv 2402.01306): gains and losses against what the policy gives to any answer.

    Good answers λ_D (1 − σ(β(ρ − z₀))), bad ones λ_U (1 − σ(β(z₀ − ρ))). z₀ = max(0, mean ρ of
    other prompts' answers) comes from the ``mismatched_kl`` signal and carries no gradient. With
    n_D good and n_U bad answers, keep n_D λ_D / (n_U λ_U) between 1 and 4/3 (the paper's advice).
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    needs: ClassVar[frozenset[Column]] = frozenset(
        {Column.REFERENCE_LOGPROB, Column.LABEL, Column.MISMATCHED_KL}
    )

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        _positive("desirable_weight", self.desirable_weight)
        _positive("undesirable_weight", self.undesirable_weight)


class BinaryClassifier(UnpairedTerm, tag="binary_classifier", tag_field="type"):
    """BCO (arXiv 2404.04656): −log σ(r − δ) on good answers, −log σ(δ − r) on bad ones, r = βρ.

    δ/β comes from the ``log_ratio_centre`` signal: half the sum of the mean ρ of good and of bad
    answers, of this draw alone. TRL smooths δ over steps, which would be a state that a resumed
    run must carry.
    """

    beta: float = 0.01
    needs: ClassVar[frozenset[Column]] = frozenset(
        {Column.REFERENCE_LOGPROB, Column.LABEL, Column.LOG_RATIO_CENTRE}
    )

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


class TransportedReward(UnpairedTerm, tag="transported_reward", tag_field="type"):
    """AOT on chosen and rejected answers apart (arXiv 2406.05882): −log σ(β · sign · (ρ − q)).

    q is the log-ratio of the same rank on the other side, from ``match_quantiles`` of rewards, a
    constant. Chosen and rejected answers are told apart by their sign, and need not share a
    prompt. The mean over answers has the value and the gradient of the mean over matched pairs of
    −log σ(β(ρ_w − ρ_l)): the gradient counts twice, since each side moves one of the two.
    """

    beta: float = 0.01
    needs: ClassVar[frozenset[Column]] = frozenset(
        {Column.PREFERENCE, Column.QUANTILE, Column.REFERENCE_LOGPROB}
    )

    def __post_init__(self) -> None:
        _positive("beta", self.beta)


PreferenceTerm = (
    PairwiseTransport
    | TransportedReward
    | PairwiseLogistic
    | PairwiseRobust
    | PairwiseSquared
    | PairwiseHinge
    | PairwiseExact
    | PairwiseNoiseContrastive
    | PairwiseSelfPlay
    | PairwiseAnchored
    | PairwiseDivergence
    | PairwiseMean
    | PairwiseShared
    | PairwiseWeighted
    | PairwiseDiscovered
    | OddsRatio
    | ContrastiveLogistic
    | TargetMargin
    | ProspectValue
    | BinaryClassifier
)
