"""The head's own gradient: values by numpy in float64, gradients by finite differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from material import random_groups

from posttrain.core.statistics import Stat
from posttrain.numerics import fused, logits
from posttrain.numerics.batch import pack
from posttrain.numerics.head import token_stats
from posttrain.numerics.logits import LinearHead

V, X = 37, 6
ALL = frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB, Stat.ENTROPY})
TEMPERATURES = {"one": [1.0], "mixed": [0.5, 1.0, 2.0, 0.0]}


def situation(temperatures, *, bias=True, scale=0.7):
    (batch,) = pack(random_groups(vocab=V), needs=frozenset(), max_tokens=10_000)
    num = len(batch.target_N)
    rng = np.random.default_rng(0)
    cycle = np.resize(temperatures, num).astype(np.float32)
    batch = replace(batch, temperature_N=torch.from_numpy(cycle))
    arrays = [rng.normal(0, s, d) for s, d in ((1, (num, X)), (1.5, (V, X)), (1, V))]
    hidden, weight, offset = (torch.tensor(a, dtype=torch.float32) for a in arrays)
    leaves = [t.requires_grad_() for t in (hidden, weight, offset)]
    head = LinearHead(weight, offset if bias else None, scale)
    return batch, leaves, head


def by_numpy(batch, leaves, scale):
    """Statistics in float64, from their definitions."""
    hidden, weight, offset = (t.detach().double().numpy() for t in leaves)
    z = scale * (hidden @ weight.T + offset)
    rows, y = np.arange(len(z)), batch.target_N.numpy()
    tau = batch.temperature_N.double().numpy()
    tau = np.where(tau > 0, tau, 1.0)[:, None]

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    sampled = log_softmax(z / tau)
    return {
        Stat.LOGPROB: log_softmax(z)[rows, y],
        Stat.SAMPLED_LOGPROB: sampled[rows, y],
        Stat.ENTROPY: -(np.exp(sampled) * sampled).sum(-1),
    }


def weighted(stats, coefficients):
    return sum((stats[s] * c).sum() for s, c in coefficients.items())


@pytest.fixture(params=["kept", "computed again", "chunks"])
def way(request, monkeypatch):
    """Every way through the function."""
    if request.param != "kept":
        monkeypatch.setattr(fused, "KEEP_ELEMENTS", 0)
    if request.param == "chunks":
        monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 5 * V)


@pytest.mark.parametrize("temperatures", TEMPERATURES.values(), ids=TEMPERATURES)
@pytest.mark.parametrize("wanted", [{Stat.LOGPROB}, {Stat.SAMPLED_LOGPROB}, {Stat.ENTROPY}, ALL])
def test_values_are_those_of_the_definitions(way, temperatures, wanted):
    batch, leaves, head = situation(temperatures)
    stats = token_stats(leaves[0], head, batch, wanted=frozenset(wanted), vocab_size=V)
    assert set(stats) == set(wanted)
    for stat, expected in by_numpy(batch, leaves, head.scale).items():
        if stat in wanted:
            np.testing.assert_allclose(stats[stat].detach().numpy(), expected, atol=3e-6)


@pytest.mark.parametrize("temperatures", TEMPERATURES.values(), ids=TEMPERATURES)
def test_gradients_are_finite_differences(way, temperatures):
    batch, leaves, head = situation(temperatures)
    rng = np.random.default_rng(1)
    coefficients = {s: rng.normal(size=len(batch.target_N)) for s in sorted(ALL)}
    stats = token_stats(leaves[0], head, batch, wanted=ALL, vocab_size=V)
    weighted(stats, {s: torch.tensor(c, dtype=torch.float32) for s, c in coefficients.items()}
             ).backward()  # fmt: skip
    step = 1e-6
    for leaf in leaves:
        flat = leaf.detach().double().reshape(-1)
        for index in rng.choice(flat.numel(), 12, replace=False):
            sides = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[index] += sign * step
                others = [moved.reshape(leaf.shape) if t is leaf else t for t in leaves]
                sides.append(weighted(by_numpy(batch, others, head.scale), coefficients))
            expected = (sides[0] - sides[1]) / (2 * step)
            assert float(leaf.grad.reshape(-1)[index]) == pytest.approx(expected, abs=2e-4)


def test_entropy_without_a_gradient_costs_the_log_prob_none():
    """Metrics read the entropy detached: only what was asked for is in the gradient."""
    batch, leaves, head = situation([1.0])
    for wanted in (ALL, frozenset({Stat.LOGPROB})):
        stats = token_stats(leaves[0], head, batch, wanted=wanted, vocab_size=V)
        leaves[1].grad = None
        stats[Stat.LOGPROB].sum().backward()
        found = leaves[1].grad.clone()
        logp = head(leaves[0]).log_softmax(-1).gather(-1, batch.target_N[:, None])
        (expected,) = torch.autograd.grad(logp.sum(), leaves[1])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_second_backward_pass_gives_the_same_gradient():
    batch, leaves, head = situation([1.0])
    stats = token_stats(leaves[0], head, batch, wanted=ALL, vocab_size=V)
    total = stats[Stat.LOGPROB].square().sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_gives_the_same_one(way):
    batch, (hidden, weight, offset), head = situation([1.0])
    stats = token_stats(hidden, head, batch, wanted=ALL, vocab_size=V)
    (expected,) = torch.autograd.grad(stats[Stat.LOGPROB].sum(), hidden)
    frozen = LinearHead(weight.detach(), offset.detach(), head.scale)
    stats = token_stats(hidden, frozen, batch, wanted=ALL, vocab_size=V)
    stats[Stat.LOGPROB].sum().backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None


def test_any_other_head_takes_the_other_way_to_the_same_numbers():
    batch, leaves, head = situation([0.5, 1.0])
    ours = token_stats(leaves[0], head, batch, wanted=ALL, vocab_size=V)
    theirs = token_stats(leaves[0], lambda h: head(h), batch, wanted=ALL, vocab_size=V)
    for stat in ALL:
        torch.testing.assert_close(ours[stat], theirs[stat], atol=3e-6, rtol=1e-5)


def test_bfloat16_is_as_close_as_its_precision():
    batch, leaves, _ = situation([1.0], bias=False)
    half = [t.detach().bfloat16().requires_grad_() for t in leaves[:2]]
    stats = token_stats(half[0], LinearHead(half[1], None, 0.7), batch, wanted=ALL, vocab_size=V)
    stats[Stat.LOGPROB].sum().backward()
    logp = LinearHead(half[1], None, 0.7)(half[0]).log_softmax(-1)
    expected = torch.autograd.grad(logp.gather(-1, batch.target_N[:, None]).sum(), half)
    for leaf, grad in zip(half, expected, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        assert (leaf.grad - grad).abs().max() <= 0.03 * grad.abs().max()
