"""Checks of compositions, when a stage is planned and again per record.

plan time     columns   every term's needs ⊆ what the source and earlier signals provide, for every
                        author that the term reads
              authors   every term can read at least one kind of author the source writes
              ratios    no importance ratio against a truncated distribution
per record    staleness every live span is at most ``max_age`` versions old
              authors   every trained token is read by some term
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.core.errors import LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.statistics import SCALARS, Stat
from posttrain.core.trajectory import Column, Discard, Group
from posttrain.parts.base import Columns, PolicyRef, Signal, Source, StageContext, Term
from posttrain.parts.composition import Composition
from posttrain.parts.registry import tag_of

HOW_TO_GET = {
    Column.BEHAVIOUR_LOGPROB: "use a rollouts source: a data set has no behaviour log-probs",
    Column.REFERENCE_LOGPROB: "add the reference_logprobs signal",
    Column.TEACHER_IDS: "add the teacher_distribution signal",
    Column.TEACHER_LOGPROBS: "add the teacher_distribution signal",
    Column.TEACHER_LOGPROB: "add the teacher_logprobs signal before it",
    Column.TEACHER_SORTED: "add the foreign_teacher signal",
    Column.TEACHER_ALIGNED: "add the foreign_teacher signal",
    Column.ADVANTAGE: "add verify and group_advantage signals",
    Column.REWARD: "add the verify signal before it",
    Column.PREFERENCE: "use a data set of prompt/chosen/rejected rows with preference: true, or "
    "rollouts with verify and rank_pairs signals",
    Column.TRAINER_LOGPROB: "add the trainer_logprobs signal, or own_logprobs on a data set",
    Column.TOKEN_REWARD: "add the kl_penalty or soft_length_penalty signal before it",
    Column.MARK: "add the mark_covariance or the mark_entropy signal",
    Column.BASELINE: "add the greedy_baseline signal before it",
    Column.DISCARD: "add the keep_informative, drop_cut_off or keep_rewards signal",
    Column.WEIGHT: "name the data set's column of weights: `weight: <column>`",
    Column.LABEL: "use a data set of prompt/completion/label rows, or pairs, with unpaired: true",
    Column.MISMATCHED_KL: "add the mismatched_kl signal",
    Column.LOG_RATIO_CENTRE: "add the log_ratio_centre signal",
    Column.MARGIN: "name the data set's column of margins: `margin: <column>`",
    Column.STEP_LABEL: "use a data set of prompt/completions/labels rows, or rollouts with the "
    "step_labels signal",
    Column.STEP_REWARD: "add the process_reward signal",
    Column.OLD_VALUE: "add the gae signal",
    Column.RETURN: "add the gae signal",
    Column.QUANTILE: "add the match_quantiles signal",
}

WHY = {
    Column.BEHAVIOUR_LOGPROB: "the ratio needs the probability under which a token was drawn",
    Column.REFERENCE_LOGPROB: "the loss is relative to a frozen reference",
    Column.TEACHER_IDS: "the teacher's distribution is the target",
    Column.TEACHER_LOGPROBS: "the teacher's distribution is the target",
    Column.TEACHER_LOGPROB: "the teacher's probability of the written token is the reward",
    Column.TEACHER_SORTED: "the teacher's sorted probabilities are the target",
    Column.TEACHER_ALIGNED: "two tokenizers agree only here and there on what came before",
    Column.ADVANTAGE: "the gradient is weighted by it",
    Column.REWARD: "credit is assigned from rewards",
    Column.PREFERENCE: "the loss compares a chosen with a rejected answer",
    Column.TRAINER_LOGPROB: "the sampler's probabilities are corrected to the trainer's",
    Column.TOKEN_REWARD: "rewards of single tokens are part of the return",
    Column.MARK: "only marked tokens are read, or held back",
    Column.BASELINE: "the reward is compared with that of the likeliest answer",
    Column.DISCARD: "it says what is trained on",
    Column.WEIGHT: "every row counts with its weight",
    Column.LABEL: "the loss raises good answers and lowers bad ones",
    Column.MISMATCHED_KL: "gains and losses are counted from what the policy gives to any answer",
    Column.LOG_RATIO_CENTRE: "the classifier's threshold lies between good and bad answers",
    Column.MARGIN: "every pair asks for its own distance",
    Column.STEP_LABEL: "steps are judged one by one",
    Column.STEP_REWARD: "credit is assigned from the rewards of steps",
    Column.OLD_VALUE: "the critic is kept near what it said before the update",
    Column.RETURN: "the critic is fitted to it",
    Column.QUANTILE: "every value is compared with the one of its rank on the other side",
}


def check_composition(composition: Composition, *, stage: str) -> None:
    """Refuse a composition that cannot work, before anything is loaded.

    Raises:
        LegalityError: names the part, what it needs, why, and how to get it.
    """
    if not composition.terms:
        raise LegalityError(f"stage {stage} has no objective term", expected="at least one")
    source = composition.source
    have_by_kind = _check_signals(composition, stage=stage)
    for term in composition.terms:
        # A term that can read no author here is refused below, with a better message.
        read = term.readable & source.writes or source.writes
        have = frozenset.intersection(*(have_by_kind[k] for k in read))
        _check_columns(tag_of(term), term.needs, have, stage=stage)
        _check_authors(term, source, stage=stage)
        _check_options(term, have, stage=stage)
    _check_ratios(composition, stage=stage)
    _check_groups(composition, stage=stage)
    _check_parts(composition, stage=stage)
    _check_scalar_head(composition, stage=stage)
    covered = frozenset().union(*(t.readable for t in composition.terms))
    if ignored := source.writes - covered:
        raise LegalityError(
            f"stage {stage}: no term reads tokens written by {_names(ignored)}",
            expected="every author of trained tokens to be read by some term",
            fix="widen a term's where, or draw from another source",
        )


def _check_signals(composition: Composition, *, stage: str) -> Mapping[Kind, Columns]:
    """Columns of each author's groups after all signals."""
    source = composition.source
    if source.judged_by:
        (leaf,) = source.leaves
        inner = Composition(source=leaf, terms=composition.terms, signals=source.judged_by)
        _check_signals(inner, stage=stage)
        _check_groups(inner, stage=stage)
    have = {kind: source.provides_for(kind) for kind in source.writes}
    for signal, kinds in zip(composition.signals, scopes(composition), strict=True):
        if not kinds:
            raise LegalityError(
                f"stage {stage}: nothing in the mix reads what {tag_of(signal)} writes",
                expected=f"a term that reads {_names(signal.provides)}",
                fix="drop the signal: on a mix it would judge nobody",
            )
        for kind in sorted(kinds):
            _check_columns(tag_of(signal), signal.needs, have[kind], stage=stage)
            have[kind] |= signal.provides
    return have


