"""Policy losses against their papers' formulas, in float64 and without our code."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, on_policy, random_groups, trajectory, with_column

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.policy.losses import (
    Cispo,
    ClippedPolicyGradient,
    Gmpo,
    Gspo,
    PolicyGradient,
    Sapo,
    Vespo,
)
from posttrain.testing import check_term, fake_tools
from posttrain.training.objective import StageObjective
from posttrain.training.reduce import count_units, reduce_units

LENGTHS = [3, 1, 2, 4]
ADVANTAGES = [1.5, -0.7, -2.0, 0.4]
RATIOS = [1.5, 0.7, 1.05, 6.0, 0.5, 1.3, 0.9, 1.0, 2.0, 0.2]  # no two clips of a term coincide


def material(columns, *, lengths=LENGTHS):
    """A float64 batch of sequences of these lengths, with flat columns over their tokens."""
    members = tuple(Scored(trajectory=trajectory([1, 2], [3] * n)) for n in lengths)
    (batch,) = pack([Group(task="test/0", members=members)], needs=frozenset(), max_tokens=10_000)
    tensors = {c: torch.tensor(v, dtype=torch.float64) for c, v in columns.items()}
    return replace(batch, columns=tensors)


def spread(per_sequence, lengths=LENGTHS):
    return [a for a, n in zip(per_sequence, lengths, strict=True) for _ in range(n)]


BEHAVIOUR = np.linspace(-2.0, -0.3, 10)


def batch():
    return material({Column.BEHAVIOUR_LOGPROB: BEHAVIOUR, Column.ADVANTAGE: spread(ADVANTAGES)})


def evaluate(term, logp, at=None):
    stats = {Stat.SAMPLED_LOGPROB: logp, Stat.ENTROPY: torch.zeros(len(logp))}
    return term.values(stats, batch() if at is None else at)


def loss_of(term, logp, at=None):
    at = batch() if at is None else at
    loss_N = evaluate(term, logp, at).loss
    return reduce_units(term, loss_N, at, count=count_units(term, [at]))


def logp_at(ratios=RATIOS):
    return torch.tensor(BEHAVIOUR + np.log(ratios), dtype=torch.float64, requires_grad=True)


def by_sequence(values):
    return np.split(np.asarray(values), np.cumsum(LENGTHS)[:-1])


def clip(x, low, high):
    return max(low, min(high, x))


def ppo(r, a, low=0.2, high=0.2):
    return -min(r * a, clip(r, 1 - low, 1 + high) * a)


def test_aggregates_by_hand():
    values = torch.arange(10, dtype=torch.float64)
    sums = [sum(v) for v in by_sequence(range(10))]
    for aggregate, want in {
        "token_mean": 45 / 10,
        "sequence_mean": np.mean([s / n for s, n in zip(sums, LENGTHS, strict=True)]),
        "sequence_sum": 45 / 4,
    }.items():
        term = PolicyGradient(aggregate=aggregate)
        got = reduce_units(term, values, batch(), count=count_units(term, [batch()]))
        assert float(got) == pytest.approx(want)
    term = PolicyGradient(aggregate="sequence_sum")  # a number to show is never summed
    shown = reduce_units(term, torch.ones(10), batch(), count=4, shown=True)
    assert float(shown) == pytest.approx(1)


def test_policy_gradient_and_clip_by_hand():
    rows = list(zip(RATIOS, spread(ADVANTAGES), strict=True))
    got = evaluate(PolicyGradient(), logp_at()).loss
    np.testing.assert_allclose(got.detach(), [-r * a for r, a in rows])
    term = ClippedPolicyGradient(clip_low=0.3, clip_high=0.28)
    got = evaluate(term, logp_at())
    np.testing.assert_allclose(got.loss.detach(), [ppo(r, a, 0.3, 0.28) for r, a in rows])


def test_dual_clip_is_two_sided_clip():
    """max(min(rA, clip A), cA) for A < 0, and clamping r at δ = c: one formula each, one loss."""
    rows = list(zip(RATIOS, spread(ADVANTAGES), strict=True))
    dual = [-max(-ppo(r, a), 3.0 * a) if a < 0 else ppo(r, a) for r, a in rows]
    two_sided = [-min(min(r, 3.0) * a, clip(r, 0.8, 1.2) * a) for r, a in rows]
    np.testing.assert_allclose(dual, two_sided)
    logp = logp_at()
    out = evaluate(ClippedPolicyGradient(dual_clip=3.0), logp)
    np.testing.assert_allclose(out.loss.detach(), dual)
    assert dual != [ppo(r, a) for r, a in rows]  # the bound is reached: ratio 6 with A < 0
    out.loss.sum().backward()
    assert float(logp.grad[3]) == 0  # and where it is, the gradient is gone


def test_sequence_mask_drops_bad_sequences_that_the_policy_left():
    left = [-np.mean(np.log(r)) for r in by_sequence(RATIOS)]
    masked = [a < 0 and d > 0.1 for a, d in zip(ADVANTAGES, left, strict=True)]
    assert masked == [False, False, True, False]
    plain = evaluate(ClippedPolicyGradient(), logp_at()).loss.detach().numpy()
    got = evaluate(ClippedPolicyGradient(sequence_mask=0.1), logp_at())
    np.testing.assert_allclose(got.loss.detach(), np.where(spread(masked), 0, plain))
    np.testing.assert_array_equal(got.shown["masked"], spread(masked))


def test_sequence_policy_gradient_by_hand():
    s = [math.exp(np.mean(np.log(r))) for r in by_sequence(RATIOS)]
    per_sequence = [ppo(x, a, 0.1, 0.15) for x, a in zip(s, ADVANTAGES, strict=True)]
    term = Gspo(clip_low=0.1, clip_high=0.15)
    assert float(loss_of(term, logp_at()).detach()) == pytest.approx(np.mean(per_sequence))
    weighted = np.dot(per_sequence, LENGTHS) / 4  # LUSPO: times the sequence's length
    luspo = Gspo(clip_low=0.1, clip_high=0.15, aggregate="sequence_sum")
    assert float(loss_of(luspo, logp_at()).detach()) == pytest.approx(weighted)


def test_geometric_policy_gradient_by_hand():
    """The paper's way: sign the log-ratios, clip both sides, keep the smaller, unsign, average."""
    per_sequence = []
    for ratios, a in zip(by_sequence(RATIOS), ADVANTAGES, strict=True):
        sign = 1 if a > 0 else -1
        signed = [sign * math.log(r) for r in ratios]
        kept = [sign * min(x, clip(x, -0.3, 0.3)) for x in signed]
        per_sequence.append(-a * math.exp(np.mean(kept)))
    term = Gmpo(clip_low=0.3, clip_high=0.3)
    assert float(loss_of(term, logp_at()).detach()) == pytest.approx(np.mean(per_sequence))


