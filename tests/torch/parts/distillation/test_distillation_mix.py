"""Mixed sources: exact shares, legality per author, missing columns that never become numbers."""

import json

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, on_policy, random_groups, trajectory, with_column

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import KINDS, pack
from posttrain.parts.base import Limit, bound
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.selection import KeepInformative
from posttrain.parts.credit.shaping import KLPenalty
from posttrain.parts.distillation.divergences import TeacherForwardKL, TeacherReverseKL
from posttrain.parts.distillation.presets import Distillm2, Gkd, Uld
from posttrain.parts.distillation.teachers import TeacherDistribution
from posttrain.parts.guided.hybrid import Chord
from posttrain.parts.legality import check_composition, column_readers, scopes
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.regularisers import ReferenceKL
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.mix import Mix
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.run.build import scoped
from posttrain.testing import FakeTaskSet, check_source, fake_tools, tiny_model
from posttrain.training.objective import StageObjective

DATA, OWN = Dataset(path="demos.jsonl"), Rollouts(tasks=("letters",), group_size=2)


def mix(*shares, parts=None):
    return Mix(parts=parts or (DATA, OWN, OWN, OWN)[: len(shares)], shares=shares)


# --- shares ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.9), (0.25, 0.25, 0.5), (0.2, 0.3, 0.5)])
def test_shares_that_come_out_even_are_met_in_every_draw(shares):
    counts = {mix(*shares).counts(20, step=s) for s in range(50)}
    assert counts == {tuple(round(20 * s) for s in shares)}


@pytest.mark.parametrize(
    ("shares", "slack"),
    [((0.3, 0.7), 0.5), ((1 / 3, 1 / 3, 1 / 3), 1.0), ((0.05, 0.05, 0.9), 1.0), ((0.25,) * 4, 1.5)],
)
@pytest.mark.parametrize("num_groups", [1, 3, 7])
def test_other_shares_are_met_over_draws(shares, slack, num_groups):
    given = np.zeros(len(shares))
    for step in range(200):
        counts = mix(*shares).counts(num_groups, step=step)
        assert sum(counts) == num_groups
        assert min(counts) >= 0
        given += counts
        owed = np.array(shares) * num_groups * (step + 1)
        assert np.abs(given - owed).max() <= slack + 1e-6


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.4), (1.0, 0.0), (1.2, -0.2)])
def test_shares_that_are_no_shares_are_refused(shares):
    with pytest.raises(ConfigError, match=r"shares sum to 1|shares\[0\] is 1"):
        Mix(parts=(DATA, OWN)[: len(shares)], shares=shares)


# --- drawing ---------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "a"} for i in range(7)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return fake_tools(tasksets={"letters": FakeTaskSet()}, root=tmp_path)


def kinds(groups):
    return [g.members[0].trajectory.spans[-1].producer.kind for g in groups]


@pytest.mark.parametrize(("share", "num_groups"), [(0.5, 4), (0.3, 3), (0.9, 1)])
def test_a_mix_is_a_source_and_every_part_runs_without_a_gap(tools, share, num_groups):
    stream = check_source(mix(share, 1 - share), tools, num_groups=num_groups, seed=3)
    data, own = stream.parts
    drawn = [g for step in range(12) for g in stream.draw(num_groups, step=step)]
    rows = [
        g.task for g in drawn if g.members[0].trajectory.spans[-1].producer.kind is Kind.EXTERNAL
    ]
    assert rows == [g.task for g in data.draw(len(rows), step=0)]
    asked = [g.task for g in drawn if g.task.startswith("letters/")]
    assert asked == [g.task for g in own.draw(len(asked), step=0)]
    assert len(rows) == pytest.approx(share * len(drawn), abs=1)


def test_an_even_mix_draws_each_part_at_once(tools):
    stream = mix(0.25, 0.75).open(tools, seed=3)
    groups = stream.draw(4, step=2)
    assert kinds(groups) == [Kind.EXTERNAL] + [Kind.LEARNER] * 3
    alone = stream.parts[1].draw(3, step=2)
    ours = [m.trajectory.id for g in groups[1:] for m in g.members]
    assert ours == [m.trajectory.id for g in alone for m in g.members]


