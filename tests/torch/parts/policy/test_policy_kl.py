"""KL estimators at gradient level, the optimum that they lead to, entropy, and KL-Cov."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from material import trajectory, with_column

from posttrain.core.config import checked
from posttrain.core.errors import ConfigError
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.shaping import KLPenalty
from posttrain.parts.policy.losses import PolicyGradient
from posttrain.parts.policy.regularisers import EntropyBonus, LogRatioPenalty, ReferenceKL
from posttrain.testing import check_term, fake_tools

REFERENCE = torch.tensor([0.15, 0.5, 0.25, 0.1], dtype=torch.float64).log()
REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
BETA = 0.4
TOOLS = fake_tools()


def every_answer(rewards=REWARDS):
    """One group with each of the four answers once: sums over it are exact expectations."""
    members = tuple(
        Scored(trajectory=trajectory([1], [a])).with_columns(
            {Column.REWARD: np.array(float(rewards[a]))}
        )
        for a in range(4)
    )
    return [Group(task="test/0", members=members)]


def column(groups, name, values):
    left = iter(values.tolist())
    return with_column(groups, name, lambda t: np.array([np.nan, next(left)]))


def batch_of(groups, term):
    """The packed batch, its columns again in float64."""
    (batch,) = pack(groups, needs=term.needs, max_tokens=99)
    exact = {
        c: torch.tensor([float(m.columns[c][-1]) for m in groups[0].members], dtype=torch.float64)
        for c in term.needs
    }
    return replace(batch, columns=exact)


def expected_loss(term, logits, groups, behaviour):
    """Σ_a behaviour(a) · loss(a), with gradients through the policy only."""
    policy = logits.log_softmax(-1)
    stats = {
        Stat.LOGPROB: policy,
        Stat.SAMPLED_LOGPROB: policy,
        Stat.ENTROPY: -(policy.exp() * policy).sum().expand(4),
    }
    values = term.values(stats, batch_of(groups, term))
    return (behaviour.exp() * values.loss).sum()


def scored(behaviour):
    groups = column(every_answer(), Column.BEHAVIOUR_LOGPROB, behaviour)
    return column(groups, Column.REFERENCE_LOGPROB, REFERENCE)


def gradient(value, logits):
    (out,) = torch.autograd.grad(value, logits)
    return out


def logits_at(seed):
    torch.manual_seed(seed)
    return torch.randn(4, dtype=torch.float64, requires_grad=True)


def exact_kl_gradient(logits, *, forward=False):
    policy = logits.log_softmax(-1)
    a, b = (REFERENCE, policy) if forward else (policy, REFERENCE)
    return gradient((a.exp() * (a - b)).sum(), logits)


@pytest.mark.parametrize("seed", range(3))
def test_estimators_in_the_loss_have_the_gradients_they_claim(seed):
    logits = logits_at(seed)
    fresh = logits.detach().log_softmax(-1)
    old = logits_at(seed + 50).detach().log_softmax(-1)
    reverse, forward = exact_kl_gradient(logits), exact_kl_gradient(logits, forward=True)
    for behaviour in (fresh, old):  # with the ratio they hold off-policy too
        for name in ("k3", "k2"):
            loss = expected_loss(ReferenceKL(estimator=name), logits, scored(behaviour), behaviour)
            np.testing.assert_allclose(gradient(loss, logits), reverse, atol=1e-12)
    naive = ReferenceKL(estimator="k3_without_ratio")
    got = gradient(expected_loss(naive, logits, scored(fresh), fresh), logits)
    np.testing.assert_allclose(got, forward, atol=1e-12)
    assert float((got - reverse).abs().max()) > 1e-2


def test_values_of_the_estimators():
    logits = logits_at(1)
    policy = logits.detach().log_softmax(-1)
    kl = float((policy.exp() * (policy - REFERENCE)).sum())
    for name in ("k3", "k3_without_ratio"):
        term = ReferenceKL(estimator=name)
        got = expected_loss(term, logits.detach(), scored(policy), policy)
        assert float(got) == pytest.approx(kl)
    squares = float((policy.exp() * (policy - REFERENCE) ** 2 / 2).sum())
    got = expected_loss(ReferenceKL(estimator="k2"), logits.detach(), scored(policy), policy)
    assert float(got) == pytest.approx(squares)


def test_k1_as_a_loss_is_no_option():
    with pytest.raises(ConfigError, match="k1"):
        checked(ReferenceKL(estimator="k1"))


@pytest.mark.parametrize("seed", range(3))
def test_k1_in_the_reward_has_the_gradient_of_the_kl(seed):
    logits = logits_at(seed)
    behaviour = logits.detach().log_softmax(-1)
    groups = with_column(scored(behaviour), Column.REWARD, lambda t: np.array(0.0))
    groups = KLPenalty(beta=BETA).score(groups, TOOLS)
    credit = GroupAdvantage(baseline="constant", value=0.0, scale="none")
    groups = credit.score(groups, TOOLS)
    got = gradient(expected_loss(PolicyGradient(), logits, groups, behaviour), logits)
    np.testing.assert_allclose(got, BETA * exact_kl_gradient(logits), atol=1e-7)


def climbed(loss_at, *, steps=400, lr=3.0):
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        behaviour = logits.detach().log_softmax(-1)
        grad = gradient(loss_at(logits, behaviour), logits)
        # Natural gradient of a softmax: divided by the probabilities it converges in few steps.
        with torch.no_grad():
            logits -= lr * 0.1 * grad / behaviour.exp()
    return logits.detach().softmax(-1)


OPTIMUM = (REFERENCE + REWARDS / BETA).softmax(-1)
"""max E[R] − β KL(π ‖ q) has π ∝ q exp(R / β) (arXiv 2205.11275)."""
CREDIT = GroupAdvantage(baseline="constant", value=0.5, scale="none")


def test_the_regularised_bandit_ends_at_its_known_optimum():
    """Three ways to say the same objective, all through our signals and terms."""

    def in_reward(logits, behaviour):
        groups = KLPenalty(beta=BETA).score(scored(behaviour), TOOLS)
        credited = CREDIT.score(groups, TOOLS)
        return expected_loss(PolicyGradient(), logits, credited, behaviour)

    def in_loss(estimator):
        def loss(logits, behaviour):
            groups = CREDIT.score(scored(behaviour), TOOLS)
            kl = expected_loss(ReferenceKL(estimator=estimator), logits, groups, behaviour)
            return expected_loss(PolicyGradient(), logits, groups, behaviour) + BETA * kl

        return loss

    np.testing.assert_allclose(climbed(in_reward), OPTIMUM, atol=1e-6)
    np.testing.assert_allclose(climbed(in_loss("k2")), OPTIMUM, atol=1e-6)
    np.testing.assert_allclose(climbed(in_loss("k3")), OPTIMUM, atol=1e-6)
    # GRPO's own KL term is another objective, and ends elsewhere.
    elsewhere = climbed(in_loss("k3_without_ratio"))
    assert float((elsewhere - OPTIMUM).abs().max()) > 0.02


def test_entropy_bonus_pulls_to_the_uniform_policy():
    logits = logits_at(0)
    behaviour = logits.detach().log_softmax(-1)
    policy = logits.log_softmax(-1)
    want = gradient((policy.exp() * policy).sum(), logits)
    got = gradient(expected_loss(EntropyBonus(), logits, scored(behaviour), behaviour), logits)
    np.testing.assert_allclose(got, want, atol=1e-12)
    uniform = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    flat = uniform.detach().log_softmax(-1)
    still = gradient(expected_loss(EntropyBonus(), uniform, scored(flat), flat), uniform)
    np.testing.assert_allclose(still, 0, atol=1e-12)


def test_log_ratio_penalty_acts_on_marked_tokens_that_moved():
    logits = logits_at(2)
    policy = logits.log_softmax(-1)
    old = logits_at(7).detach().log_softmax(-1)
    marks = torch.tensor([1.0, 0.0, 0.0, 1.0])
    groups = column(scored(old), Column.MARK, marks)
    want = ((policy - old).abs() * marks * old.exp()).sum()
    got = expected_loss(LogRatioPenalty(), logits, groups, old)
    assert float(got.detach()) == pytest.approx(float(want.detach()))
    np.testing.assert_allclose(gradient(got, logits), gradient(want, logits), atol=1e-12)
    fresh = policy.detach()
    same = column(scored(fresh), Column.MARK, marks)
    still = gradient(expected_loss(LogRatioPenalty(), logits, same, fresh), logits)
    assert (still == 0).all()


@pytest.mark.parametrize(
    "term",
    [
        ReferenceKL(),
        ReferenceKL(estimator="k2", aggregate="sequence_mean"),
        ReferenceKL(estimator="k3_without_ratio", aggregate="sequence_sum"),
        EntropyBonus(),
        LogRatioPenalty(),
    ],
)
def test_every_regulariser_keeps_the_contract_of_terms(term):
    check_term(term)