def test_clipped_weight_bounds_are_absolute_and_keep_every_gradient():
    logp = logp_at()
    term = Cispo(ratio_low=0.6, ratio_high=1.4)
    out = evaluate(term, logp)
    weights = np.clip(RATIOS, 0.6, 1.4)
    want = -weights * np.array(spread(ADVANTAGES))
    np.testing.assert_allclose(out.loss.detach(), want * logp.detach().numpy())
    out.loss.sum().backward()
    np.testing.assert_allclose(logp.grad, want)
    assert (logp.grad != 0).all()
    np.testing.assert_array_equal(out.shown["clipped"], weights != RATIOS)


def test_soft_gate_by_hand():
    term = Sapo(temperature_up=0.8, temperature_down=2.0)
    logp = logp_at()
    out = evaluate(term, logp)
    taus = [0.8 if a > 0 else 2.0 for a in spread(ADVANTAGES)]
    rows = list(zip(RATIOS, spread(ADVANTAGES), taus, strict=True))
    want = [-4 / t / (1 + math.exp(-t * (r - 1))) * a for r, a, t in rows]
    np.testing.assert_allclose(out.loss.detach(), want, rtol=1e-6)
    out.loss.sum().backward()
    sig = [1 / (1 + math.exp(-t * (r - 1))) for r, _, t in rows]
    slopes = [-4 * s * (1 - s) * a * r for (r, a, _), s in zip(rows, sig, strict=True)]
    np.testing.assert_allclose(logp.grad, slopes, rtol=1e-6)


