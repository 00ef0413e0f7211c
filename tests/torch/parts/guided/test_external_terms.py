"""Gradients on others' text under a named assumption, and CHORD's token weight, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import trajectory

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.guided.external import AssumedCertainGradient, AssumedOwnGradient
from posttrain.parts.guided.hybrid import ChordPhi
from posttrain.parts.legality import check_composition
from posttrain.parts.logprobs import OwnLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.likelihood import BalancedCrossEntropy
from posttrain.testing import check_term

P = np.array([0.9, 0.1, 0.02, 0.5, 0.3, 0.6])
OLD = np.array([0.7, 0.1, 0.05, 0.5, 0.2, 0.9])
A = np.array([1.0, 1.0, -0.5, -0.5, 2.0, -2.0])


def evaluate(term, logp):
    members = tuple(Scored(trajectory=trajectory([1], [3] * 3, kind=Kind.EXTERNAL)) for _ in "ab")
    (batch,) = pack([Group(task="test/0", members=members)], needs=frozenset(), max_tokens=999)
    columns = {Column.ADVANTAGE: torch.tensor(A), Column.TRAINER_LOGPROB: torch.tensor(np.log(OLD))}
    return term.values({Stat.LOGPROB: logp}, replace(batch, columns=columns))


def logp():
    return torch.tensor(np.log(P), dtype=torch.float64, requires_grad=True)


FORMULAS = [
    (AssumedCertainGradient(), lambda p: -p / (p + 0.1) * A),
    (AssumedCertainGradient(gamma=0.5), lambda p: -p / (p + 0.5) * A),
    (
        AssumedOwnGradient(clip_low=0.3, clip_high=0.2),
        lambda p: -np.minimum(p / OLD * A, np.clip(p / OLD, 0.7, 1.2) * A),
    ),
]


@pytest.mark.parametrize(("term", "formula"), FORMULAS)
def test_values_and_gradients_are_those_of_the_formulas(term, formula):
    at = logp()
    loss = evaluate(term, at).loss
    np.testing.assert_allclose(loss.detach().numpy(), formula(P), rtol=1e-12)
    loss.sum().backward()
    step = 1e-6
    up, down = (formula(np.exp(np.log(P) + s * step)) for s in (1, -1))
    np.testing.assert_allclose(at.grad.numpy(), (up - down) / (2 * step), rtol=1e-5, atol=1e-9)


def test_the_shaped_gradient_in_closed_form_is_largest_at_gamma():
    """−A γ p / (p + γ)² per unit of log π."""
    at = logp()
    evaluate(AssumedCertainGradient(gamma=0.1), at).loss.sum().backward()
    np.testing.assert_allclose(at.grad.numpy(), -A * 0.1 * P / (P + 0.1) ** 2, rtol=1e-12)
    sizes = 0.1 * P / (P + 0.1) ** 2
    assert P[sizes.argmax()] == 0.1


def test_on_the_first_update_an_assumed_own_token_has_the_gradient_of_reinforce():
    at = torch.tensor(np.log(OLD), dtype=torch.float64, requires_grad=True)
    evaluate(AssumedOwnGradient(), at).loss.sum().backward()
    np.testing.assert_allclose(at.grad.numpy(), -A, rtol=1e-12)


def test_balanced_cross_entropy_by_hand():
    at = logp()
    out = evaluate(BalancedCrossEntropy(), at)
    np.testing.assert_allclose(out.loss.detach().numpy(), -P * (1 - P) * np.log(P), rtol=1e-12)
    out.loss.sum().backward()
    # the weight is a constant: only log p has a gradient
    np.testing.assert_allclose(at.grad.numpy(), -P * (1 - P), rtol=1e-12)
    sure = torch.tensor([math.log(1 - 1e-12), -40.0], dtype=torch.float64)
    values = BalancedCrossEntropy().values({Stat.LOGPROB: sure}, None).loss
    assert float(values.abs().max()) < 1e-10


@pytest.mark.parametrize(
    "term", [AssumedCertainGradient(), AssumedOwnGradient(), BalancedCrossEntropy()]
)
def test_contract(term):
    check_term(term)


DATA = Dataset(path="x.jsonl", reward="score")


def test_a_plain_ratio_on_a_demonstration_stays_refused_and_an_assumption_is_needed():
    def composed(term, *signals):
        return Composition(source=DATA, signals=(*signals, credit), terms=(term,))

    credit = GroupAdvantage(baseline="batch_mean", scale="none")
    with pytest.raises(LegalityError, match="needs behaviour_logprob"):
        check_composition(composed(ClippedPolicyGradient()), stage="s")
    check_composition(composed(AssumedCertainGradient()), stage="s")
    check_composition(composed(AssumedOwnGradient(), OwnLogprobs()), stage="s")
    with pytest.raises(LegalityError, match="needs trainer_logprob"):
        check_composition(composed(AssumedOwnGradient()), stage="s")


def test_neither_assumption_is_made_about_the_learner():
    for kind in (AssumedCertainGradient, AssumedOwnGradient):
        composition = Composition(
            source=DATA,
            signals=(OwnLogprobs(), GroupAdvantage(baseline="batch_mean", scale="none")),
            terms=(kind(where=(Kind.LEARNER,)),),
        )
        with pytest.raises(LegalityError, match="where=learner"):
            check_composition(composition, stage="s")


@pytest.mark.parametrize(
    "make",
    [
        lambda: AssumedCertainGradient(gamma=0.0),
        lambda: AssumedOwnGradient(clip_low=0.0),
        lambda: ChordPhi(data=DATA, tasks=("t",), mu=1.0),
    ],
)
def test_options_without_a_meaning(make):
    with pytest.raises(ConfigError):
        make()
