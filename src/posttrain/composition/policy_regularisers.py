"""Terms that hold a policy back: towards a reference, towards entropy, towards where it was.

The code behind a term is in ``objectives/policy_regularisers.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import Aggregate, Term
from posttrain.provenance import Kind
from posttrain.trajectory import Column


class ReferenceKL(Term, frozen=True, kw_only=True, tag="reference_kl", tag_field="type"):
    """KL(π ‖ π_ref) on the learner's own tokens, with u = log π − log π_ref, r = π / behaviour.

    * ``k3``: r·(e^{−u} + u − 1); value and gradient are those of the KL (arXiv 2512.02556);
    * ``k2``: sg(r)·u²/2; the gradient is that of the KL, the value is not;
    * ``k3_without_ratio``: e^{−u} + u − 1 as GRPO wrote it (arXiv 2402.03300); the value is the
      KL, the gradient that of KL(π_ref ‖ π), another divergence.

    k1 = u is not offered: as a loss its expected gradient is zero (survey section 5, trap 11).
    In the reward it is right: that is the ``kl_penalty`` signal.
    """

    estimator: Literal["k3", "k2", "k3_without_ratio"] = "k3"
    aggregate: Aggregate = "token_mean"
    weight: float = 0.001
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset(
        {Column.BEHAVIOUR_LOGPROB, Column.REFERENCE_LOGPROB}
    )
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


class EntropyBonus(Term, frozen=True, kw_only=True, tag="entropy_bonus", tag_field="type"):
    """−H(π) of the next token, at the learner's own tokens (arXiv 1602.01783)."""

    aggregate: Aggregate = "token_mean"
    weight: float = 0.01
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset()
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


class LogRatioPenalty(Term, frozen=True, kw_only=True, tag="log_ratio_penalty", tag_field="type"):
    """|log r| at marked tokens, r = π / behaviour (KL-Cov, arXiv 2505.22617).

    Zero, with zero gradient, until the policy has moved: it acts from the second update on a
    draw. Unmarked tokens count as zeros in the mean.
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = (Kind.LEARNER,)
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.BEHAVIOUR_LOGPROB, Column.MARK})
    accepts: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARNER})


PolicyRegulariser = ReferenceKL | EntropyBonus | LogRatioPenalty
