"""Values and gradients of every term, against numbers worked out without our code."""

import math

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, on_policy, random_groups, trajectory, with_column

from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.core.statistics import Divergence, DivergenceKind, Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.numerics.divergence import divergence
from posttrain.parts.credit.advantages import GroupAdvantage, group_advantages
from posttrain.parts.distillation.divergences import TeacherReverseKL
from posttrain.parts.distillation.teachers import TeacherDistribution
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.regularisers import ReferenceKL
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import FakeTaskSet, fake_tools
from posttrain.training.objective import StageObjective
from posttrain.training.reduce import reduce_units


def batch_of(groups, needs):
    (batch,) = pack(groups, needs=needs, max_tokens=10_000)
    return batch


def value(term, stats, batch):
    return term.values(stats, batch)


def two_answers(*, kind=Kind.LEARNER):
    """Two sequences of 2 and 1 trained tokens."""
    members = (
        Scored(trajectory=trajectory([1, 2], [3, 4], kind=kind)),
        Scored(trajectory=trajectory([1, 2], [5], kind=kind)),
    )
    return [Group(task="test/0", members=members)]


def per_token(groups, column, rows):
    left = iter(rows)
    return with_column(
        groups, column, lambda t: np.array([np.nan] * t.prompt_length + next(left), np.float32)
    )


def test_cross_entropy_token_and_sequence_mean():
    batch = batch_of(two_answers(), frozenset())
    stats = {Stat.LOGPROB: torch.tensor([-1.0, -2.0, -5.0])}
    objective = StageObjective((CrossEntropy(), CrossEntropy(aggregate="sequence_mean")))
    assert objective.counts([batch]) == (3, 2)
    loss = value(CrossEntropy(), stats, batch).loss
    tokens = reduce_units(CrossEntropy(), loss, batch, count=3)
    sequences = reduce_units(CrossEntropy(aggregate="sequence_mean"), loss, batch, count=2)
    assert float(tokens) == pytest.approx((1 + 2 + 5) / 3)
    assert float(sequences) == pytest.approx(((1 + 2) / 2 + 5) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_by_hand(smoothing):
    groups = per_token(two_answers(), Column.REFERENCE_LOGPROB, [[-1.5, -1.0], [-2.0]])
    signs = iter([1.0, -1.0])
    groups = with_column(groups, Column.PREFERENCE, lambda t: np.array(next(signs)))
    batch = batch_of(groups, frozenset({Column.REFERENCE_LOGPROB, Column.PREFERENCE}))
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    out = value(Dpo(beta=0.5, label_smoothing=smoothing), {Stat.LOGPROB: logp}, batch)
    # chosen: -3 + 2.5 = -0.5; rejected: -3 + 2 = -1; margin 0.5 * 0.5
    margin = 0.25
    sigmoid = 1 / (1 + math.exp(-margin))
    expected = -(1 - smoothing) * math.log(sigmoid) - smoothing * math.log(1 - sigmoid)
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-6)
    out.loss.sum().backward()
    slope = 0.5 * (-(1 - smoothing) * (1 - sigmoid) + smoothing * sigmoid)
    np.testing.assert_allclose(logp.grad, [slope, slope, -slope], rtol=1e-5)


