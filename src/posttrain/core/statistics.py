"""Names of the statistics that the output head computes for terms. No PyTorch.

    term.reads ──▶ frozenset[Wanted] ──token_stats──▶ {Wanted: float32 [N]} ──▶ term.values

The numbers are computed in :mod:`posttrain.numerics.head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DivergenceKind(StrEnum):
    """The divergences by name: π is the policy, π_T the teacher."""

    FORWARD_KL = "forward_kl"  # KL(π_T ‖ π)
    REVERSE_KL = "reverse_kl"  # KL(π ‖ π_T)
    JENSEN_SHANNON = "jensen_shannon"  # generalised, with β
    SKEW_KL = "skew_kl"  # KL(π_T ‖ α π_T + (1−α) π)
    SKEW_REVERSE_KL = "skew_reverse_kl"  # KL(π ‖ (1−α) π_T + α π)
    TOTAL_VARIATION = "total_variation"  # ½ Σ |π_T − π|
    SORTED_L1 = "sorted_l1"  # Σ |π_T − π| after sorting both: ULD


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence between policy and teacher, computed at every token like a ``Stat``.

    ``coefficient`` is the β of Jensen-Shannon or the α of a skew KL, and unused otherwise.
    ``temperature`` τ softens both sides before they are compared: π^(1/τ), renormalised.
    """

    kind: DivergenceKind
    coefficient: float = 0.0
    temperature: float = 1.0


class Stat(StrEnum):
    """Statistics of a token's logits, or of a scalar head. All are float32 [N]."""

    LOGPROB = "logprob"  # log pi(y)
    SAMPLED_LOGPROB = "sampled_logprob"  # log pi(y) at the temperature the token was sampled at
    ENTROPY = "entropy"  # -sum_v pi log pi at the temperature the token was sampled at
    LOG_COLLISION = "log_collision"  # log sum_v pi^2: that two samples are the same token
    VALUE = "value"  # the scalar head before the token, where it is predicted
    SCORE = "score"  # the scalar head after the token, where it has been read


SCALARS = frozenset({Stat.VALUE, Stat.SCORE})
"""Statistics of the scalar head and not of the logits: the learner computes them separately."""


Wanted = Stat | Divergence
"""A statistic of the policy alone, or a divergence from the teacher's columns."""