# --- legality per author ---------------------------------------------------------------------

IMITATE = CrossEntropy(where=(Kind.EXTERNAL,))
EXPLORE = ClippedPolicyGradient()
JUDGED = (Verify(), GroupAdvantage())


def composed(*terms, signals=(), source=None):
    return Composition(source=source or mix(0.5, 0.5), signals=signals, terms=terms)


def test_a_column_is_only_needed_where_a_term_reads_it():
    both = composed(IMITATE, EXPLORE, signals=JUDGED)
    check_composition(both, stage="s")
    assert scopes(both) == (frozenset({Kind.LEARNER}),) * 2
    assert column_readers(both.terms) == {
        Column.BEHAVIOUR_LOGPROB: frozenset({Kind.LEARNER}),
        Column.ADVANTAGE: frozenset({Kind.LEARNER}),
    }


def test_a_column_that_one_of_the_authors_lacks_is_named():
    rows = Dataset(path="t.jsonl", author=Kind.LEARNER)  # rows of an author who also samples
    both = composed(EXPLORE, signals=JUDGED, source=mix(0.5, 0.5, parts=(rows, OWN)))
    with pytest.raises(LegalityError, match="needs behaviour_logprob"):
        check_composition(both, stage="s")
    signals = (Verify(), KLPenalty(), GroupAdvantage(credit="to_go"))
    with pytest.raises(LegalityError, match="kl_penalty needs reference_logprob"):
        check_composition(composed(IMITATE, EXPLORE, signals=signals), stage="s")


def test_an_author_whom_no_term_reads_is_refused():
    with pytest.raises(LegalityError, match="no term reads tokens written by external"):
        check_composition(composed(EXPLORE, signals=JUDGED), stage="s")


def test_a_signal_that_would_judge_nobody_is_refused():
    with pytest.raises(LegalityError, match="nothing in the mix reads what verify writes"):
        check_composition(composed(CrossEntropy(), signals=(Verify(),)), stage="s")


def test_a_selection_judges_whom_it_can():
    """The stage itself reads DISCARD, so no term asks for it."""
    kept = composed(IMITATE, EXPLORE, signals=(*JUDGED, KeepInformative()))
    assert scopes(kept)[2] == frozenset({Kind.LEARNER})
    check_composition(kept, stage="s")


def test_truncated_sampling_matters_only_where_a_ratio_reads():
    greedy = Rollouts(tasks=("x",), policy="base", sampling=SamplingSpec(top_p=0.9))
    fine = composed(
        CrossEntropy(where=(Kind.TEACHER,)),
        EXPLORE,
        signals=JUDGED,
        source=mix(0.5, 0.5, parts=(greedy, OWN)),
    )
    check_composition(fine, stage="s")
    cut = Rollouts(tasks=("x",), sampling=SamplingSpec(top_p=0.9))
    with pytest.raises(LegalityError, match="truncated"):
        check_composition(
            composed(IMITATE, EXPLORE, signals=JUDGED, source=mix(0.5, 0.5, parts=(DATA, cut))),
            stage="s",
        )