def scopes(composition: Composition) -> tuple[frozenset[Kind], ...]:
    """Per signal, the authors whose groups it scores.

    With one source these are all. In a mix they are the authors for whom a term, or a later
    signal, needs one of its columns: a verifier cannot score rows of a data set, and a teacher
    need not score tokens that no term compares with it.
    """
    source, writes = composition.source, composition.source.writes
    if not source.mixed:
        return (writes,) * len(composition.signals)
    readers = column_readers(composition.terms)
    wanted = {k: {c for c, kinds in readers.items() if k in kinds} for k in writes}
    found: list[frozenset[Kind]] = []
    for signal in reversed(composition.signals):
        kinds = frozenset(k for k in writes if wanted[k] & signal.provides)
        for kind in kinds:
            wanted[kind] |= signal.needs
        found.append(kinds)
    have = {kind: source.provides_for(kind) for kind in writes}
    for i, (signal, kinds) in enumerate(zip(composition.signals, reversed(found), strict=True)):
        if Column.DISCARD in signal.provides:  # the stage reads it: score all that can be scored
            kinds = frozenset(k for k in writes if signal.needs <= have[k])
            found[len(found) - 1 - i] = kinds
        for kind in kinds:
            have[kind] |= signal.provides
    return tuple(reversed(found))


def column_readers(terms: Sequence[Term]) -> Mapping[Column, frozenset[Kind]]:
    """Per column, the authors at whose tokens a term reads it. Elsewhere it may be missing."""
    readers: dict[Column, frozenset[Kind]] = {}
    for term in terms:
        for column in term.needs | term.limit.needs:
            readers[column] = readers.get(column, frozenset()) | term.readable
    return readers


def readouts(terms: Sequence[Term]) -> frozenset[Stat]:
    """The statistics of a scalar head that the terms read: before tokens, after them, or none.

    Example:
        >>> from posttrain.parts.policy.value import ValueLoss
        >>> readouts([]), readouts([ValueLoss()])
        (frozenset(), frozenset({<Stat.VALUE: 'value'>}))
    """
    return frozenset(s for s in SCALARS if any(s in t.reads for t in terms))


