"""A teacher's log-probs as advantages of sampled tokens: distillation as a policy gradient.

    teacher_logprobs ──TEACHER_LOGPROB───┐
    the record ────────BEHAVIOUR_LOGPROB─┴─teacher_advantage──▶ ADVANTAGE ──▶ policy gradients
    teacher, its base, learner ────────────delta_advantage────▶ ADVANTAGE ──▶ policy gradients

Shape legend: ``T`` tokens of a trajectory, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from posttrain.core import clock
from posttrain.core.bounds import NonNegative, Positive
from posttrain.core.errors import ConfigError
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.parts.base import Columns, PolicyRef, Signal
from posttrain.parts.columns import attach, trajectories_of
from posttrain.parts.registry import part
from posttrain.parts.tools import Tools
from posttrain.protocols import over_shared_rows

Floats = npt.NDArray[np.float64]


@part
class TeacherAdvantage(Signal):
    """The log-ratio of teacher and policy as credit, u_t = log π_T(y_t) − log π(y_t).

    | ``credit`` | A_t | its expected policy gradient |
    |---|---|---|
    | ``token`` | u_t | Σ_t of the next-token reverse KL, prefixes held fixed (OPD) |
    | ``to_go`` | Σ_{s≥t} u_s | the reverse KL between whole sequences |
    | ``future_mean`` | mean of u_s over s > t | MiniLLM's long part, by length (2306.08543) |

    log π is of the sampling distribution, from the record. ``extrapolation`` λ ≠ 1 makes u
    λ (log π_T − log π_ref) − (log π − log π_ref), which extrapolates beyond the teacher
    (G-OPD, 2602.12125). ``early`` γ multiplies A_t by 1 + γ (1 − Σ_{s<t} |A_s| / Σ_s |A_s|)
    (IW-OPD, 2606.22600).
    """

    credit: Literal["token", "to_go", "future_mean"] = "token"
    extrapolation: Positive = 1.0
    early: NonNegative = 0.0

    formula: ClassVar[str] = "log pi_T(y_t) - log pi(y_t), or what follows of it"
    paper: ClassVar[str] = (
        "2306.08543 (future_mean), 2602.12125 (extrapolation), 2606.22600 (early)"
    )
    untempered: ClassVar[bool] = True
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    @property
    def needs(self) -> Columns:
        """Log-probs of teacher and policy, and of a reference for extrapolation."""
        extra = {Column.REFERENCE_LOGPROB} if self.extrapolation != 1 else set()
        return frozenset({Column.TEACHER_LOGPROB, Column.BEHAVIOUR_LOGPROB} | extra)

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the column on every member, NaN where nothing is trained."""
        columns = [{Column.ADVANTAGE: self._advantages(m)} for g in groups for m in g.members]
        return attach(groups, columns)

    def _advantages(self, member: Scored) -> npt.NDArray[np.float32]:
        trained = member.trajectory.trainable
        teacher, own = (
            member.columns[c][trained].astype(np.float64)
            for c in (Column.TEACHER_LOGPROB, Column.BEHAVIOUR_LOGPROB)
        )
        gain = teacher - own
        if self.extrapolation != 1:
            reference = member.columns[Column.REFERENCE_LOGPROB][trained]
            gain = self.extrapolation * (teacher - reference) - (own - reference)
        values = credited(gain, credit=self.credit)
        if self.early:
            values = values * early_weights(values, strength=self.early)
        out = np.full(len(trained), np.nan, np.float32)
        out[trained] = values
        return out


