"""A learned value: the scalar head it is read from, the credit it gives, the loss that trains it.

    REWARD, TOKEN_REWARD ─┐
                          ├─gae──▶ ADVANTAGE ──▶ policy gradient
    value head (live) ────┘  └───▶ OLD_VALUE, RETURN ──▶ value_loss ──▶ value head

The value V_t is what is still to come when token t has not been written yet. The code is in
``signals/gae.py`` and ``objectives/value_terms.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from posttrain.composition.base import ANYONE, Aggregate, PolicyRef, Term
from posttrain.composition.moving import MOVING
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column

Readout = Literal["value", "score"]
"""Where a scalar head is read: before a token (``value``) or after it (``score``)."""


class ScalarHead(Config):
    """A linear map from a decoder's final hidden state to one number.

    ``trunk: shared`` reads the hidden states of the model being trained: a reward model, or a
    critic that moves the policy as it learns. ``trunk: separate`` is a second decoder that the
    learner owns beside the policy, so that fitting a value leaves the policy alone.

    ``start`` names the model that a separate trunk is a copy of; its own critic is taken where it
    has one. The head starts as the named model's, or at zero where it has none. ``lr`` is the rate
    of a separate trunk and its head; null takes the stage's.
    """

    trunk: Literal["shared", "separate"] = "separate"
    start: PolicyRef = "input"
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.start in ("learner", MOVING):
            raise ConfigError(
                f"scalar_head with start={self.start}", expected="a model that stands still"
            )
        if self.lr is not None and (self.lr < 0 or self.trunk == "shared"):
            raise ConfigError(
                f"scalar_head with trunk={self.trunk}, lr={self.lr}",
                expected="0 or more, and only for a separate trunk: a shared one has one rate",
                fix="drop lr, or use trunk: separate",
            )


class Gae(Config, tag="gae", tag_field="type"):
    """Generalised advantage estimation (arXiv 1506.02438) with the learner's own value head.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = Σ_k (γλ)^k δ_{t+k} over the trained tokens of a
    trajectory. r_t is the token's ``TOKEN_REWARD``, if anybody gave one; the last token also earns
    ``REWARD``. After the last token nothing is to come, also where a budget cut the answer off.
    With λ = 1, A_t is the discounted return minus V_t; with λ = 0 it is δ_t.

    ``value_lam`` is the λ of ``RETURN`` = V_t + A_t(value_lam), what the critic is fitted to; null
    takes ``lam``. ``length_alpha`` α replaces ``lam`` by 1 − 1/(α l) for an answer of l tokens, at
    least 0, so that longer answers look further (VAPO, arXiv 2504.05118).

    ``whiten`` gives the advantages of the draw's trained tokens mean 0 and unbiased standard
    deviation 1. Values come from the weights before the update.
    """

    gamma: float = 1.0
    lam: float = 0.95
    value_lam: float | None = None
    length_alpha: float | None = None
    whiten: bool = True
    needs: ClassVar[frozenset[Column]] = frozenset({Column.REWARD})
    provides: ClassVar[frozenset[Column]] = frozenset(
        {Column.ADVANTAGE, Column.OLD_VALUE, Column.RETURN}
    )

    def __post_init__(self) -> None:
        shares = [self.gamma, self.lam, self.lam if self.value_lam is None else self.value_lam]
        if not all(0 <= s <= 1 for s in shares):
            raise ConfigError(
                f"gae with gamma={self.gamma}, lam={self.lam}, value_lam={self.value_lam}",
                expected="each between 0 and 1",
            )
        if self.length_alpha is not None and self.length_alpha <= 0:
            raise ConfigError(f"gae with length_alpha={self.length_alpha}", expected="above 0")

    def lam_of(self, length: int) -> float:
        """The λ of the advantages of an answer with so many trained tokens.

        Example:
            >>> Gae(lam=0.9).lam_of(40), Gae(length_alpha=0.05).lam_of(40)
            (0.9, 0.5)
            >>> Gae(length_alpha=0.05).lam_of(10)
            0.0
        """
        if self.length_alpha is None:
            return self.lam
        return max(0.0, 1 - 1 / (self.length_alpha * max(length, 1)))


class ValueLoss(Term, tag="value_loss", tag_field="type"):
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), V the value head before each token.

    R is ``RETURN`` and V_old ``OLD_VALUE``, both constants. The clipped branch keeps a critic from
    moving more than ε away from what it said before the update, as PPO's reference code does;
    ``clip: null`` is the plain squared error.
    """

    clip: float | None = 0.2
    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.RETURN, Column.OLD_VALUE})
    accepts: ClassVar[frozenset[Kind]] = ANYONE
    readout: ClassVar[Readout] = "value"

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"value_loss with clip={self.clip}", expected="above 0, or null")


ValueSignal = Gae
ValueTerm = ValueLoss
