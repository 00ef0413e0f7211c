"""Choices over a whole draw: tokens of the highest entropy, and who is shown how."""

import numpy as np
import pytest
from material import gradients, largest_gap, random_groups, trajectory, with_column
from staging import check_resume, make_world

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column, Discard, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.base import Limit
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.selection import ImitateFailures, MarkCovariance, MarkEntropy
from posttrain.parts.guided.presets import Hpt
from posttrain.parts.legality import check_composition, column_readers
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.presets import HighEntropy
from posttrain.parts.preference.ranking import RankPairs
from posttrain.parts.preference.reference_free import Simpo
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import check_signal, check_term, fake_tools
from posttrain.training.objective import StageObjective


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


# --- entropy over a draw ---------------------------------------------------------------------


def entropies(learner, groups):
    """[N] of all trained tokens in order, in float64 from the whole distributions."""
    trajectories = [m.trajectory for g in groups for m in g.members]
    out = []
    for t, (_, logp) in zip(
        trajectories, learner.policy.distributions(trajectories, top_k=None), strict=True
    ):
        rows = logp[t.trainable].astype(np.float64)
        out.append(-(np.exp(rows) * rows).sum(-1))
    return np.concatenate(out)


def marks(groups):
    return np.concatenate(
        [m.columns[Column.MARK][m.trajectory.trainable] for g in groups for m in g.members]
    )


def test_marked_are_the_tokens_of_highest_entropy_in_the_draw(learner):
    groups = random_groups()
    scored = check_signal(MarkEntropy(share=0.2), groups, fake_tools(learner.policy))
    marked = marks(scored) > 0
    entropy = entropies(learner, groups)
    assert marked.sum() == np.ceil(0.2 * len(entropy))
    assert entropy[marked].min() >= entropy[~marked].max()
    per_answer = [m.columns[Column.MARK].sum() for g in scored for m in g.members]
    assert 0 in per_answer, "an answer that is sure throughout has no mark"


def test_policy_entropies_are_those_of_its_distributions(learner):
    groups = random_groups(seed=3)
    members = [m.trajectory for g in groups for m in g.members]
    scored = learner.policy.entropies(members)
    for t, values in zip(members, scored, strict=True):
        assert (np.isfinite(values) == t.trainable).all()
    flat = np.concatenate([v[t.trainable] for t, v in zip(members, scored, strict=True)])
    np.testing.assert_allclose(flat, entropies(learner, groups), atol=1e-4)


def test_discarded_answers_neither_count_nor_are_marked(learner):
    groups = random_groups(num_groups=2, size=4)
    out = iter([Discard.CUT_OFF.code, 0] * 4)
    groups = with_column(groups, Column.DISCARD, lambda t: np.array(float(next(out))))
    scored = MarkEntropy(share=0.5).score(groups, fake_tools(learner.policy))
    lengths = [int(m.trajectory.trainable.sum()) for g in scored for m in g.members]
    counts = [int(m.columns[Column.MARK].sum()) for g in scored for m in g.members]
    assert counts[0::2] == [0] * 4
    assert sum(counts) == np.ceil(0.5 * sum(lengths[1::2]))


def test_only_marked_tokens_have_a_gradient_whatever_the_micro_batches(learner):
    groups = MarkEntropy(share=0.3).score(random_groups(), fake_tools(learner.policy))
    term = CrossEntropy(where=(Kind.LEARNER,), limit=Limit(marked=True))
    check_term(term)
    objective, needs = StageObjective((term,)), column_readers((term,))
    (whole,) = pack(groups, needs=needs, max_tokens=9999)
    assert objective.counts([whole]) == (int(marks(groups).sum()),)
    value, grads = gradients(learner, [whole], objective)
    logp = learner.policy.logprobs([m.trajectory for g in groups for m in g.members])
    flat = np.concatenate([v[np.isfinite(v)] for v in logp])
    assert value == pytest.approx(-flat[marks(groups) > 0].mean(), rel=1e-5)
    split, parts = gradients(learner, pack(groups, needs=needs, max_tokens=12), objective)
    assert split == pytest.approx(value, rel=1e-5)
    assert largest_gap(grads, parts) < 1e-5


def composed(*signals, term):
    source = Rollouts(tasks=("t",))
    return Composition(source=source, signals=(Verify(), GroupAdvantage(), *signals), terms=(term,))


