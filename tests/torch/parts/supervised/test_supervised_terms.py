"""Terms on given answers: values by hand, gradients in closed form, identities, traps."""

import math

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, random_groups, trajectory, with_column

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.composition import Composition, method
from posttrain.parts.legality import check_composition
from posttrain.parts.logprobs import OwnLogprobs
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.likelihood import (
    CrossEntropy,
    Dft,
    ProbabilitySft,
    Psft,
    WeightedCrossEntropy,
)
from posttrain.parts.supervised.presets import Asft
from posttrain.testing import fake_tools
from posttrain.training.objective import StageObjective

P = np.array([0.5, 0.05, 0.9])  # π(y) of two answers, of 2 and 1 tokens


def two_answers():
    members = (
        Scored(trajectory=trajectory([1, 2], [3, 4], kind=Kind.EXTERNAL)),
        Scored(trajectory=trajectory([1, 2], [5], kind=Kind.EXTERNAL)),
    )
    return [Group(task="test/0", members=members)]


def scalars(groups, column, numbers):
    left = iter(numbers)
    return with_column(groups, column, lambda t: np.asarray(float(next(left))))


def per_token(groups, column, rows):
    left = iter(rows)
    return with_column(
        groups, column, lambda t: np.array([np.nan] * t.prompt_length + next(left), np.float32)
    )


def evaluate(term, groups=None, p=P):
    """(loss per token, gradient by log π(y)) in float64, and what is shown."""
    (batch,) = pack(groups or two_answers(), needs=term.needs, max_tokens=999)
    logp = torch.tensor(np.log(p), requires_grad=True)
    out = term.values({Stat.LOGPROB: logp}, batch)
    out.loss.sum().backward()
    return out.loss.detach().numpy(), logp.grad.numpy(), out.shown


def external(seed=0):
    return random_groups(kind=Kind.EXTERNAL, seed=seed)


def objective_gradients(learner, term, groups):
    objective = StageObjective((term,))
    return gradients(learner, pack(groups, needs=objective.needs, max_tokens=10_000), objective)


# --- plain -----------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    """By log π(y) the slope is −1; by the logits it is π − 1[y], here against differences."""
    loss, grad, _ = evaluate(CrossEntropy())
    np.testing.assert_allclose(loss, -np.log(P))
    np.testing.assert_array_equal(grad, -1)
    (batch,) = pack(two_answers(), needs=frozenset(), max_tokens=999)
    logits = np.array([0.3, -1.2, 0.8, 0.1])

    def value(z):
        logp = z.log_softmax(-1)[[1, 1, 1]]
        return CrossEntropy().values({Stat.LOGPROB: logp}, batch).loss[0]

    at = torch.tensor(logits, requires_grad=True)
    value(at).backward()
    soft = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(at.grad, soft - np.eye(4)[1], rtol=1e-12)
    assert torch.autograd.gradcheck(value, at, eps=1e-6, atol=1e-7)


# --- weighted --------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "column"), [("weight", Column.WEIGHT), ("reward", Column.REWARD)])
def test_weighted_cross_entropy_by_hand(by, column):
    groups = scalars(two_answers(), column, [2.0, 0.25])
    loss, grad, shown = evaluate(WeightedCrossEntropy(by=by), groups)
    w = np.array([2.0, 2.0, 0.25])
    np.testing.assert_allclose(loss, -w * np.log(P))
    np.testing.assert_allclose(grad, -w)
    np.testing.assert_array_equal(shown[by], w)


def test_weights_of_one_are_cross_entropy(learner):
    groups = with_column(external(), Column.WEIGHT, lambda t: np.asarray(1.0))
    loss, grads = objective_gradients(learner, WeightedCrossEntropy(by="weight"), groups)
    plain, grads_plain = objective_gradients(learner, CrossEntropy(), groups)
    assert loss == pytest.approx(plain, rel=1e-6)
    assert largest_gap(grads, grads_plain) < 1e-6


# --- DFT, and functions of the probability ---------------------------------------------------


def test_dynamic_cross_entropy_by_hand():
    loss, grad, _ = evaluate(Dft())
    np.testing.assert_allclose(loss, -P * np.log(P))
    np.testing.assert_allclose(grad, -P)  # sg: no − log π in it


