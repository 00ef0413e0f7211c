"""The code of the terms in ``composition/distillation.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from posttrain.composition.distillation import (
    EntropyAwareKL,
    Softened,
    TeacherForwardKL,
    TeacherJensenShannon,
    TeacherReverseKL,
    TeacherSkewKL,
    TeacherSkewReverseKL,
    TeacherSortedL1,
    TeacherTotalVariation,
)
from posttrain.core.config import Config
from posttrain.core.statistics import Divergence, DivergenceKind
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import PackedBatch
from posttrain.numerics.divergence import TINY
from posttrain.objectives.values import Stats, TermCode, Values

FORWARD, REVERSE = Divergence(DivergenceKind.FORWARD_KL), Divergence(DivergenceKind.REVERSE_KL)
BY_RANK = Divergence(DivergenceKind.SORTED_L1)


def divergence_of(term: Softened) -> Divergence:
    """Which divergence the head computes for a term."""
    shape, coefficient = DivergenceKind.TOTAL_VARIATION, 0.0
    match term:
        case TeacherForwardKL():
            shape = DivergenceKind.FORWARD_KL
        case TeacherReverseKL():
            shape = DivergenceKind.REVERSE_KL
        case TeacherJensenShannon():
            shape, coefficient = DivergenceKind.JENSEN_SHANNON, term.beta
        case TeacherSkewKL():
            shape, coefficient = DivergenceKind.SKEW_KL, term.alpha
        case TeacherSkewReverseKL():
            shape, coefficient = DivergenceKind.SKEW_REVERSE_KL, term.alpha
    return Divergence(shape, coefficient=coefficient, temperature=term.temperature)


def teacher_divergence(term: Softened, stats: Stats, batch: PackedBatch) -> Values:
    """[N] the divergence over the next token."""
    values_N = stats[divergence_of(term)]
    is_kl = isinstance(term, TeacherForwardKL | TeacherReverseKL)
    return Values(values_N, {"kl" if is_kl else "divergence": values_N.detach()})


def entropy_aware_kl(term: EntropyAwareKL, stats: Stats, batch: PackedBatch) -> Values:
    """[N] reverse KL, plus forward KL where the teacher is unsure."""
    teacher_NK = batch.columns[Column.TEACHER_LOGPROBS]
    rest_N = (1 - teacher_NK.exp().sum(-1)).clamp_min(TINY)
    entropy_N = -(teacher_NK.exp() * teacher_NK).sum(-1) - rest_N * rest_N.log()
    unsure_N = entropy_N > term.threshold
    loss_N = stats[REVERSE] + torch.where(unsure_N, stats[FORWARD], 0.0)
    return Values(loss_N, {"kl": stats[REVERSE].detach(), "unsure": unsure_N.float()})


def teacher_sorted_l1(term: TeacherSortedL1, stats: Stats, batch: PackedBatch) -> Values:
    """[N] L1 of sorted probabilities where the teacher stands after the same text."""
    aligned_N = batch.columns[Column.TEACHER_ALIGNED]
    return Values(aligned_N * stats[BY_RANK], {"aligned": aligned_N})


def _compared(term: Softened) -> frozenset[Divergence]:
    return frozenset({divergence_of(term)})


def _code(values: Callable[..., Values], *fixed: Divergence) -> TermCode:
    compares = (lambda _: frozenset(fixed)) if fixed else _compared
    return TermCode(frozenset(), values, compares)


TERMS: Mapping[type[Config], TermCode] = {
    TeacherForwardKL: _code(teacher_divergence),
    TeacherReverseKL: _code(teacher_divergence),
    TeacherJensenShannon: _code(teacher_divergence),
    TeacherSkewKL: _code(teacher_divergence),
    TeacherSkewReverseKL: _code(teacher_divergence),
    TeacherTotalVariation: _code(teacher_divergence),
    EntropyAwareKL: _code(entropy_aware_kl, FORWARD, REVERSE),
    TeacherSortedL1: _code(teacher_sorted_l1, BY_RANK),
}
