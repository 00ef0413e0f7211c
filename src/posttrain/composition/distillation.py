"""Terms on a teacher's distribution.

The code behind a term is in ``objectives/distillation.py``.
"""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition.base import ANYONE, Aggregate
from posttrain.config import Config
from posttrain.provenance import Kind
from posttrain.trajectory import Column


class TeacherReverseKL(
    Config, frozen=True, kw_only=True, tag="teacher_reverse_kl", tag_field="type"
):
    """Σ_v π(v) log(π(v) / π_T(v)) at every written token (MiniLLM, GKD; arXiv 2306.13649).

    With a teacher's top-k the rest of the vocabulary is one more outcome, "any other token", so
    the sum stays a true KL (a lower bound of the full one) and is zero when both agree.
    """

    aggregate: Aggregate = "token_mean"
    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[Column]] = frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS})
    accepts: ClassVar[frozenset[Kind]] = ANYONE


DistillationTerm = TeacherReverseKL
