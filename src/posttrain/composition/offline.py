"""Terms and signals for logged answers with rewards: offline RL, and choosing among own answers.

The code behind them is in ``objectives/offline.py`` and ``signals/offline.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import ANYONE, Aggregate, Term
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column

# --- signals ---------------------------------------------------------------------------------


class KeepRewards(Config, tag="keep_rewards", tag_field="type"):
    """Keeps the answers worth imitating; the others are discarded, each with its reason.

    An answer stays when its reward is ``at_least`` so high, when it is among the ``best`` of its
    group (of equal ones the earlier), and, with ``distinct``, when no earlier answer that stays
    has the same tokens. The tests apply in the order threshold, duplicates, best.
    """

    at_least: float | None = None
    best: int | None = None
    distinct: bool = False
    needs: ClassVar[frozenset[Column]] = frozenset({Column.REWARD})
    provides: ClassVar[frozenset[Column]] = frozenset({Column.DISCARD})

    def __post_init__(self) -> None:
        if self.at_least is None and self.best is None and not self.distinct:
            raise ConfigError(
                "keep_rewards that keeps everything",
                expected="at_least, best or distinct",
            )
        if self.best is not None and self.best < 1:
            raise ConfigError(f"keep_rewards with best={self.best}", expected="at least 1")


class KeepPositiveAdvantages(Config, tag="keep_positive_advantages", tag_field="type"):
    """Discards answers whose advantage is not above zero, with that reason."""

    needs: ClassVar[frozenset[Column]] = frozenset({Column.ADVANTAGE})
    provides: ClassVar[frozenset[Column]] = frozenset({Column.DISCARD})


class OwnLogprobs(Config, tag="own_logprobs", tag_field="type"):
    """The learner's log-probs of other people's answers, at the moment they were drawn.

    With ``updates_per_draw`` above 1 the later updates of a draw move away from them. For answers
    that the learner wrote itself, ``trainer_logprobs`` is the signal.
    """

    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.TRAINER_LOGPROB})


# --- terms -----------------------------------------------------------------------------------


class AdvantageWeighted(Term, tag="advantage_weighted", tag_field="type"):
    """−min(e^{A/β}, w_max) log π(y_t): advantage-weighted regression (arXiv 1910.00177).

    The weight is a constant. β → ∞ is cross-entropy. Weights are not normalised over the batch.
    """

    beta: float = 1.0
    max_weight: float = 20.0
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.ADVANTAGE})
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.max_weight <= 0:
            raise ConfigError(
                f"beta={self.beta}, max_weight={self.max_weight}", expected="both above 0"
            )


class LeftoverLunch(Term, tag="leftover_lunch", tag_field="type"):
    """−sg(clip(ρ, 1−ε, 1+ε)) max(A, 0) log π(y_t): A-LoL (arXiv 2305.14718).

    ``ratio: sequence`` takes ρ = π(y) / π_ref(y) of the whole answer, which is one action;
    ``token`` takes ρ of each token; ``none`` takes 1, and may add β (log π − log π_ref), with
    ``kl_weight`` as β. An answer's tokens are summed, as in the authors' code.
    """

    ratio: Literal["sequence", "token", "none"] = "sequence"
    clip: float = 0.9
    kl_weight: float = 0.0
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "sequence_sum"
    unit: ClassVar[str] = "token"
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    @property
    def needs(self) -> frozenset[Column]:
        """Advantages, and the reference where the loss compares with it."""
        compares = self.ratio != "none" or self.kl_weight > 0
        reference = {Column.REFERENCE_LOGPROB} if compares else set[Column]()
        return frozenset({Column.ADVANTAGE, *reference})

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1 or self.kl_weight < 0:
            raise ConfigError(
                f"clip={self.clip}, kl_weight={self.kl_weight}",
                expected="0 < clip < 1 and kl_weight >= 0",
            )
        if self.kl_weight and self.ratio != "none":
            raise ConfigError(
                f"kl_weight={self.kl_weight} with ratio={self.ratio}",
                expected="ratio: none: the penalty replaces the ratio",
            )


class RewardGold(Term, tag="reward_gold", tag_field="type"):
    """−sg(max(π(y_t), ``floor``)) R log π(y_t): R-GOLD (GOLD, arXiv 2009.07839).

    The policy's own probability stands in for an importance weight; the floor keeps unlikely
    tokens learnable. An answer's tokens are summed, as in the code of arXiv 2305.14718.
    """

    floor: float = 0.1
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    aggregate: Aggregate = "sequence_sum"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.REWARD})
    accepts: ClassVar[frozenset[Kind]] = ANYONE

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor={self.floor}", expected="a probability, from 0 to 1")


OfflineTerm = AdvantageWeighted | LeftoverLunch | RewardGold
OfflineSignal = KeepRewards | KeepPositiveAdvantages | OwnLogprobs
