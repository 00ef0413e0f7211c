"""Which compositions make sense, checked when a stage is planned and again per record.

plan time     columns   every term's needs ⊆ what the source and earlier signals provide
              authors   every term can read at least one kind of author the source writes
              ratios    no importance ratio against a truncated distribution
per record    staleness every live span is at most ``max_age`` versions old
              authors   every trained token is read by some term
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.composition import Composition, Dataset, ReferenceKL, Rollouts, TermSpec
from posttrain.errors import LegalityError
from posttrain.provenance import Kind
from posttrain.trajectory import Column, Group

HOW_TO_GET = {
    Column.BEHAVIOUR_LOGPROB: "use a rollouts source: a data set has no behaviour log-probs",
    Column.REFERENCE_LOGPROB: "add the reference_logprobs signal",
    Column.TEACHER_IDS: "add the teacher_distribution signal",
    Column.TEACHER_LOGPROBS: "add the teacher_distribution signal",
    Column.ADVANTAGE: "add verify and group_advantage signals",
    Column.REWARD: "add the verify signal before it",
    Column.PREFERENCE: "use a data set of prompt/chosen/rejected rows with preference: true",
}

WHY = {
    Column.BEHAVIOUR_LOGPROB: "the ratio needs the probability under which a token was drawn",
    Column.REFERENCE_LOGPROB: "the loss is relative to a frozen reference",
    Column.TEACHER_IDS: "the teacher's distribution is the target",
    Column.TEACHER_LOGPROBS: "the teacher's distribution is the target",
    Column.ADVANTAGE: "the gradient is weighted by it",
    Column.REWARD: "credit is assigned from rewards",
    Column.PREFERENCE: "the loss compares a chosen with a rejected answer",
}


def check_composition(composition: Composition, *, stage: str) -> None:
    """Refuse a composition that cannot work, before anything is loaded.

    Raises:
        LegalityError: says which part needs what, why, and how to get it.
    """
    if not composition.terms:
        raise LegalityError(f"stage {stage} has no objective term", expected="at least one")
    have = composition.source.provides
    for signal in composition.signals:
        _check_columns(str(signal.__struct_config__.tag), signal.needs, have, stage=stage)
        have |= signal.provides
    for term in composition.terms:
        name = str(term.__struct_config__.tag)
        _check_columns(name, term.needs, have, stage=stage)
        _check_authors(term, name, composition, stage=stage)
    _check_ratios(composition, stage=stage)
    _check_temperature(composition, stage=stage)
    covered = frozenset().union(*(readable(t) for t in composition.terms))
    if ignored := composition.source.writes - covered:
        raise LegalityError(
            f"stage {stage}: no term reads tokens written by {_names(ignored)}",
            expected="every author of trained tokens to be read by some term",
            fix="widen a term's where, or draw from another source",
        )


def readable(term: TermSpec) -> frozenset[Kind]:
    """Kinds of author whose tokens the term reads: what it accepts, limited by ``where``."""
    return term.accepts & frozenset(term.where) if term.where else term.accepts


def _check_columns(
    name: str, needs: frozenset[Column], have: frozenset[Column], *, stage: str
) -> None:
    for column in sorted(needs - have):
        raise LegalityError(
            f"stage {stage}: {name} needs {column}, and nothing in the stage provides it",
            expected=f"{column}, because {WHY.get(column, 'the term reads it')}; "
            f"provided are {_names(have) or 'no columns'}",
            fix=HOW_TO_GET[column],
        )


def _check_authors(term: TermSpec, name: str, composition: Composition, *, stage: str) -> None:
    if barred := frozenset(term.where) - term.accepts:
        raise LegalityError(
            f"stage {stage}: {name} with where={_names(frozenset(term.where))}",
            expected=f"only {_names(term.accepts)}: on tokens of {_names(barred)} it is not the "
            "gradient that it claims to be",
            fix="drop them from where",
        )
    writes = composition.source.writes
    if not readable(term) & writes:
        raise LegalityError(
            f"stage {stage}: {name} reads tokens of {_names(readable(term))}, "
            f"the source writes {_names(writes)}",
            expected="at least one kind in common",
            fix="use rollouts of the learner, or a term that accepts these authors",
        )


def _check_ratios(composition: Composition, *, stage: str) -> None:
    source = composition.source
    ratio = any(Column.BEHAVIOUR_LOGPROB in t.needs for t in composition.terms)
    if ratio and not isinstance(source, Dataset) and source.sampling.is_truncated:
        raise LegalityError(
            f"stage {stage}: an importance ratio on truncated sampling ({source.sampling})",
            expected="top_k 0, top_p 1, min_p 0 and temperature above 0: the ratio compares the "
            "policy with the distribution really sampled, and a truncated one gives zero to "
            "tokens that the policy does not",
            fix="sample untruncated (a temperature is fine), or use a term without a ratio",
        )


def _check_temperature(composition: Composition, *, stage: str) -> None:
    source = composition.source
    kl = any(isinstance(t, ReferenceKL) for t in composition.terms)
    if kl and isinstance(source, Rollouts) and source.sampling.temperature != 1:
        raise LegalityError(
            f"stage {stage}: reference_kl on samples at temperature {source.sampling.temperature}",
            expected="temperature 1: the estimate is over samples of the policy itself, and at "
            "another temperature its gradient is not that of the KL",
            fix="sample at temperature 1, or drop kl_weight",
        )


@dataclass(frozen=True, slots=True)
class Admission:
    """What one draw leaves after the per-record check."""

    kept: tuple[Group, ...]
    stale: tuple[Group, ...]  # a live span was older than allowed


def admit(
    groups: Sequence[Group], terms: Sequence[TermSpec], *, version: int | None, max_age: int
) -> Admission:
    """Check every record against the terms, at the moment it is consumed.

    Args:
        groups: scored groups.
        terms: the objective.
        version: the learner's version now; None for a learner without versions.
        max_age: how many versions old a live span may be.

    Raises:
        LegalityError: a trained token was written by somebody whom no term may read.
    """
    allowed = frozenset().union(*(readable(t) for t in terms))
    kept: list[Group] = []
    stale: list[Group] = []
    for group in groups:
        for member in group.members:
            trajectory = member.trajectory
            writers = {s.producer.kind for s in trajectory.spans if s.is_authored}
            if barred := frozenset(writers) - allowed:
                raise LegalityError(
                    f"trajectory {trajectory.id} of {trajectory.task} has tokens by "
                    f"{_names(barred)}",
                    expected=f"only {_names(allowed)}, which the objective may read",
                    fix="check the author that the source declares",
                )
        ages = [m.trajectory.age(version) for m in group.members] if version is not None else [0]
        (stale if max(ages) > max_age else kept).append(group)
    return Admission(tuple(kept), tuple(stale))


def _names(values: frozenset[Kind] | frozenset[Column]) -> str:
    return ", ".join(sorted(values))
