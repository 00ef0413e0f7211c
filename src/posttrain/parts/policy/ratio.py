"""Ratio and mismatch correction, shared by the losses on the learner's own rollouts.

    without a mismatch:  r = π / π_sampler
    with one:            r = π / π_trainer, and the loss times w = π_trainer / π_sampler

Shape legend: ``N`` trained tokens, ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.core.bounds import NonNegative, Positive
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.lazy import torch
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.trajectory import Column
from posttrain.parts.base import Columns, Stats, Term, Values
from posttrain.parts.tensors import capped_exp, sequence_means, sequence_sums

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch


class Mismatch(Config):
    """Corrects for numerical differences of sampler and trainer: a constant weight on the loss.

    w = π_trainer / π_sampler at the version that sampled, for a ``token``, the product over its
    ``sequence``, or the sequence's ``geometric`` mean (which does not grow with length). Outside
    the bounds: ``truncate`` min(w, high), TIS; ``mask`` 0, and w inside, MIS and IcePop (arXiv
    2510.18855); ``reject`` 0, and 1 inside. With a correction r is π / π_trainer, so that w and r
    do not count the same difference twice. A weight of 0 still counts in every mean.
    """

    level: Literal["token", "sequence", "geometric"] = "token"
    outside: Literal["truncate", "mask", "reject"] = "truncate"
    low: NonNegative | None = None
    high: Positive = 2.0

    def __post_init__(self) -> None:
        bounded = self.outside != "truncate"
        if (self.low is not None) != bounded or self.high <= 0:
            raise ConfigError(
                f"mismatch with outside={self.outside}, low={self.low}, high={self.high}",
                expected="high > 0; low with mask and reject, and not with truncate",
            )
        if self.low is not None and not 0 <= self.low < self.high:
            raise ConfigError(
                f"mismatch with low={self.low}, high={self.high}", expected="0 <= low < high"
            )


class RatioTerm(Term):
    """A loss per token in r = π / behaviour and in the advantage A.

    The ratio is against *recorded* log-probs, so only tokens of the live learner qualify.
    """

    where: tuple[Kind, ...] = (Kind.LEARNER,)
    mismatch: Mismatch | None = None

    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})
    reads: ClassVar[frozenset[Wanted]] = frozenset({Stat.SAMPLED_LOGPROB, Stat.ENTROPY})

    @property
    def needs(self) -> Columns:
        """The advantage, and the log-probs of the ratio and its correction."""
        trainer = {Column.TRAINER_LOGPROB} if self.mismatch else set()
        return frozenset({Column.BEHAVIOUR_LOGPROB, Column.ADVANTAGE} | trainer)


def check_level(mismatch: Mismatch | None) -> None:
    """Refuse weights per token on a loss per sequence."""
    if mismatch is not None and mismatch.level == "token":
        raise ConfigError(
            "a mismatch correction per token on a loss per sequence",
            expected="level sequence or geometric",
        )


def log_ratio(mismatch: Mismatch | None, stats: Stats, batch: PackedBatch) -> Tensor:
    """[N] log π minus the sampler's log-prob, or the trainer's where a mismatch is corrected."""
    old = Column.TRAINER_LOGPROB if mismatch else Column.BEHAVIOUR_LOGPROB
    return stats[Stat.SAMPLED_LOGPROB] - batch.columns[old]


def sequence_advantages(batch: PackedBatch) -> Tensor:
    """[S] the advantage of each sequence.

    Raises:
        LegalityError: tokens of one sequence have different advantages.
    """
    advantage_N = batch.columns[Column.ADVANTAGE]
    advantage_S = torch.zeros(
        batch.num_sequences, dtype=advantage_N.dtype, device=advantage_N.device
    )
    advantage_S[batch.sequence_N] = advantage_N
    if not torch.equal(advantage_S[batch.sequence_N], advantage_N):
        raise LegalityError(
            "tokens of one sequence with different advantages, in a loss per sequence",
            expected="one advantage per sequence",
            fix="credit outcome in group_advantage; no clip_covariance; or a loss per token",
        )
    return advantage_S


def mismatch_weight(mismatch: Mismatch, batch: PackedBatch) -> Tensor:
    """[N] the correction, a constant: both log-probs are columns."""
    log_w = batch.columns[Column.TRAINER_LOGPROB] - batch.columns[Column.BEHAVIOUR_LOGPROB]
    if mismatch.level == "sequence":
        log_w = sequence_sums(log_w, batch)[batch.sequence_N]
    elif mismatch.level == "geometric":
        log_w = sequence_means(log_w, batch)[batch.sequence_N]
    weight_N = log_w.exp()
    if mismatch.outside == "truncate":
        return weight_N.clamp(max=mismatch.high)
    inside_N = (weight_N >= (mismatch.low or 0.0)) & (weight_N <= mismatch.high)
    kept_N = weight_N if mismatch.outside == "mask" else torch.ones_like(weight_N)
    # where, not a product: a sequence's ratio may be infinite, and inf * 0 is NaN.
    return torch.where(inside_N, kept_N, torch.zeros_like(kept_N))


def weighed(
    mismatch: Mismatch | None, loss_N: Tensor, shown: Mapping[str, Tensor], batch: PackedBatch
) -> Values:
    """The loss times the correction, if any; the correction is a metric."""
    if mismatch is None:
        return Values(loss_N, shown)
    weight_N = mismatch_weight(mismatch, batch)
    return Values(weight_N * loss_N, {**shown, "correction": weight_N})


def ratio_shown(log_ratio_N: Tensor) -> dict[str, Tensor]:
    """Metrics of every loss in a ratio: the ratio, and ``policy_shift`` = −log r."""
    log_ratio_N = log_ratio_N.detach()
    return {"ratio": capped_exp(log_ratio_N), "policy_shift": -log_ratio_N}
