"""Losses on pairs of a chosen and a rejected answer, relative to a reference.

Throughout, ρ = log π(y) − log π_ref(y) summed over an answer's trained tokens, w the chosen and l
the rejected answer, Δ = ρ_w − ρ_l. A bar is an average over tokens: ρ̄ = ρ/|y|.

β multiplies a *sum* in most losses and a *mean* in ``ipo`` (there τ) and ``ln_dpo``. An answer of
100 tokens makes the two differ by a factor of 100: never reuse a β of one kind for the other.

Each is a term, and with a file of pairs a method:

    method: {name: dpo, data: ...} ──OnPairs──▶ Dataset ▶ ReferenceLogprobs, term.signals() ▶ term

Shape legend: ``N`` trained tokens, ``P`` pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.core.bounds import Decay, Inner, Positive, Share
from posttrain.core.lazy import F, torch
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, PolicyRef, Signal, Stats, Values
from posttrain.parts.preference.ranking import MatchQuantiles
from posttrain.parts.preference.shapes import OnPairs
from posttrain.parts.preference.sides import (
    PairTerm,
    log_ratio_N,
    means,
    paired,
    require,
    shared_sums,
    sums,
)
from posttrain.parts.registry import part
from posttrain.parts.tensors import capped_exp

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch


@part(method=OnPairs)
class Dpo(PairTerm):
    """DPO (arXiv 2305.18290), with optional label smoothing ε (cDPO).

    −(1−ε) log σ(βΔ) − ε log σ(−βΔ), Δ the chosen minus the rejected sum over tokens of
    log π − log π_ref.

    Unconfirmed: cDPO's smoothing is from general knowledge of a note; DPO itself is confirmed.
    """

    beta: Positive = 0.1
    label_smoothing: Decay = 0.0

    formula: ClassVar[str] = "-log sigmoid(beta (rho_chosen - rho_rejected)), rho = log pi/pi_ref"
    paper: ClassVar[str] = "2305.18290"

    def __post_init__(self) -> None:
        require(
            self.label_smoothing < 0.5,
            f"label_smoothing={self.label_smoothing}",
            "below 0.5: at one half labels say nothing",
        )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −(1−ε) log σ(βΔ) − ε log σ(−βΔ)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        z, eps = self.beta * rho.gap, self.label_smoothing
        return paired(-(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z), z, rho)


@part(method=OnPairs)
class RobustDpo(PairTerm):
    """Robust DPO (arXiv 2403.00409): DPO's loss, unbiased when a share ε of pairs is flipped.

    [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε), with ε known. It is not bounded below: the gradient
    of the second term never vanishes. It grows without limit as ε approaches 1/2.
    """

    beta: Positive = 0.1
    flip_rate: Decay = 0.1

    formula: ClassVar[str] = "(-(1-e) log sigmoid(z) + e log sigmoid(-z)) / (1-2e), z = beta gap"
    paper: ClassVar[str] = "2403.00409"

    def __post_init__(self) -> None:
        require(
            0 <= self.flip_rate < 0.5,
            f"flip_rate={self.flip_rate}",
            "0 <= flip_rate < 0.5: at one half labels say nothing, and the loss divides by zero",
        )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] [−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        z, eps = self.beta * rho.gap, self.flip_rate
        loss = (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)
        return paired(loss, z, rho)


@part(method=OnPairs)
class Ipo(PairTerm):
    """IPO (arXiv 2310.12036): (ρ̄_w − ρ̄_l − 1/(2τ))², on log-ratios *averaged* over tokens.

    The paper writes sums; its authors meant averages, and libraries use them. The minimum is at a
    gap of 1/(2τ), which bounds the distance from the reference.

    Its tau applies to means over tokens and is not comparable with a beta on sums, such as DPO's.
    """

    tau: Positive = 0.1

    formula: ClassVar[str] = "(rho_chosen/n - rho_rejected/m - 1/(2 tau))^2"
    paper: ClassVar[str] = "2310.12036"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] (ρ̄_w − ρ̄_l − 1/(2τ))²."""
        rho = means(log_ratio_N(stats, batch), batch)
        return paired((rho.gap - 1 / (2 * self.tau)).square(), rho.gap, rho)