def test_shaped_weight_by_hand():
    logp = logp_at()
    out = evaluate(Vespo(), logp)
    weights = []
    for ratios, a in zip(by_sequence(RATIOS), ADVANTAGES, strict=True):
        w, (k, lam) = np.prod(ratios), (2.0, 3.0) if a > 0 else (3.0, 2.0)
        weights += [w**k * math.exp(lam * (1 - w))] * len(ratios)
    want = -np.array(weights) * spread(ADVANTAGES)
    out.loss.sum().backward()
    np.testing.assert_allclose(logp.grad, want, rtol=1e-6)
    np.testing.assert_allclose(out.loss.detach(), want * logp.detach().numpy(), rtol=1e-6)
    far = torch.tensor(BEHAVIOUR + 400.0, requires_grad=True)
    gone = evaluate(Vespo(), far).loss
    assert (gone == 0).all()  # and not inf or nan


DIFFERENTIABLE = [
    PolicyGradient(aggregate="sequence_sum"),
    ClippedPolicyGradient(dual_clip=3.0, sequence_mask=0.1),
    Gspo(clip_low=0.1, clip_high=0.15),
    Gspo(clip_low=0.1, clip_high=0.15, aggregate="sequence_sum"),
    Gmpo(clip_low=0.3, clip_high=0.3),
    Sapo(),
]


@pytest.mark.parametrize("term", DIFFERENTIABLE, ids=lambda t: type(t).__name__)
def test_gradients_by_finite_differences(term):
    logp = logp_at()
    loss_of(term, logp).backward()
    step = 1e-6
    with torch.no_grad():
        slopes = [
            (loss_of(term, logp + d) - loss_of(term, logp - d)) / (2 * step)
            for d in torch.eye(10, dtype=torch.float64) * step
        ]
    np.testing.assert_allclose(logp.grad, torch.stack(slopes), atol=1e-8)


LOSSES = [
    PolicyGradient(aggregate="sequence_mean"),
    ClippedPolicyGradient(aggregate="sequence_mean", dual_clip=3.0, sequence_mask=0.5),
    Gspo(),
    Gmpo(),
    Cispo(aggregate="sequence_mean"),
    Sapo(),
    Vespo(aggregate="sequence_mean"),
]


def rewarded(groups, *, seed=0):
    rng = np.random.default_rng(seed)
    return with_column(groups, Column.REWARD, lambda t: np.array(float(rng.integers(0, 2))))


@pytest.mark.parametrize("term", LOSSES, ids=lambda t: type(t).__name__)
def test_on_policy_every_loss_is_reinforce(learner, term):
    groups = rewarded(on_policy(random_groups(), learner.policy))
    groups = GroupAdvantage().score(groups, fake_tools())
    objective = StageObjective((term,))
    batches = pack(groups, needs=objective.needs, max_tokens=10_000)
    _, grads = gradients(learner, batches, objective)

    model, (one,) = learner.policy.model, batches
    model.causal.zero_grad(set_to_none=True)
    logp = model.head(model.predicting(one)).log_softmax(-1)
    written = logp.gather(-1, one.target_N[:, None])[:, 0]
    gain = one.columns[Column.ADVANTAGE] * written
    means = [gain[one.sequence_N == s].mean() for s in range(one.num_sequences)]
    (-torch.stack(means).mean()).backward()
    reinforce = {n: p.grad for n, p in model.causal.named_parameters() if p.grad is not None}
    assert largest_gap(grads, reinforce) < 1e-5


