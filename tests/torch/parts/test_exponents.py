"""A token that became enormously likelier: no ratio overflows, and what a clip holds back is held.

A demonstration's token may start at e^-120 and be learnt within one draw. Its ratio is infinite in
float32, and an infinite ratio has no gradient but NaN, also where a clip leaves it out.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.guided.external import AssumedOwnGradient
from posttrain.parts.policy.losses import (
    Cispo,
    ClippedPolicyGradient,
    Gmpo,
    Gspo,
    PolicyGradient,
    Sapo,
    Vespo,
)
from posttrain.parts.policy.regularisers import ReferenceKL
from posttrain.parts.supervised.likelihood import Psft

NOW = [-0.1, -1.0, -0.5]
E20 = math.exp(20)


def run(term, *, advantage, was):
    """(loss, gradient) of three tokens of one answer, the first of which ``was`` unlikely."""
    old = torch.tensor([was, *NOW[1:]])
    batch = SimpleNamespace(
        columns={
            Column.ADVANTAGE: torch.full((3,), advantage),
            Column.BEHAVIOUR_LOGPROB: old,
            Column.TRAINER_LOGPROB: old,
            Column.REFERENCE_LOGPROB: old,
        },
        sequence_N=torch.zeros(3, dtype=torch.long),
        num_sequences=1,
    )
    logp = torch.tensor(NOW, requires_grad=True)
    stats = {Stat.LOGPROB: logp, Stat.SAMPLED_LOGPROB: logp}
    loss = term.values(stats, batch).loss
    loss.sum().backward()
    return loss.detach().numpy(), logp.grad.numpy()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("was", [-120.1, -1e4, 0.0])
@pytest.mark.parametrize(
    "term",
    [
        PolicyGradient(),
        ClippedPolicyGradient(),
        ClippedPolicyGradient(dual_clip=3.0),
        Gspo(),
        Gmpo(),
        Cispo(),
        Sapo(),
        Vespo(),
        Psft(),
        AssumedOwnGradient(),
        ReferenceKL(),
        ReferenceKL(estimator="k2"),
        ReferenceKL(estimator="k3_without_ratio"),
    ],
    ids=lambda t: type(t).__name__,
)
def test_loss_and_gradient_stay_finite(term, was, advantage):
    loss, grad = run(term, advantage=advantage, was=was)
    assert np.isfinite(loss).all()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("term", "advantage", "bound"),
    [
        (ClippedPolicyGradient(), 1.0, -1.2),
        (ClippedPolicyGradient(dual_clip=3.0), -1.0, 3.0),
        (AssumedOwnGradient(), 1.0, -1.2),
        (Psft(), 0.0, -1.28),
    ],
)
def test_a_held_token_has_its_bound_and_gradient_zero(term, advantage, bound):
    loss, grad = run(term, advantage=advantage, was=-120.1)
    assert loss[0] == pytest.approx(bound)
    assert grad[0] == 0


def test_an_unclipped_ratio_goes_on_as_a_straight_line():
    """100 nats above the cap: e^20 (1 + 100), with slope e^20."""
    loss, grad = run(PolicyGradient(), advantage=-1.0, was=-120.1)
    assert loss[0] == pytest.approx(E20 * 101, rel=1e-5)
    assert grad[0] == pytest.approx(E20, rel=1e-5)