@pytest.mark.parametrize(
    "method",
    [
        Chord(data=DATA, tasks=("letters",)),
        Gkd(data=DATA, tasks=("letters",), teachers={"*": "base"}),
        Distillm2(tasks=("letters",), teacher="base"),
        Uld(data=DATA, tasks=("letters",), teacher="base"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_named_mixes_are_legal(method):
    check_composition(method.compose(), stage="s")


# --- signals judge their authors -------------------------------------------------------------


def test_a_scoped_signal_leaves_the_others_alone():
    seen = []

    def rewarded(groups):
        seen.extend(groups)
        return with_column(groups, Column.REWARD, lambda t: np.array(1.0))

    mixed = random_groups(num_groups=2, kind=Kind.EXTERNAL) + random_groups(num_groups=3)
    out = scoped(rewarded, frozenset({Kind.LEARNER}))([mixed[i] for i in (2, 0, 3, 1, 4)])
    assert len(seen) == 3
    judged = [Column.REWARD in g.members[0].columns for g in out]
    assert judged == [True, False, True, False, True]
    assert scoped(rewarded, frozenset({Kind.HUMAN}))(mixed) == mixed


# --- packing and the loss --------------------------------------------------------------------


def half_scored(policy, *, seed=0):
    """External groups without any column, and learner groups with advantages."""
    rng = np.random.default_rng(seed)
    own = on_policy(random_groups(num_groups=2, seed=seed), policy)
    own = with_column(own, Column.ADVANTAGE, lambda t: rng.normal(size=len(t)).astype(np.float32))
    return random_groups(num_groups=2, seed=seed + 1, kind=Kind.EXTERNAL), own


def test_what_is_missing_is_nan_in_the_batch_and_refused_where_it_is_read(learner):
    external, own = half_scored(learner.policy)
    needs = column_readers((IMITATE, EXPLORE))
    (batch,) = pack(external + own, needs=needs, max_tokens=10_000)
    by_learner = batch.kind_N == KINDS.index(Kind.LEARNER)
    for column in (Column.ADVANTAGE, Column.BEHAVIOUR_LOGPROB):
        assert torch.equal(batch.columns[column].isnan(), ~by_learner)
    with pytest.raises(LegalityError, match="has no advantage"):
        pack(external, needs=frozenset({Column.ADVANTAGE}), max_tokens=10_000)
    holed = with_column(own, Column.ADVANTAGE, lambda t: np.full(len(t), np.nan, np.float32))
    with pytest.raises(LegalityError, match="not finite"):
        pack(external + holed, needs=needs, max_tokens=10_000)
    (nobody,) = pack(external, needs=needs, max_tokens=10_000)
    assert not nobody.columns


@pytest.mark.parametrize("max_tokens", [10_000, 15])
def test_a_mixed_loss_is_the_sum_of_the_separate_ones(learner, max_tokens):
    """Also in micro-batches that hold one author only."""
    external, own = half_scored(learner.policy)
    terms = (CrossEntropy(where=(Kind.EXTERNAL,), weight=0.3), ClippedPolicyGradient(weight=0.7))
    batches = pack(external + own, needs=column_readers(terms), max_tokens=max_tokens)
    loss, grads = gradients(learner, batches, StageObjective(terms))
    sums, expected = {}, 0.0
    for term, part in zip(terms, (external, own), strict=True):
        alone = pack(part, needs=frozenset(term.needs), max_tokens=10_000)
        value, separate = gradients(learner, alone, StageObjective((term,)))
        expected += value
        sums = {n: sums.get(n, 0) + g for n, g in separate.items()}
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert loss == pytest.approx(expected, abs=1e-6)
    assert largest_gap(sums, grads) < 1e-5


def test_a_teacher_that_scored_some_authors_only(learner, engine, tmp_path):
    """Teacher columns have a width; where they are missing nothing flows."""
    teacher = engine.policy(str(tiny_model(tmp_path / "teacher", seed=9)))
    tools = fake_tools(learner.policy, policies={"t": teacher})
    for top_k in (None, 4):
        signal = TeacherDistribution(routes={"*": "t"}, top_k=top_k)
        score = scoped(bound(signal, tools), frozenset({Kind.LEARNER}))
        external = random_groups(num_groups=2, kind=Kind.EXTERNAL, seed=2)
        own = random_groups(num_groups=2, seed=3)
        taught = TeacherReverseKL(where=(Kind.LEARNER,))
        for terms in (
            (IMITATE, taught),
            (taught, IMITATE, TeacherForwardKL(where=(Kind.LEARNER,))),
        ):
            scored = score(external + own)
            batches = pack(scored, needs=column_readers(terms), max_tokens=10_000)
            loss, grads = gradients(learner, batches, StageObjective(terms))
            assert all(bool(g.isfinite().all()) for g in grads.values())
            alone = 0.0
            for term in terms:
                part = external if term is IMITATE else score(own)
                packed = pack(part, needs=frozenset(term.needs), max_tokens=10_000)
                alone += gradients(learner, packed, StageObjective((term,)))[0]
            assert loss == pytest.approx(alone, rel=1e-5)


def test_pairs_of_others_do_not_reach_a_term_that_may_not_read_them(learner):
    """A preference term limited to one author, in a batch with pairs of another whose reference
    nobody asked for."""
    rng = np.random.default_rng(0)

    def pairs(kind, seed):
        groups = random_groups(num_groups=3, size=2, kind=kind, seed=seed)
        signs = iter([1.0, -1.0] * 3)
        return with_column(groups, Column.PREFERENCE, lambda t: np.array(next(signs)))

    read = with_column(
        pairs(Kind.HUMAN, 1),
        Column.REFERENCE_LOGPROB,
        lambda t: rng.normal(-2, 0.3, len(t)).astype(np.float32),
    )
    terms = (Dpo(where=(Kind.HUMAN,)), CrossEntropy(where=(Kind.EXTERNAL,)))
    mixed = pack(pairs(Kind.EXTERNAL, 2) + read, needs=column_readers(terms), max_tokens=10_000)
    objective = StageObjective(terms)
    assert objective.counts(mixed)[0] == 3
    loss, grads = gradients(learner, mixed, objective)
    alone = pack(read, needs=frozenset(terms[0].needs), max_tokens=10_000)
    plain = pack(pairs(Kind.EXTERNAL, 2), needs=frozenset(), max_tokens=10_000)
    expected = gradients(learner, alone, StageObjective(terms[:1]))[0]
    expected += gradients(learner, plain, StageObjective(terms[1:]))[0]
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_limit_by_reward_in_micro_batches_without_rewards(learner):
    """Positive rewards among the learner's; nobody judged the others."""
    signs = iter([1.0, 0.0] * 4)
    own = with_column(random_groups(num_groups=2), Column.REWARD, lambda t: np.array(next(signs)))
    limited = CrossEntropy(where=(Kind.LEARNER,), limit=Limit(rewards="positive"))
    objective = StageObjective((limited, IMITATE))
    external = random_groups(num_groups=2, kind=Kind.EXTERNAL, seed=1)
    needs = column_readers(objective.terms)
    batches = pack(external + own, needs=needs, max_tokens=15)
    assert any(Column.REWARD not in b.columns for b in batches)
    loss, grads = gradients(learner, batches, objective)
    good = [Group(task=g.task, members=g.members[::2]) for g in own]
    expected = 0.0
    for part, term in ((good, CrossEntropy()), (external, CrossEntropy())):
        alone = pack(part, needs=frozenset(), max_tokens=10_000)
        expected += gradients(learner, alone, StageObjective((term,)))[0]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all(bool(g.isfinite().all()) for g in grads.values())


def test_only_keeps_sequences_and_pairs_that_are_whole():
    members = tuple(
        Scored(trajectory=trajectory([1, 2], answer)).with_columns(
            {Column.REWARD: np.array(float(i))}
        )
        for i, answer in enumerate(([3], [4, 5], [6]))
    )
    groups = [Group(task="t/0", members=members)]
    (batch,) = pack(groups, needs=frozenset({Column.REWARD}), max_tokens=99)
    kept = batch.only(torch.tensor([False, True, True, True]))
    assert kept.target_N.tolist() == [4, 5, 6]
    assert kept.sequence_N.tolist() == [0, 0, 1]
    assert kept.columns[Column.REWARD].tolist() == [1.0, 2.0]
    assert kept.num_sequences == 2
    assert torch.equal(kept.tokens_T, batch.tokens_T)


def test_a_reference_beside_a_mix_scores_only_its_readers():
    both = composed(IMITATE, EXPLORE, ReferenceKL(), signals=(*JUDGED, ReferenceLogprobs()))
    check_composition(both, stage="s")
    assert scopes(both)[-1] == frozenset({Kind.LEARNER})
