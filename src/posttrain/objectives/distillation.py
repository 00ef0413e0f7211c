"""The code of the terms in ``composition/distillation.py``."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.batch import PackedBatch
from posttrain.composition.distillation import TeacherReverseKL
from posttrain.config import Config
from posttrain.head import Stat
from posttrain.objectives.values import Stats, TermCode, Values


def teacher_reverse_kl(term: TeacherReverseKL, stats: Stats, batch: PackedBatch) -> Values:
    """[N] KL(π ‖ π_T) over the next token."""
    kl_N = stats[Stat.TEACHER_REVERSE_KL]
    return Values(kl_N, {"kl": kl_N.detach()})


TERMS: Mapping[type[Config], TermCode] = {
    TeacherReverseKL: TermCode(frozenset({Stat.TEACHER_REVERSE_KL}), teacher_reverse_kl),
}
