"""Numbers per kind of author: worked out by hand, and the same however a step is split."""

import numpy as np
import pytest
import torch
from material import random_groups, with_column

from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import KINDS, pack
from posttrain.training.authors import author_metrics, author_sums


@pytest.fixture
def groups():
    """Text of the learner, of a teacher, and of people, whose behaviour nobody knows."""
    rng = np.random.default_rng(3)
    mixed = [
        *random_groups(num_groups=2, seed=1),
        *random_groups(num_groups=1, seed=2, kind=Kind.TEACHER),
        *random_groups(num_groups=1, seed=3, kind=Kind.HUMAN),
    ]

    def behaviour(trajectory):
        if any(s.producer.kind is Kind.HUMAN for s in trajectory.spans):
            return np.full(len(trajectory), np.nan, np.float32)
        return rng.normal(-2, 0.5, len(trajectory)).astype(np.float32)

    return with_column(mixed, Column.BEHAVIOUR_LOGPROB, behaviour)


def stats_of(batch):
    """Log-probs and entropies that are a function of the token, so that splits cannot matter."""
    logprob = -0.05 * batch.target_N.float()
    return {
        Stat.LOGPROB: logprob,
        Stat.SAMPLED_LOGPROB: logprob,
        Stat.ENTROPY: 0.01 * batch.target_N.float(),
    }


NEEDS = {Column.BEHAVIOUR_LOGPROB: frozenset({Kind.LEARNER, Kind.TEACHER})}


V = 4  # tokens above 27 are less likely than by chance


def metrics(groups, *, max_tokens):
    total = {}
    for batch in pack(groups, needs=NEEDS, max_tokens=max_tokens):
        for name, value in author_sums(batch, stats_of(batch), vocab_size=V).items():
            total[name] = total.get(name, 0.0) + value
    return author_metrics(total)


def metrics_of(batch, stats):
    return author_metrics(author_sums(batch, stats, vocab_size=V))


def test_by_hand(groups):
    (batch,) = pack(groups, needs=NEEDS, max_tokens=10_000)
    seen = metrics(groups, max_tokens=10_000)
    stats = {k: v.double().numpy() for k, v in stats_of(batch).items()}
    behaviour = batch.columns[Column.BEHAVIOUR_LOGPROB].double().numpy()
    for kind in (Kind.LEARNER, Kind.TEACHER, Kind.HUMAN):
        own = batch.kind_N.numpy() == KINDS.index(kind)
        at = f"authors/{kind}/"
        assert seen[f"{at}share"] == pytest.approx(own.mean(), rel=1e-6)
        assert seen[f"{at}nll"] == pytest.approx(-stats[Stat.LOGPROB][own].mean(), rel=1e-5)
        unlikely = stats[Stat.LOGPROB][own] < -np.log(V)
        assert seen[f"{at}unlikely"] == pytest.approx(unlikely.mean(), rel=1e-6)
        assert seen[f"{at}entropy"] == pytest.approx(stats[Stat.ENTROPY][own].mean(), rel=1e-5)
        if kind is Kind.HUMAN:
            assert f"{at}ratio" not in seen, "nobody knows how likely this text was to its author"
            continue
        weights = np.exp(stats[Stat.SAMPLED_LOGPROB][own] - behaviour[own])
        assert seen[f"{at}ratio"] == pytest.approx(weights.mean(), rel=1e-4)
        effective = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
        assert seen[f"{at}effective_share"] == pytest.approx(effective, rel=1e-4)
    assert not any("environment" in name for name in seen)


def test_splitting_a_step_changes_nothing(groups):
    whole, parts = (metrics(groups, max_tokens=n) for n in (10_000, 12))
    assert whole.keys() == parts.keys()
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_equal_policies_have_equal_weights(groups):
    (batch,) = pack(groups, needs=NEEDS, max_tokens=10_000)
    own = batch.only(batch.where({Kind.LEARNER}))
    seen = metrics_of(own, {Stat.SAMPLED_LOGPROB: own.columns[Column.BEHAVIOUR_LOGPROB]})
    assert seen["authors/learner/ratio"] == pytest.approx(1)
    assert seen["authors/learner/effective_share"] == pytest.approx(1)


def test_an_enormous_ratio_stays_finite(groups):
    (batch,) = pack(groups, needs=NEEDS, max_tokens=10_000)
    stats = {Stat.SAMPLED_LOGPROB: torch.full_like(batch.temperature_N, 200.0)}
    assert all(np.isfinite(v) for v in metrics_of(batch, stats).values())