def compared_in_the_loss(composition: Composition) -> tuple[PolicyRef, ...]:
    """Frozen teachers whose distributions are read as divergences of whole vocabularies only.

    For these the loss needs only hidden states and the head. If any other part reads log-probs of
    a teacher, such as a term of another package, they are computed.
    """
    column = Column.TEACHER_LOGPROBS
    given = [s for s in composition.signals if column in s.provides]
    others = [t for t in composition.terms if column in t.needs and not t.by_divergence]
    if len(given) != 1 or others or any(column in s.needs for s in composition.signals):
        return ()
    return given[0].distributions_of


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


def _check_options(term: Term, have: Columns, *, stage: str) -> None:
    """The options that every term has must have an effect, and a valid one."""
    limit, schedule, name = term.limit, term.weight_schedule, tag_of(term)
    _check_columns(f"the limit of {name}", limit.needs, have, stage=stage)
    by_token = limit.entropy_share is not None or limit.marked
    if (by_token and term.unit != "token") or (
        (limit.rewards, limit.preference) != ("any", "any")
        and term.unit not in ("token", "sequence")
    ):
        raise LegalityError(
            f"stage {stage}: {name} compares whole {term.unit}s, and has {limit}",
            expected="entropy_share and marked on terms over tokens; rewards and preference on "
            "terms over tokens or sequences",
            fix="drop the limit",
        )
    if schedule is not None and schedule.end == term.weight:
        raise LegalityError(
            f"stage {stage}: {name} with weight {term.weight} and a weight_schedule to "
            f"{schedule.end}",
            expected="two different weights: this schedule would do nothing",
            fix="drop weight_schedule",
        )


def _check_authors(term: Term, source: Source, *, stage: str) -> None:
    if barred := frozenset(term.where) - term.accepts:
        raise LegalityError(
            f"stage {stage}: {tag_of(term)} with where={_names(frozenset(term.where))}",
            expected=f"only {_names(term.accepts)}: on tokens of {_names(barred)} it is not the "
            "gradient that it claims to be",
            fix="drop them from where",
        )
    if not term.readable & source.writes:
        raise LegalityError(
            f"stage {stage}: {tag_of(term)} reads tokens of {_names(term.readable)}, "
            f"the source writes {_names(source.writes)}",
            expected="at least one kind in common",
            fix="use rollouts of the learner, or a term that accepts these authors",
        )


def _check_ratios(composition: Composition, *, stage: str) -> None:
    readers = column_readers(composition.terms).get(Column.BEHAVIOUR_LOGPROB, frozenset())
    for leaf in composition.source.leaves:
        if not readers & leaf.writes or leaf.sampled is None or not leaf.sampled.is_truncated:
            continue
        raise LegalityError(
            f"stage {stage}: an importance ratio on truncated sampling ({leaf.sampled})",
            expected="top_k 0, top_p 1, min_p 0 and temperature above 0: the ratio compares the "
            "policy with the distribution really sampled, and a truncated one gives zero to "
            "tokens that the policy does not",
            fix="sample untruncated (a temperature is fine), or use a term without a ratio",
        )


def _check_groups(composition: Composition, *, stage: str) -> None:
    """Groups large enough for their baselines, log-probs of one and the same distribution, and
    one meaning per mark."""
    markers = [s for s in composition.signals if Column.MARK in s.provides]
    if len(markers) > 1:
        raise LegalityError(
            f"stage {stage}: {' and '.join(map(tag_of, markers))}",
            expected="one signal that marks tokens: the second would undo the first",
            fix="drop one; a limit with entropy_share needs no marks",
        )
    for signal, kinds in zip(composition.signals, scopes(composition), strict=True):
        drawn = [s for s in composition.source.leaves if s.writes & kinds and s.sampled]
        for leaf in drawn:
            if leaf.group_size < signal.min_group:
                raise LegalityError(
                    f"stage {stage}: {tag_of(signal)} on groups of {leaf.group_size}",
                    expected=f"at least {signal.min_group}: members are compared with each "
                    "other, and the advantage of a single one would be its raw reward",
                    fix="raise group_size, or take a baseline from outside the group",
                )
        changed = [s.sampled for s in drawn if s.sampled and not s.sampled.is_plain]
        if changed and signal.untempered:
            how = changed[0]
            words = f"temperature {how.temperature}" if how.temperature != 1 else f"{how}"
            raise LegalityError(
                f"stage {stage}: {tag_of(signal)} on samples at {words}",
                expected="temperature 1 and no truncation: it compares the sampled distribution "
                "with log-probs of the whole one at temperature 1, and would take the sampling "
                "for a difference of policies",
                fix="sample at temperature 1 without top_k, top_p and min_p, or drop "
                f"{tag_of(signal)}",
            )


