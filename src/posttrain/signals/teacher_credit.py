"""From a teacher's log-probs to advantages: distillation as a policy gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from posttrain.composition import DeltaAdvantage, TeacherAdvantage
from posttrain.core import clock
from posttrain.core.protocols import Policy
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.signals.scoring import attach

Floats = npt.NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True)
class TeacherAdvantageSignal:
    """Adds ``ADVANTAGE`` [T]: the log-ratio of teacher and policy at the tokens written."""

    spec: TeacherAdvantage

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
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
        if self.spec.extrapolation != 1:
            reference = member.columns[Column.REFERENCE_LOGPROB][trained]
            gain = self.spec.extrapolation * (teacher - reference) - (own - reference)
        values = credited(gain, credit=self.spec.credit)
        if self.spec.early:
            values = values * early_weights(values, strength=self.spec.early)
        out = np.full(len(trained), np.nan, np.float32)
        out[trained] = values
        return out


def credited(gain_T: Floats, *, credit: str) -> Floats:
    """[T] what a token is credited with, of the gains of its sequence.

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


@final
@dataclass(frozen=True, slots=True, eq=False)
class DeltaAdvantageSignal:
    """Adds ``ADVANTAGE`` [T]: the teacher's change since its base, where it agrees with OPD."""

    spec: DeltaAdvantage
    live: Policy
    teacher: Policy
    base: Policy

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The same groups with the column on every member, NaN where nothing is trained."""
        trajectories = [m.trajectory for g in groups for m in g.members]
        asked = (self.live, self.teacher, self.base)
        with clock.measure("teacher"):
            logps = [p.distributions(trajectories, top_k=None) for p in asked]
        columns = []
        for index, trajectory in enumerate(trajectories):
            trained = trajectory.trainable
            own, teacher, base = (
                logp[index][1][trained].astype(np.float64) for logp in logps
            )  # [T, V]
            written = trajectory.tokens[trained]
            out = np.full(len(trained), np.nan, np.float32)
            out[trained] = self.spec.scale * delta_advantages(own, teacher, base, written)
            columns.append({Column.ADVANTAGE: out})
        return attach(groups, columns)


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
