"""Methods with SFT and RL in one step: two sources, a term for each.

Mix ─┬─ demonstrations ──────────────────────────▶ cross-entropy            (weight μ)
     └─ live rollouts ─ verify, group_advantage ─▶ clipped policy gradient  (weight 1 − μ)
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.core.bounds import Inner, NonNegative, Size, Tokens
from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.parts.base import Term, WeightSchedule
from posttrain.parts.composition import Composition, Method
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.policy.losses import clipped
from posttrain.parts.policy.shapes import rollouts
from posttrain.parts.registry import part
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.mix import Mix
from posttrain.parts.supervised.likelihood import BalancedCrossEntropy, CrossEntropy


class OnDemonstrationsAndRollouts(Method):
    """Demonstrations and live rollouts; ``expert`` is the share of demonstration groups."""

    data: Dataset
    tasks: tuple[str, ...]
    expert: Inner = 0.2
    group_size: Size = 8
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2

    provenance: ClassVar[str] = "mixed"
    interface: ClassVar[str] = "verifier reward and token targets"
    tendency: ClassVar[str] = "reshaping, with expansion by the demonstrations"
    paper: ClassVar[str] = "2508.11408"


def _side_by_side(method: OnDemonstrationsAndRollouts, *terms: Term) -> Composition:
    """Demonstrations and live rollouts, with a group advantage on the latter; both losses."""
    shares = (method.expert, 1 - method.expert)
    return Composition(
        source=Mix(parts=(method.data, rollouts(method)), shares=shares),
        signals=(Verify(), GroupAdvantage()),
        terms=terms,
    )


@part
class Chord(OnDemonstrationsAndRollouts):
    """SFT as an auxiliary loss of GRPO, with a decreasing weight μ.

    ``expert`` is the share of groups that are demonstrations; their weight is μ for any number,
    since each term is averaged over its own tokens. μ falls from ``mu`` to ``mu_end`` on a cosine.
    The paper's variant with token weights p (1 − p) is ``chord_phi``.
    """

    mu: Inner = 0.9
    mu_end: Inner = 0.05

    formula: ClassVar[str] = "(1-mu) GRPO on own rollouts + mu (-log pi) on demonstrations"

    def __post_init__(self) -> None:
        weights = (self.mu, self.mu_end, self.expert)
        if not all(0 < w < 1 for w in weights) or self.mu == self.mu_end or self.group_size < 2:
            raise ConfigError(
                f"chord with mu={self.mu}, mu_end={self.mu_end}, expert={self.expert}, "
                f"group_size={self.group_size}",
                expected="mu, mu_end and expert between 0 and 1, mu and mu_end different, groups "
                "of 2 or more",
            )

    def compose(self) -> Composition:
        """Demonstrations and live rollouts; group advantage on the latter; both losses."""
        falling = WeightSchedule(end=self.mu_end, shape="cosine")
        rising = WeightSchedule(end=1 - self.mu_end, shape="cosine")
        imitate = CrossEntropy(weight=self.mu, weight_schedule=falling, where=(self.data.author,))
        explore = clipped(self, weight=1 - self.mu, weight_schedule=rising)
        return _side_by_side(self, imitate, explore)


@part
class ChordPhi(OnDemonstrationsAndRollouts):
    """CHORD with a constant weight of the demonstrations, and their tokens weighted p (1 − p).

    Tokens that are very likely or very unlikely under the policy have little weight, so the
    demonstrations need not be faded out.
    """

    mu: Inner = 0.1

    formula: ClassVar[str] = "(1-mu) GRPO on own rollouts + mu (-sg(p (1-p)) log p), p = pi(y_t)"

    def __post_init__(self) -> None:
        if not 0 < self.mu < 1 or not 0 < self.expert < 1 or self.group_size < 2:
            raise ConfigError(
                f"chord_phi with mu={self.mu}, expert={self.expert}, group_size={self.group_size}",
                expected="mu and expert between 0 and 1, and groups of 2 or more",
            )

    def compose(self) -> Composition:
        """Demonstrations and live rollouts; group advantage on the latter; both losses."""
        imitate = BalancedCrossEntropy(weight=self.mu, where=(self.data.author,))
        return _side_by_side(self, imitate, clipped(self, weight=1 - self.mu))