def test_dft_is_cross_entropy_reweighted_by_the_constant_probability(learner):
    """∇ DFT = Σ_t sg(π_t) ∇ NLL_t, for a real model."""
    _, grads = objective_gradients(learner, Dft(), external())
    model = learner.policy.model
    model.causal.zero_grad(set_to_none=True)
    (batch,) = pack(external(), needs=frozenset(), max_tokens=10_000)
    logp = model.head(model.predicting(batch)).log_softmax(-1)
    written = logp.gather(-1, batch.target_N[:, None])[:, 0]
    constant = written.detach().double().exp().float()
    (-(constant * written).mean()).backward()
    theirs = {n: p.grad for n, p in model.causal.named_parameters() if p.grad is not None}
    assert largest_gap(grads, theirs) < 1e-5
    _, plain = objective_gradients(learner, CrossEntropy(), external())
    assert largest_gap(grads, plain) > 0.1  # it is not the same as no weight


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0, 10.0])
def test_probability_loss_by_hand(alpha):
    loss, grad, _ = evaluate(ProbabilitySft(alpha=alpha))
    np.testing.assert_allclose(loss, (1 - P**alpha) / alpha)
    np.testing.assert_allclose(grad, -(P**alpha), rtol=1e-12, atol=1e-15)
    step = 1e-6
    for i in range(3):  # and by finite differences of the value
        up, down = (P * np.exp(s * step * np.eye(3)[i]) for s in (1, -1))
        change = (
            evaluate(ProbabilitySft(alpha=alpha), p=up)[0]
            - evaluate(ProbabilitySft(alpha=alpha), p=down)[0]
        )
        assert change[i] / (2 * step) == pytest.approx(grad[i], rel=1e-6, abs=1e-9)


def test_probability_loss_meets_its_neighbours():
    tiny, _, _ = evaluate(ProbabilitySft(alpha=1e-9))
    np.testing.assert_allclose(tiny, -np.log(P), rtol=1e-6)  # α → 0 is cross-entropy
    _, one, _ = evaluate(ProbabilitySft(alpha=1.0))
    _, dft, _ = evaluate(Dft())
    np.testing.assert_allclose(one, dft)  # α = 1 has the gradient of DFT


def test_probability_threshold_keeps_likely_tokens_only():
    loss, grad, shown = evaluate(ProbabilitySft(alpha=0.0, at_least=0.5))
    np.testing.assert_allclose(loss, [math.log(2), 0, -math.log(0.9)])
    np.testing.assert_array_equal(grad, [-1, 0, -1])
    np.testing.assert_array_equal(shown["trusted"], [1, 0, 1])


# --- ASFT ------------------------------------------------------------------------------------


def test_asft_without_an_anchor_is_dft():
    data = Dataset(path="rows.jsonl")
    assert Asft(data=data, kl_weight=0.0).compose() == method("dft", data=data).compose()
    check_composition(Asft(data=data).compose(), stage="s")
    with pytest.raises(ConfigError, match="0 or more"):
        Asft(data=data, kl_weight=-0.1)