@part
class DeltaAdvantage(Signal):
    """Log-ratio of a teacher and its base, where plain distillation agrees (OPD², 2607.15161).

    Δ = log π_T(y) − log π_base(y) and U = log π_T(y) − log π(y), each minus its expectation under
    π; A = ``scale`` · Δ where Δ and U have the same sign, else 0. ``base`` is the policy that the
    teacher was trained from. Expectations are exact, over the full vocabulary (the paper: over the
    policy's 1024 most likely tokens).
    """

    teacher: PolicyRef
    base: PolicyRef
    scale: Positive = 0.1

    formula: ClassVar[str] = (
        "scale (log pi_T - log pi_base - E_pi), where of one sign with log pi_T - log pi - E_pi"
    )
    paper: ClassVar[str] = "2607.15161"
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if self.teacher == self.base or self.scale <= 0:
            raise ConfigError(
                f"delta_advantage with teacher={self.teacher}, base={self.base}, "
                f"scale={self.scale}",
                expected="two different policies, and scale above 0",
            )

    def references(self) -> tuple[PolicyRef, ...]:
        """The teacher and its base."""
        return (self.teacher, self.base)

    def prepare(self, tools: Tools) -> None:
        """Load both: their tokens must be the learner's."""
        for reference in self.references():
            tools.policy(reference)

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups with the column on every member, NaN where nothing is trained."""
        trajectories = trajectories_of(groups)
        asked = over_shared_rows([tools.live, *(tools.policy(r) for r in self.references())])
        with clock.timed("teacher"):
            logps = [p.distributions(trajectories, top_k=None) for p in asked]
        columns = []
        for index, trajectory in enumerate(trajectories):
            trained = trajectory.trainable
            own_TV, teacher_TV, base_TV = (
                logp[index][1][trained].astype(np.float64) for logp in logps
            )
            written = trajectory.tokens[trained]
            out = np.full(len(trained), np.nan, np.float32)
            out[trained] = self.scale * delta_advantages(own_TV, teacher_TV, base_TV, written)
            columns.append({Column.ADVANTAGE: out})
        return attach(groups, columns)


def credited(gain_T: Floats, *, credit: str) -> Floats:
    """[T] advantages of the tokens of a sequence from their gains.

    Example:
        >>> gains = np.array([1.0, 2.0, 4.0])
        >>> [credited(gains, credit=c).tolist() for c in ("token", "to_go", "future_mean")]
        [[1.0, 2.0, 4.0], [7.0, 6.0, 4.0], [3.0, 4.0, 0.0]]
    """
    if credit == "token":
        return gain_T
    to_go = gain_T[::-1].cumsum()[::-1]
    if credit == "to_go":
        return to_go
    num_after = np.arange(len(gain_T))[::-1]
    return (to_go - gain_T) / np.maximum(num_after, 1)


def early_weights(advantage_T: Floats, *, strength: float) -> Floats:
    """[T] 1 + γ (1 − Σ_{s<t} |A_s| / Σ_s |A_s|): 1 + γ at the first token, falling to 1.

    Example:
        >>> early_weights(np.array([1.0, -1.0, 2.0]), strength=0.5).tolist()
        [1.5, 1.375, 1.25]
    """
    sizes = np.abs(advantage_T)
    total = float(sizes.sum())
    if total == 0:
        return np.ones_like(advantage_T)
    return 1 + strength * (1 - (sizes.cumsum() - sizes) / total)


def delta_advantages(
    own_TV: Floats, teacher_TV: Floats, base_TV: Floats, written_T: npt.NDArray[np.int32]
) -> Floats:
    """[T] centred log π_T − log π_base of the written tokens, 0 where OPD disagrees in sign.

    Centred: less the expectation over the policy's next token.

    Example:
        >>> even, left = np.log([[0.5, 0.5]]), np.log([[0.8, 0.2]])
        >>> a = delta_advantages(even, left, even, np.array([0], np.int32))
        >>> bool(np.isclose(a[0], np.log(0.8 / 0.2) / 2))
        True
    """
    rows = np.arange(len(written_T))

    def centred(gain_TV: Floats) -> Floats:
        mean_T = (np.exp(own_TV) * gain_TV).sum(-1)
        return np.asarray(gain_TV[rows, written_T] - mean_T)

    delta_T, plain_T = centred(teacher_TV - base_TV), centred(teacher_TV - own_TV)
    return np.where(delta_T * plain_T > 0, delta_T, 0.0)