def _check_parts(composition: Composition, *, stage: str) -> None:
    """The checks of the parts themselves."""
    source: Source = composition.source
    asked: list[tuple[Signal | Term | Source, frozenset[Kind]]] = [(source, source.writes)]
    asked += [(t, t.readable & source.writes) for t in composition.terms]
    asked += list(zip(composition.signals, scopes(composition), strict=True))
    for part, kinds in asked:
        part.check(
            StageContext(
                stage=stage,
                source=source,
                signals=composition.signals,
                terms=composition.terms,
                kinds=kinds,
            )
        )


def _check_scalar_head(composition: Composition, *, stage: str) -> None:
    """A scalar head exactly where a term trains it."""
    read, head = readouts(composition.terms), composition.scalar_head
    if read and head is None:
        raise LegalityError(
            f"stage {stage}: a term reads {' and '.join(sorted(read))}, and there is no scalar "
            "head to read it from",
            expected="a scalar head",
            fix="add `scalar_head: {trunk: shared}` (a reward model, or a critic inside of the "
            "policy) or `scalar_head: {trunk: separate}` (a critic beside it)",
        )
    if head is not None and not read:
        raise LegalityError(
            f"stage {stage}: a scalar head that no term reads",
            expected="a term that trains it, such as value_loss",
            fix="drop scalar_head, or add the term",
        )


@dataclass(frozen=True, slots=True)
class Admission:
    """The groups of one draw after the per-record check."""

    kept: tuple[Group, ...]
    stale: tuple[Group, ...]  # a live span was older than allowed
    discarded: Mapping[Discard, tuple[Group, ...]] = field(default_factory=dict)  # by a signal
    fresh: tuple[Group, ...] = ()  # whole groups, the discarded members included
    age: float = 0.0  # versions of a group's oldest live span, mean over all drawn


def admit(
    groups: Sequence[Group], terms: Sequence[Term], *, version: int | None, max_age: int
) -> Admission:
    """Check every record against the terms, at the moment it is consumed.

    Args:
        groups: scored groups.
        terms: the objective.
        version: the learner's version now; None for a learner without versions.
        max_age: how many versions old a live span may be.

    Raises:
        LegalityError: a trained token has an author that no term may read.
    """
    allowed = frozenset().union(*(t.readable for t in terms))
    fresh: list[Group] = []
    stale: list[Group] = []
    oldest: list[int] = []
    for group in groups:
        for member in group.members:
            trajectory = member.trajectory
            if barred := trajectory.authors - allowed:
                raise LegalityError(
                    f"trajectory {trajectory.id} of {trajectory.task} has tokens by "
                    f"{_names(barred)}",
                    expected=f"only {_names(allowed)}, which the objective may read",
                    fix="check the author that the source declares",
                )
        ages = [m.trajectory.age(version) for m in group.members] if version is not None else [0]
        oldest.append(max(ages))
        (stale if oldest[-1] > max_age else fresh).append(group)
    by_reason = {reason: _members_with(fresh, reason) for reason in Discard}
    kept = by_reason.pop(Discard.KEPT)
    return Admission(
        kept,
        tuple(stale),
        {r: gs for r, gs in by_reason.items() if gs},
        tuple(fresh),
        sum(oldest) / len(oldest) if oldest else 0.0,
    )


def _members_with(groups: Sequence[Group], reason: Discard) -> tuple[Group, ...]:
    """The groups reduced to members with this verdict; empty ones left out."""
    code, out = float(reason.code), list[Group]()
    for group in groups:
        members = tuple(m for m in group.members if (m.scalar(Column.DISCARD) or 0.0) == code)
        if len(members) == len(group.members):
            out.append(group)
        elif members:
            out.append(Group(task=group.task, members=members))
    return tuple(out)


def _names(values: frozenset[Kind] | frozenset[Column]) -> str:
    return ", ".join(sorted(values))
