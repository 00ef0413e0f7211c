"""Offline RL on logged answers: values by hand, gradients, limits, traps."""

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, random_groups, trajectory, with_column

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.legality import check_composition
from posttrain.parts.offline.filters import KeepPositiveAdvantages
from posttrain.parts.offline.presets import ALol, Awr, RGold
from posttrain.parts.offline.weighted import AdvantageWeighted, LeftoverLunch, RewardGold
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.likelihood import CrossEntropy, WeightedCrossEntropy
from posttrain.testing import fake_tools
from posttrain.training.objective import StageObjective

LOGP = np.log([0.5, 0.05, 0.9])  # two answers, of 2 and 1 tokens
REFERENCE = LOGP - np.log([1.2, 0.75, 3.0])  # token ratios; the first answer's is 0.9


def two_answers():
    members = (
        Scored(trajectory=trajectory([1, 2], [3, 4], kind=Kind.EXTERNAL)),
        Scored(trajectory=trajectory([1, 2], [5], kind=Kind.EXTERNAL)),
    )
    return [Group(task="test/0", members=members)]


def per_token(groups, column, rows):
    left = iter(rows)
    return with_column(
        groups, column, lambda t: np.array([np.nan] * t.prompt_length + next(left), np.float32)
    )


def columned(advantages=(0.7, -1.5), rewards=(2.0, -0.5)):
    groups = per_token(two_answers(), Column.ADVANTAGE, [[advantages[0]] * 2, [advantages[1]]])
    groups = per_token(groups, Column.REFERENCE_LOGPROB, [list(REFERENCE[:2]), [REFERENCE[2]]])
    left = iter(rewards)
    return with_column(groups, Column.REWARD, lambda t: np.asarray(next(left)))


def evaluate(term, groups=None, logp=LOGP):
    (batch,) = pack(groups or columned(), needs=term.needs, max_tokens=999)
    logprob = torch.tensor(logp, requires_grad=True)
    out = term.values({Stat.LOGPROB: logprob}, batch)
    out.loss.sum().backward()
    return out.loss.detach().numpy(), logprob.grad.numpy(), out.shown


def numbered(seed=0, *, mean=0.0):
    """Random groups with a random reward, advantage and reference everywhere."""
    rng = np.random.default_rng(seed)
    groups = random_groups(kind=Kind.EXTERNAL)
    groups = with_column(groups, Column.REWARD, lambda t: np.asarray(rng.normal(mean)))
    groups = with_column(
        groups, Column.ADVANTAGE, lambda t: np.full(len(t), rng.normal(mean), np.float32)
    )
    return with_column(
        groups, Column.REFERENCE_LOGPROB, lambda t: rng.normal(-2, 0.3, len(t)).astype(np.float32)
    )


def objective_gradients(learner, term, groups, max_tokens=10_000):
    objective = StageObjective((term,))
    return gradients(learner, pack(groups, needs=objective.needs, max_tokens=max_tokens), objective)


# --- AWR -------------------------------------------------------------------------------------


def test_advantage_weighted_by_hand():
    loss, grad, shown = evaluate(AdvantageWeighted(beta=0.5, max_weight=3.0))
    w = np.array([3.0, 3.0, np.exp(-3.0)])  # e^{1.4} = 4.06 is capped
    np.testing.assert_allclose(loss, -w * LOGP, rtol=1e-6)
    np.testing.assert_allclose(grad, -w, rtol=1e-6)
    np.testing.assert_array_equal(shown["capped"], [1, 1, 0])


def test_awr_at_a_large_beta_is_cross_entropy(learner):
    groups = numbered()
    loss, grads = objective_gradients(learner, AdvantageWeighted(beta=1e7), groups)
    plain, grads_plain = objective_gradients(learner, CrossEntropy(), groups)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert largest_gap(grads, grads_plain) < 1e-5
    _, sharp = objective_gradients(learner, AdvantageWeighted(beta=0.5), groups)
    assert largest_gap(sharp, grads_plain) > 0.1


def test_awr_survives_a_beta_that_overflows():
    loss, grad, _ = evaluate(AdvantageWeighted(beta=1e-4))
    np.testing.assert_allclose(loss, [-20 * LOGP[0], -20 * LOGP[1], 0], rtol=1e-6)
    assert np.isfinite(grad).all()


# --- A-LoL -----------------------------------------------------------------------------------