@part(method=OnPairs)
class Hinge(PairTerm):
    """max(0, 1 − βΔ): SLiC's hinge (arXiv 2305.10425) on log-ratios, as in RSO (2309.06657).

    Pairs beyond the margin have no gradient.
    """

    beta: Positive = 0.05

    formula: ClassVar[str] = "max(0, 1 - beta (rho_chosen - rho_rejected))"
    paper: ClassVar[str] = "2309.06657"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] max(0, 1 − βΔ)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        z = self.beta * rho.gap
        return paired((1 - z).relu(), z, rho)


@part(method=OnPairs)
class Exo(PairTerm):
    """EXO, efficient exact optimisation (arXiv 2402.00856): reverse KL to the smoothed labels.

    q log(q / (1−ε)) + (1−q) log((1−q) / ε), q = σ(βΔ). Its minimum is at q = 1−ε. Without
    smoothing it would be infinite, so ε = 0 is refused.
    """

    beta: Positive = 0.1
    label_smoothing: Decay = 1e-3

    formula: ClassVar[str] = "KL(q || (1-e, e)), q = sigmoid(beta (rho_chosen - rho_rejected))"
    paper: ClassVar[str] = "2402.00856"

    def __post_init__(self) -> None:
        require(
            0 < self.label_smoothing < 0.5,
            f"label_smoothing={self.label_smoothing}",
            "0 < label_smoothing < 0.5: the loss holds log label_smoothing",
        )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] q log(q / (1−ε)) + (1−q) log((1−q) / ε), q = σ(βΔ)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        z, eps = self.beta * rho.gap, self.label_smoothing
        loss = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-eps))
        loss = loss + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(eps))
        return paired(loss, z, rho)


@part(method=OnPairs)
class Nca(PairTerm):
    """Noise-contrastive alignment (arXiv 2402.05369): the chosen answer has its own target.

    −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l), r = βρ. The target is σ(r_w) = 2/3, at
    r_w = log 2, so unlike in DPO the chosen answer's likelihood does not fall with the rejected
    one's.
    """

    beta: Positive = 0.01

    formula: ClassVar[str] = "-log s(r_w) - log s(-r_w)/2 - log s(-r_l)/2, r = beta rho"
    paper: ClassVar[str] = "2402.05369"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        r = rho.map(lambda side: self.beta * side)
        down = F.logsigmoid(-r.chosen) + F.logsigmoid(-r.rejected)
        return paired(-F.logsigmoid(r.chosen) - 0.5 * down, r.gap, rho)