@pytest.mark.parametrize("term", LOSSES, ids=lambda t: type(t).__name__)
def test_equal_rewards_leave_every_weight_alone(learner, term):
    groups = on_policy(random_groups(), learner.policy)
    groups = with_column(groups, Column.REWARD, lambda t: np.array(0.1 + 0.2))
    groups = GroupAdvantage(baseline="leave_one_out").score(groups, fake_tools())
    objective = StageObjective((term,))
    batches = pack(groups, needs=objective.needs, max_tokens=10_000)
    _, grads = gradients(learner, batches, objective)
    assert all(float(g.abs().max()) == 0 for g in grads.values())


def test_grpo_is_dr_grpo_times_a_constant_when_stds_and_lengths_are_equal(learner):
    prompts, longest = ([7, 8, 9], [10, 11]), 8
    groups = [
        Group(
            task="test/0",
            members=tuple(Scored(trajectory=trajectory(p, [20 + i, 21, 22])) for i in range(4)),
        )
        for p in prompts
    ]
    rewards = iter([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 1.0, 2.0])  # both of std 1/2
    groups = with_column(groups, Column.REWARD, lambda t: np.array(next(rewards)))
    groups = on_policy(groups, learner.policy)
    found = {}
    for scale, term in {
        "std": ClippedPolicyGradient(aggregate="sequence_mean"),
        "none": ClippedPolicyGradient(aggregate="sequence_sum", weight=1 / longest),
    }.items():
        scored = GroupAdvantage(scale=scale).score(groups, fake_tools())
        objective = StageObjective((term,))
        batches = pack(scored, needs=objective.needs, max_tokens=10_000)
        _, found[scale] = gradients(learner, batches, objective)
    factor = 1 / (0.5 + 1e-6) * longest / 3
    scaled = {n: g * factor for n, g in found["none"].items()}
    assert largest_gap(found["std"], scaled) < 1e-5


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "sequence_sum"])
def test_no_aggregate_depends_on_how_a_step_is_split(learner, aggregate):
    objective = StageObjective((ClippedPolicyGradient(aggregate=aggregate),))
    groups = rewarded(on_policy(random_groups(), learner.policy))
    groups = GroupAdvantage().score(groups, fake_tools())
    whole = pack(groups, needs=objective.needs, max_tokens=10_000)
    parts = pack(groups, needs=objective.needs, max_tokens=12)
    assert len(whole) == 1
    assert len(parts) > 3
    loss, grads = gradients(learner, whole, objective)
    loss_parts, grads_parts = gradients(learner, parts, objective)
    # On-policy the loss is 0, a sum of terms of size 1 that cancel: the ratios' rounding is left.
    assert loss_parts == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert largest_gap(grads, grads_parts) < 1e-5


def one_per_sequence(t):
    return np.full(len(t), float(t.tokens.sum() % 7) - 2.5, np.float32)


@pytest.mark.parametrize("term", LOSSES, ids=lambda t: type(t).__name__)
def test_every_loss_keeps_the_contract_of_terms(term):
    check_term(term, columns={Column.ADVANTAGE: one_per_sequence})


@pytest.mark.parametrize("term", [Gspo(), Gmpo()])
def test_a_loss_per_sequence_refuses_an_advantage_per_token(term):
    uneven = material({Column.BEHAVIOUR_LOGPROB: BEHAVIOUR, Column.ADVANTAGE: np.arange(10.0)})
    with pytest.raises(LegalityError, match="different advantages"):
        evaluate(term, logp_at(), uneven)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClippedPolicyGradient(clip_low=0.0), "clip_low=0.0"),
        (lambda: ClippedPolicyGradient(dual_clip=1.1), "dual_clip=1.1"),
        (lambda: ClippedPolicyGradient(sequence_mask=-1.0), "sequence_mask is -1.0"),
        (lambda: Gspo(clip_high=-1.0), "clip_high is -1.0"),
        (lambda: Gmpo(clip_low=0.0), "clip_low is 0.0"),
        (lambda: Cispo(ratio_high=0.28), "epsilon of 0.28 is"),
        (lambda: Sapo(temperature_up=0.0), "temperature_up is 0.0"),
        (lambda: Vespo(up=(0.0, 1.0)), r"up\[0\] is 0.0"),
    ],
)
def test_options_that_cannot_work_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