def test_asft_is_dft_where_it_starts_and_adds_the_forward_kl_elsewhere(learner):
    """KL(anchor ‖ π) has no gradient at π = anchor; its gradient elsewhere is π − anchor."""
    composition = Asft(data=Dataset(path="rows.jsonl"), kl_weight=0.7).compose()
    objective = StageObjective(composition.terms)
    trajectories = [m.trajectory for g in external() for m in g.members]

    def anchored(values):
        left = iter(values)
        return [
            Group(
                task=g.task,
                members=tuple(
                    m.with_columns({Column.TEACHER_IDS: ids, Column.TEACHER_LOGPROBS: logp})
                    for m, (ids, logp) in ((m, next(left)) for m in g.members)
                ),
            )
            for g in external()
        ]

    own = learner.policy.distributions(trajectories, top_k=None)
    _, at_anchor = gradients(
        learner, pack(anchored(own), needs=objective.needs, max_tokens=10_000), objective
    )
    _, dft = objective_gradients(learner, Dft(), external())
    assert largest_gap(at_anchor, dft) < 1e-5

    vocab = learner.policy.model.vocab_size
    flat = [(ids, np.where(np.isnan(logp), logp, -np.log(vocab))) for ids, logp in own]
    (batch,) = pack(anchored(flat), needs=objective.needs, max_tokens=10_000)
    loss, grads = gradients(learner, [batch], objective)
    model = learner.policy.model
    model.causal.zero_grad(set_to_none=True)
    logp = model.head(model.predicting(batch)).log_softmax(-1)
    written = logp.gather(-1, batch.target_N[:, None])[:, 0]
    kl = -math.log(vocab) - logp.mean(-1)  # Σ_v (1/V) log((1/V) / π_v)
    by_hand = (-written.detach().exp() * written + 0.7 * kl).mean()
    by_hand.backward()
    theirs = {n: p.grad for n, p in model.causal.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(float(by_hand.detach()), rel=1e-5)
    assert largest_gap(grads, theirs) < 1e-5


# --- PSFT ------------------------------------------------------------------------------------


def test_proximal_cross_entropy_by_hand():
    old = np.log(P) - np.log([1.1, 0.5, 2.0])  # ratios 1.1, 0.5 and 2
    groups = per_token(two_answers(), Column.TRAINER_LOGPROB, [list(old[:2]), [old[2]]])
    loss, grad, shown = evaluate(Psft(clip_high=0.28), groups)
    np.testing.assert_allclose(loss, [-1.1, -0.5, -1.28], rtol=1e-6)
    np.testing.assert_allclose(grad, [-1.1, -0.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(shown["clipped"], [0, 0, 1])
    # PPO's surrogate with A = 1 and any lower clip is the same number
    ratio = np.array([1.1, 0.5, 2.0])
    for low in (0.1, 0.9):
        ppo = -np.minimum(ratio, np.clip(ratio, 1 - low, 1.28))
        np.testing.assert_allclose(loss, ppo, rtol=1e-6)


def test_psft_starts_as_cross_entropy_and_leaves_it_after_an_update(learner):
    """At the snapshot r = 1 and the gradient is that of NLL; the draw's next update is not."""
    groups = OwnLogprobs().score(external(), fake_tools(learner.policy))
    proximal = Psft(clip_high=0.2)
    loss, grads = objective_gradients(learner, proximal, groups)
    _, plain = objective_gradients(learner, CrossEntropy(), groups)
    assert loss == pytest.approx(-1, abs=1e-5)
    assert largest_gap(grads, plain) < 1e-4
    objective = StageObjective((proximal,))
    batches = pack(groups, needs=objective.needs, max_tokens=10_000)
    reports = [learner.step(batches, objective, lr_scale=5.0) for _ in range(6)]
    assert reports[0].metrics["psft/ratio"] == pytest.approx(1, abs=1e-5)
    assert reports[0].metrics["psft/clipped"] == 0
    assert reports[-1].metrics["psft/clipped"] > 0.2
    assert -1.2 <= reports[-1].loss < -1.05


# --- all of them -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "term",
    [
        WeightedCrossEntropy(by="weight"),
        WeightedCrossEntropy(by="reward", aggregate="sequence_mean"),
        Dft(),
        ProbabilitySft(alpha=2.0, at_least=0.01),
        Psft(),
    ],
    ids=lambda t: type(t).__name__,
)
def test_micro_batches_change_nothing(learner, term):
    rng = np.random.default_rng(5)
    groups = OwnLogprobs().score(external(), fake_tools(learner.policy))
    for column in (Column.WEIGHT, Column.REWARD):
        groups = with_column(groups, column, lambda t: np.asarray(rng.random()))
    objective = StageObjective((term,))
    whole = pack(groups, needs=objective.needs, max_tokens=10_000)
    parts = pack(groups, needs=objective.needs, max_tokens=12)
    assert len(parts) > 3
    loss, grads = gradients(learner, whole, objective)
    loss_parts, grads_parts = gradients(learner, parts, objective)
    assert loss_parts == pytest.approx(loss, rel=1e-6)
    assert largest_gap(grads, grads_parts) < 1e-5


def refused(term, *signals, **data):
    composition = Composition(
        source=Dataset(path="rows.jsonl", **data), signals=signals, terms=(term,)
    )
    with pytest.raises(LegalityError) as caught:
        check_composition(composition, stage="s")
    return str(caught.value)


def test_columns_that_nobody_named_are_asked_for():
    assert "weight: <column>" in refused(WeightedCrossEntropy(by="weight"), reward="score")
    assert "needs reward" in refused(WeightedCrossEntropy(by="reward"), weight="w")
    assert "own_logprobs" in refused(Psft())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ProbabilitySft(alpha=-1.0), "0 or more"),
        (lambda: ProbabilitySft(at_least=1.0), "below 1"),
        (lambda: ProbabilitySft(alpha=0.0), "cross_entropy"),
        (lambda: Psft(clip_high=0.0), "above 0"),
        (lambda: Dataset(path="x", preference=True, reward="r"), "single answers"),
    ],
)
def test_bad_options_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