@part(method=OnPairs)
class Sppo(PairTerm):
    """SPPO with hard labels, on given pairs (arXiv 2405.00675): (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))².

    The paper's β of 0.001 has targets of ±500 for log-ratios and needs tiny learning rates.
    """

    beta: Positive = 1e-3

    formula: ClassVar[str] = "(rho_chosen - 1/(2 beta))^2 + (rho_rejected + 1/(2 beta))^2"
    paper: ClassVar[str] = "2405.00675"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))²."""
        rho = sums(log_ratio_N(stats, batch), batch)
        half = 1 / (2 * self.beta)
        loss = (rho.chosen - half).square() + (rho.rejected + half).square()
        return paired(loss, self.beta * rho.gap, rho)


@part(method=OnPairs)
class Apo(PairTerm):
    """Anchored preference optimisation (arXiv 2408.06266): each side has its own direction.

    ``zero``: 1 − σ(βρ_w) + σ(βρ_l), chosen up and rejected down, for chosen answers better than
    the model's own. ``down``: σ(βρ_w) + 1 − σ(βΔ), both down and rejected further, for chosen
    answers worse than the model's own.
    """

    direction: Literal["zero", "down"] = "zero"
    beta: Positive = 0.1

    formula: ClassVar[str] = "zero: 1 - s(r_w) + s(r_l); down: s(r_w) + 1 - s(r_w - r_l)"
    paper: ClassVar[str] = "2408.06266"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] zero: 1 − σ(r_w) + σ(r_l); down: σ(r_w) + 1 − σ(r_w − r_l)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        r = rho.map(lambda side: self.beta * side)
        if self.direction == "zero":
            loss = (-r.chosen).sigmoid() + r.rejected.sigmoid()
        else:
            loss = r.chosen.sigmoid() + (-r.gap).sigmoid()
        return paired(loss, r.gap, rho)


@part(method=OnPairs)
class FDpo(PairTerm):
    """f-DPO (arXiv 2309.16240): DPO for another divergence from the reference than reverse KL.

    −log σ(β f'(e^{ρ_w}) − β f'(e^{ρ_l})), with ``forward_kl``: f' = −e^{−ρ}; ``js``
    (Jensen-Shannon): f' = log σ(ρ); ``alpha``: f' = (1 − e^{−αρ})/α, which is DPO as α → 0 and
    forward KL at α = 1. Constants that cancel are left out. Exponentials are continued linearly
    above e^20, so that they cannot overflow.
    """

    divergence: Literal["forward_kl", "js", "alpha"] = "js"
    alpha: Inner | None = None  # only for the alpha divergence
    beta: Positive = 0.1

    formula: ClassVar[str] = "-log s(beta f'(exp rho_chosen) - beta f'(exp rho_rejected))"
    paper: ClassVar[str] = "2309.16240"

    def __post_init__(self) -> None:
        named = self.divergence == "alpha"
        require(
            (self.alpha is not None) == named and (self.alpha is None or 0 < self.alpha < 1),
            f"divergence={self.divergence} with alpha={self.alpha}",
            "0 < alpha < 1 with divergence: alpha, and no alpha with the others",
        )

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(β f'(e^{ρ_w}) − β f'(e^{ρ_l}))."""

        def derivative(rho_P: Tensor) -> Tensor:
            if self.divergence == "js":
                return F.logsigmoid(rho_P)
            alpha = 1.0 if self.alpha is None else self.alpha  # forward KL is alpha = 1
            return -capped_exp(-alpha * rho_P) / alpha

        rho = sums(log_ratio_N(stats, batch), batch)
        z = self.beta * rho.map(derivative).gap
        return paired(-F.logsigmoid(z), z, rho)


@part(method=OnPairs)
class LnDpo(PairTerm):
    """Length-normalised DPO (Tülu 3, arXiv 2411.15124): −log σ(β(ρ̄_w − ρ̄_l)).

    At equal lengths n it is DPO with β/n, so its beta is not comparable with DPO's.
    """

    beta: Positive = 5.0

    formula: ClassVar[str] = "-log sigmoid(beta (rho_chosen/n - rho_rejected/m))"
    paper: ClassVar[str] = "2411.15124"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(β(ρ̄_w − ρ̄_l))."""
        rho = means(log_ratio_N(stats, batch), batch)
        z = self.beta * rho.gap
        return paired(-F.logsigmoid(z), z, rho)


@part(method=OnPairs)
class LdDpo(PairTerm):
    """LD-DPO (arXiv 2409.06411): tokens beyond the other side's length count less.

    DPO in which tokens up to the shorter side's length have weight 1 and the rest ``tail``, in π
    and π_ref. ``tail: 1`` is DPO. (TRL shortens π only, which leaves −(1−α) log π_ref of the tail
    in the margin; here the margin is 0 when both policies are equal.)
    """

    beta: Positive = 0.1
    tail: Share = 0.5

    formula: ClassVar[str] = "DPO, tokens beyond the shorter answer's length weighted by tail"
    paper: ClassVar[str] = "2409.06411"

    def __post_init__(self) -> None:
        require(0 <= self.tail < 1, f"tail={self.tail}", "0 <= tail < 1: 1 is dpo")

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(βΔ), with weight ``tail`` beyond the shorter answer's length."""
        rho = shared_sums(log_ratio_N(stats, batch), batch, tail=self.tail)
        z = self.beta * rho.gap
        return paired(-F.logsigmoid(z), z, rho)