def test_marks_that_mean_nothing_are_refused():
    marked = ClippedPolicyGradient(limit=Limit(marked=True))
    check_composition(composed(MarkEntropy(), term=marked), stage="s")
    with pytest.raises(LegalityError, match="needs mark"):
        check_composition(composed(term=marked), stage="s")
    with pytest.raises(LegalityError, match="mark_covariance and mark_entropy"):
        check_composition(composed(MarkCovariance(), MarkEntropy(), term=marked), stage="s")
    pairs = composed(MarkEntropy(), RankPairs(), term=Simpo(limit=Limit(marked=True)))
    with pytest.raises(LegalityError, match="compares whole pairs"):
        check_composition(pairs, stage="s")
    with pytest.raises(ConfigError, match="above 0, below 1"):
        MarkEntropy(share=1.0)


@pytest.mark.parametrize("over", ["draw", "sequence"])
def test_high_entropy_resumes_exactly(world, over):
    method = HighEntropy(tasks=("rows",), group_size=4, max_new_tokens=5, over=over)
    check_composition(method.compose(), stage="s")
    _, metrics = check_resume(world, method, steps=3, updates_per_draw=2, stop_after=2)
    assert max(m["grad_norm"] for m in metrics) > 1e-4


# --- imitate what fails ----------------------------------------------------------------------


def mixed(*rewards):
    """Rollouts with these rewards, and a right demonstration."""
    members = [Scored(trajectory=trajectory([1], [5 + i, 9])) for i in range(len(rewards))]
    members.append(Scored(trajectory=trajectory([1], [7, 8], kind=Kind.EXTERNAL)))
    values = iter([*rewards, 1.0])
    (group,) = with_column(
        [Group(task="test/0", members=tuple(members))],
        Column.REWARD,
        lambda t: np.array(float(next(values))),
    )
    return group


def read(group, column):
    return [m.scalar(column) for m in group.members]


@pytest.mark.parametrize(("gate", "failed"), [(0, [True, False, False]), (1, [True, True, False])])
def test_a_group_either_imitates_or_explores(gate, failed):
    groups = [mixed(0, 0, 0), mixed(0, 1, 0), mixed(1, 1, 0)]
    scored = check_signal(ImitateFailures(gate=gate), groups)
    imitated, unneeded = Discard.IMITATED.code, Discard.NOT_NEEDED.code
    for group, shown in zip(scored, failed, strict=True):
        expected = [imitated] * 3 + [0] if shown else [0] * 3 + [unneeded]
        assert read(group, Column.DISCARD) == expected


def test_the_demonstration_is_no_part_of_the_baseline():
    groups = ImitateFailures().score([mixed(0, 0, 0), mixed(0, 1, 0)], fake_tools())
    spec = GroupAdvantage(scale="none", kept_only=True)
    assert Column.DISCARD in spec.needs
    failed, fine = spec.score(groups, fake_tools())
    assert all((m.columns[Column.ADVANTAGE] == 0).all() for m in failed.members)
    got = [float(m.columns[Column.ADVANTAGE][-1]) for m in fine.members]
    assert got == pytest.approx([-1 / 3, 2 / 3, -1 / 3, 0])
    (plain,) = GroupAdvantage(scale="none").score([mixed(0, 1, 0)], fake_tools())
    first = float(plain.members[0].columns[Column.ADVANTAGE][-1])
    assert first == pytest.approx(-1 / 2), "with it in the mean"


def test_hpt_trains_on_one_of_the_two(world):
    method = Hpt(tasks=("rows",), group_size=3, max_new_tokens=4)
    composition = method.compose()
    assert composition.source.group_size == 4, "three rollouts and a demonstration"
    check_composition(composition, stage="s")
    _, metrics = check_resume(world, method, steps=4, groups_per_step=6)
    for m in metrics:
        either = m.get("discarded/a demonstration instead", 0) / 3
        other = m.get("discarded/demonstration not needed", 0)
        assert either + other == 6
    assert any(m.get("discarded/a demonstration instead") for m in metrics)
    assert any(m.get("discarded/demonstration not needed") for m in metrics)


def test_kept_only_without_a_verdict_is_refused():
    term = ClippedPolicyGradient()
    signals = (Verify(), GroupAdvantage(kept_only=True))
    composition = Composition(source=Rollouts(tasks=("t",)), signals=signals, terms=(term,))
    with pytest.raises(LegalityError, match="needs discard"):
        check_composition(composition, stage="s")