def test_leftover_lunch_takes_an_answer_as_one_action():
    loss, grad, shown = evaluate(LeftoverLunch(clip=0.9))
    w = 0.7 * 0.9  # the ratio of the first answer, 1.2 · 0.75, within 0.1 and 1.9
    np.testing.assert_allclose(loss, [-w * LOGP[0], -w * LOGP[1], 0], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(grad, [-w, -w, 0], rtol=1e-5, atol=1e-12)  # ratio is a constant
    np.testing.assert_allclose(shown["ratio"], [0.9, 0.9, 1.9], rtol=1e-5)  # 3 is clipped


def test_leftover_lunch_variants_by_hand():
    groups = columned(advantages=(0.7, 0.2))
    _, token, _ = evaluate(LeftoverLunch(ratio="token", clip=0.22), groups)
    np.testing.assert_allclose(token, [-0.7 * 1.2, -0.7 * 0.78, -0.2 * 1.22], rtol=1e-5)
    free, grad, _ = evaluate(LeftoverLunch(ratio="none"), groups)
    w = np.array([0.7, 0.7, 0.2])
    np.testing.assert_allclose(free, -w * LOGP, rtol=1e-6)
    np.testing.assert_allclose(grad, -w, rtol=1e-6)
    kl, grad, _ = evaluate(LeftoverLunch(ratio="none", kl_weight=0.3), groups)
    np.testing.assert_allclose(kl, -w * LOGP + 0.3 * (LOGP - REFERENCE), rtol=1e-5)
    np.testing.assert_allclose(grad, 0.3 - w, rtol=1e-5)


def test_an_answer_at_the_reference_has_ratio_one(learner):
    """π = π_ref: A-LoL is its reference-free variant, and with A = 1 the summed NLL."""
    groups = with_column(
        random_groups(kind=Kind.EXTERNAL), Column.ADVANTAGE, lambda t: np.ones(len(t), np.float32)
    )
    own = iter(learner.policy.logprobs([m.trajectory for g in groups for m in g.members]))
    groups = with_column(groups, Column.REFERENCE_LOGPROB, lambda t: next(own))
    loss, grads = objective_gradients(learner, LeftoverLunch(), groups)
    for term in (LeftoverLunch(ratio="none"), CrossEntropy(aggregate="sequence_sum")):
        other, grads_other = objective_gradients(learner, term, groups)
        assert loss == pytest.approx(other, rel=1e-5)
        assert largest_gap(grads, grads_other) < 1e-4


# --- R-GOLD ----------------------------------------------------------------------------------


def test_reward_gold_by_hand():
    loss, grad, _ = evaluate(RewardGold(floor=0.1))
    w = np.array([0.5 * 2.0, 0.1 * 2.0, 0.9 * -0.5])  # the unlikely token is lifted to the floor
    np.testing.assert_allclose(loss, -w * LOGP, rtol=1e-6)
    np.testing.assert_allclose(grad, -w, rtol=1e-6)  # sg: no derivative of the weight


def test_gold_at_floor_one_is_reward_weighting(learner):
    groups = numbered(mean=2.0)
    loss, grads = objective_gradients(learner, RewardGold(floor=1.0), groups)
    weighted = WeightedCrossEntropy(by="reward", aggregate="sequence_sum")
    other, grads_other = objective_gradients(learner, weighted, groups)
    assert loss == pytest.approx(other, rel=1e-6)
    assert largest_gap(grads, grads_other) < 1e-6


# --- all of them -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "term",
    [
        AdvantageWeighted(),
        AdvantageWeighted(aggregate="sequence_mean"),
        LeftoverLunch(),
        LeftoverLunch(ratio="token", aggregate="token_mean"),
        LeftoverLunch(ratio="none", kl_weight=0.2),
        RewardGold(),
    ],
    ids=lambda t: f"{type(t).__name__}-{t.aggregate}",
)
def test_micro_batches_change_nothing(learner, term):
    groups = numbered()
    loss, grads = objective_gradients(learner, term, groups)
    loss_parts, grads_parts = objective_gradients(learner, term, groups, max_tokens=12)
    assert loss_parts == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert largest_gap(grads, grads_parts) < 1e-5


def test_the_logged_advantage_is_the_reward_minus_a_baseline():
    groups = columned(rewards=(2.0, -1.0))
    for baseline, expected in ((None, [1.5, -1.5]), (0.25, [1.75, -1.25])):
        spec = Awr(data=Dataset(path="x", reward="r"), baseline=baseline).compose().signals[0]
        (scored,) = spec.score(groups, fake_tools())
        got = [float(m.columns[Column.ADVANTAGE][-1]) for m in scored.members]
        assert got == pytest.approx(expected)


def test_methods_are_legal_with_a_reward_column_and_refused_without():
    for method in (Awr, ALol, RGold):
        check_composition(
            method(data=Dataset(path="rows.jsonl", reward="score")).compose(), stage="s"
        )
        with pytest.raises(LegalityError, match="needs reward"):
            check_composition(method(data=Dataset(path="rows.jsonl")).compose(), stage="s")


def test_a_lol_asks_a_reference_only_where_it_compares_with_one():
    data = Dataset(path="rows.jsonl", reward="score")
    tags = [
        [s.__struct_config__.tag for s in ALol(data=data, **options).compose().signals]
        for options in ({}, {"ratio": "none"}, {"ratio": "none", "kl_weight": 0.1})
    ]
    base = ["group_advantage", "keep_positive_advantages"]
    assert tags == [[*base, "reference_logprobs"], base, [*base, "reference_logprobs"]]
    assert KeepPositiveAdvantages() in ALol(data=data).compose().signals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdvantageWeighted(beta=0.0), "beta is 0.0"),
        (lambda: AdvantageWeighted(max_weight=-1.0), "max_weight is -1.0"),
        (lambda: LeftoverLunch(clip=1.0), "above 0, below 1"),
        (lambda: LeftoverLunch(kl_weight=0.1), "replaces the ratio"),
        (lambda: RewardGold(floor=1.5), "from 0 to 1"),
    ],
)
def test_bad_options_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