@part(method=OnPairs)
class Wpo(PairTerm):
    """WPO (arXiv 2406.11827): DPO, each pair weighted by its likelihood under the policy.

    min(1, w_w w_l) · −log σ(βΔ), w = exp(mean_t [log π(y_t) − log Σ_v π(v)²]), no gradient
    through the weight. The upper bound 1 is that of the authors' code.
    """

    beta: Positive = 0.01

    formula: ClassVar[str] = "min(1, w_w w_l) DPO, w = exp(mean(log pi(y) - log sum_v pi(v)^2))"
    paper: ClassVar[str] = "2406.11827"
    reads: ClassVar[frozenset[Wanted]] = frozenset({Stat.LOGPROB, Stat.LOG_COLLISION})

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] min(1, w_w w_l) · −log σ(βΔ)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        z = self.beta * rho.gap
        with torch.no_grad():
            sure = means(stats[Stat.LOGPROB] - stats[Stat.LOG_COLLISION], batch)
            weight_P = (sure.chosen + sure.rejected).clamp(max=0).exp()
        values = paired(-weight_P * F.logsigmoid(z), z, rho)
        return Values(values.loss, {**values.shown, "pair_weight": weight_P})


@part(method=OnPairs)
class Discopop(PairTerm):
    """DiscoPOP (arXiv 2406.08414): a loss found by a language model, modulated by the gap.

    (1−m) · −log σ(z) + m · e^{−z}, z = βΔ, m = σ(z/τ): logistic on pairs with z < 0, exponential
    on those with z > 0. It is not convex: at these defaults a policy equal to its reference is on
    the wrong side of a local maximum (local minimum at z = −0.12, maximum at 0.07), so it moves
    the wrong way. At 0 the slope is −¾ + (1 − log 2)/(4τ): a stage that starts at its reference
    needs τ above 0.1023.

    With the paper's tau, a learner that starts at its reference learns the opposite of the pairs:
    raise tau above 0.11, or start from a policy that already prefers the chosen answers.
    """

    beta: Positive = 0.05
    tau: Positive = 0.05

    formula: ClassVar[str] = "(1-m) (-log s(z)) + m exp(-z), m = s(z/tau), z = beta gap"
    paper: ClassVar[str] = "2406.08414"

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] (1−m) · −log σ(z) + m e^{−z}, z = βΔ, m = σ(z/τ)."""
        rho = sums(log_ratio_N(stats, batch), batch)
        z = self.beta * rho.gap
        m = (z / self.tau).sigmoid()
        return paired(-(1 - m) * F.logsigmoid(z) + m * capped_exp(-z), z, rho)


@part(method=OnPairs)
class Aot(PairTerm):
    """Alignment by optimal transport on pairs (arXiv 2406.05882): margins compared rank by rank.

    −log σ(β(m − q)), m = log π(y_w) − log π(y_l), and q the reference's margin of the same rank in
    the draw, from ``match_quantiles`` of margins. Summed over a draw it is the cost of
    transporting one sorted sample of margins to the other: the distribution of margins, not each
    single one, should exceed the reference's. With a single pair it is DPO.

    Ranks are taken over a whole draw: larger ``groups_per_step`` help.
    """

    beta: Positive = 0.01

    formula: ClassVar[str] = "-log s(beta (m_(i) - m_ref_(i))), m_(i) the i-th smallest margin"
    paper: ClassVar[str] = "2406.05882"
    needs: ClassVar[Columns] = frozenset({Column.PREFERENCE, Column.QUANTILE})

    def signals(self, reference: PolicyRef) -> tuple[Signal, ...]:
        """Ranks of margins."""
        return (MatchQuantiles(of="margins"),)

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """[P] −log σ(β(m − q))."""
        logp = sums(stats[Stat.LOGPROB], batch)
        z = self.beta * (logp.gap - batch.columns[Column.QUANTILE][batch.pairs_P2[:, 0]])
        return paired(-F.logsigmoid(z), z, logp)