def test_clipped_policy_gradient_by_hand():
    groups = per_token(two_answers(), Column.BEHAVIOUR_LOGPROB, [[-1.0, -1.0], [-1.0]])
    groups = per_token(groups, Column.ADVANTAGE, [[2.0, 2.0], [-1.0]])
    needs = frozenset({Column.BEHAVIOUR_LOGPROB, Column.ADVANTAGE})
    batch = batch_of(groups, needs)
    ratios = torch.tensor([1.5, 1.1, 0.5])
    logp = (ratios.log() - 1).requires_grad_()
    stats = {Stat.SAMPLED_LOGPROB: logp, Stat.ENTROPY: torch.zeros(3)}
    out = value(ClippedPolicyGradient(clip_low=0.2, clip_high=0.3), stats, batch)
    # A=2: clipped at 1.3; inside; A=-1, ratio 0.5 < 0.8: the pessimistic side is the clipped one
    np.testing.assert_allclose(out.loss.detach(), [-2.6, -2.2, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(out.shown["clipped"], [1, 0, 1])
    out.loss.sum().backward()
    np.testing.assert_allclose(logp.grad, [0, -2.2, 0], atol=1e-6)


def test_on_policy_the_clipped_gradient_is_reinforce(learner):
    """Ratio 1: −∇ min(rA, clip(r)A) = −A ∇ log π."""
    rng = np.random.default_rng(0)
    groups = on_policy(random_groups(), learner.policy)
    groups = with_column(
        groups, Column.ADVANTAGE, lambda t: np.full(len(t), rng.normal(), np.float32)
    )
    objective = StageObjective((ClippedPolicyGradient(),))
    batches = pack(groups, needs=objective.needs, max_tokens=10_000)
    _, grads = gradients(learner, batches, objective)

    model = learner.policy.model
    model.causal.zero_grad(set_to_none=True)
    (batch,) = batches
    logp = model.head(model.predicting(batch)).log_softmax(-1)
    written = logp.gather(-1, batch.target_N[:, None])[:, 0]
    (-(batch.columns[Column.ADVANTAGE] * written).mean()).backward()
    reinforce = {n: p.grad for n, p in model.causal.named_parameters() if p.grad is not None}
    assert largest_gap(grads, reinforce) < 1e-5


def test_ratio_is_one_on_fresh_rollouts_at_any_temperature(learner):
    """Sampler and trainer agree, also when the temperature is not 1."""
    for temperature in (1.0, 0.7, 1.6):
        spec = Rollouts(
            tasks=("letters",),
            group_size=4,
            max_new_tokens=9,
            sampling=SamplingSpec(temperature=temperature),
        )
        tools = fake_tools(learner.policy, tasksets={"letters": FakeTaskSet()})
        source = spec.open(tools, seed=0)
        groups = with_column(
            source.draw(3, step=0), Column.ADVANTAGE, lambda t: np.ones(len(t), np.float32)
        )
        objective = StageObjective((ClippedPolicyGradient(),))
        report = learner.step(
            pack(groups, needs=objective.needs, max_tokens=999), objective, lr_scale=0.0
        )
        assert report.metrics["clipped_policy_gradient/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(report.metrics["clipped_policy_gradient/policy_shift"]) < 1e-5


def test_equal_rewards_give_exactly_no_gradient(learner):
    groups = on_policy(random_groups(), learner.policy)
    groups = with_column(groups, Column.REWARD, lambda t: np.array(0.1 + 0.2))
    for scale in ("std", "none"):
        scored = GroupAdvantage(scale=scale).score(groups, fake_tools())
        objective = StageObjective((ClippedPolicyGradient(),))
        batches = pack(scored, needs=objective.needs, max_tokens=10_000)
        _, grads = gradients(learner, batches, objective)
        assert all(float(g.abs().max()) == 0 for g in grads.values())


def test_group_advantages_by_hand():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    mean, std = 0.6, math.sqrt((3 * 0.16 + 2 * 0.36) / 4)
    np.testing.assert_allclose(group_advantages(rewards, scale="none"), rewards - mean)
    np.testing.assert_allclose(
        group_advantages(rewards, scale="std"), (rewards - mean) / (std + 1e-6)
    )


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_teacher_equal_to_the_student_gives_no_gradient(learner, engine, tiny_folder, top_k):
    spec = TeacherDistribution(routes={"*": "base"}, top_k=top_k)
    teacher = engine.policy(str(tiny_folder))
    tools = fake_tools(learner.policy, policies={"base": teacher})
    groups = spec.score(random_groups(), tools)
    objective = StageObjective((TeacherReverseKL(),))
    loss, grads = gradients(
        learner, pack(groups, needs=objective.needs, max_tokens=10_000), objective
    )
    assert abs(loss) < 1e-6
    assert max(float(g.abs().max()) for g in grads.values()) < 1e-5


def test_reverse_kl_by_hand_and_top_k_as_lower_bound():
    p = np.array([0.5, 0.2, 0.2, 0.1])
    q = np.array([0.1, 0.6, 0.25, 0.05])
    full = float((p * np.log(p / q)).sum())
    wanted = Divergence(DivergenceKind.REVERSE_KL)
    logp, logq = (torch.from_numpy(x[None]).log().float() for x in (p, q))
    nothing = torch.empty(1, 0, dtype=torch.int64)
    assert float(divergence(wanted, logp, nothing, logq)) == pytest.approx(full, rel=1e-5)
    everything = torch.tensor([[1, 2, 0, 3]])
    reordered = logq.gather(-1, everything)
    assert float(divergence(wanted, logp, everything, reordered)) == pytest.approx(full, rel=1e-5)
    ids = torch.tensor([[1, 2]])  # the teacher's two most likely; the rest is one outcome
    merged = 0.2 * np.log(0.2 / 0.6) + 0.2 * np.log(0.2 / 0.25) + 0.6 * np.log(0.6 / 0.15)
    got = float(divergence(wanted, logp, ids, logq.gather(-1, ids)))
    assert got == pytest.approx(merged, rel=1e-5)
    assert got <= full


def test_reference_kl_has_the_gradient_of_the_kl():
    """On samples of the policy, E[∇ r·k3] = ∇ KL(π ‖ π_ref), summed exactly over a tiny space."""
    logits = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    behaviour = logits.detach().log_softmax(-1)
    policy = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    members = tuple(Scored(trajectory=trajectory([1], [a])) for a in range(3))
    groups = [Group(task="test/0", members=members)]
    groups = per_token(groups, Column.BEHAVIOUR_LOGPROB, [[float(b)] for b in behaviour])
    groups = per_token(groups, Column.REFERENCE_LOGPROB, [[float(r)] for r in reference])
    term = ReferenceKL()
    batch = batch_of(groups, term.needs)
    stats = {Stat.LOGPROB: policy, Stat.SAMPLED_LOGPROB: policy}
    out = value(term, stats, batch)
    (got,) = torch.autograd.grad((behaviour.exp() * out.loss).sum(), logits)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert float((behaviour.exp() * out.loss.detach()).sum()) == pytest.approx(
        float(exact.detach()), abs=1e-6
    )


def test_where_limits_a_term_by_author(learner):
    mixed = random_groups(num_groups=1, kind=Kind.EXTERNAL) + random_groups(num_groups=1)
    external = StageObjective((CrossEntropy(where=(Kind.EXTERNAL,)),))
    both = pack(mixed, needs=frozenset(), max_tokens=10_000)
    only = pack(mixed[:1], needs=frozenset(), max_tokens=10_000)
    loss, grads = gradients(learner, both, external)
    loss_only, grads_only = gradients(learner, only, external)
    assert loss == pytest.approx(loss_only, abs=1e-6)
    assert largest_gap(grads, grads_only) < 1e-6


def test_each_term_has_its_own_global_count(learner):
    """A weighted sum over two authors is the sum of the two separate losses."""
    mixed = random_groups(num_groups=2, kind=Kind.EXTERNAL) + random_groups(num_groups=1)
    terms = (
        CrossEntropy(where=(Kind.EXTERNAL,), weight=0.7),
        CrossEntropy(where=(Kind.LEARNER,), weight=0.2),
    )
    batches = pack(mixed, needs=frozenset(), max_tokens=15)
    loss, _ = gradients(learner, batches, StageObjective(terms))
    separate = 0.0
    for term, part in zip(terms, (mixed[:2], mixed[2:]), strict=True):
        alone = pack(part, needs=frozenset(), max_tokens=10_000)
        separate += gradients(learner, alone, StageObjective((term,)))[0]
    assert loss == pytest.approx(separate, abs=1e-6)


def test_a_greedy_answer_does_not_poison_its_micro_batch(learner):
    """A term over other authors' tokens must not care that these were drawn at temperature 0."""
    live = on_policy(random_groups(num_groups=1), learner.policy)
    live = with_column(live, Column.ADVANTAGE, lambda t: np.ones(len(t), np.float32))
    greedy = trajectory([7, 8], [9, 10], kind=Kind.LEARNER, temperature=0.0)
    member = Scored(trajectory=greedy)
    both = [*live, *on_policy([Group(task="test/0", members=(member,))], learner.policy)]
    both = with_column(both, Column.ADVANTAGE, lambda t: np.ones(len(t), np.float32))
    objective = StageObjective((ClippedPolicyGradient(),))
    whole = pack(both, needs=objective.needs, max_tokens=10_000)
    loss, grads = gradients(learner, whole, objective)
    assert math.isfinite(loss)
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())
    split = pack(both, needs=objective.needs, max_tokens=1)
    _, apart = gradients(learner, split, objective)
    assert largest_gap(grads, apart) < 1e-5
