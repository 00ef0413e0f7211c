"""What a term does not read has no part in its value: neither in the sum nor in the count."""

import pytest
import torch
from material import random_groups

from posttrain.core.provenance import Kind
from posttrain.numerics.batch import pack
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.training.reduce import count_units, reduce_units


def packed(*groups):
    (batch,) = pack(list(groups), needs=frozenset(), max_tokens=10_000)
    return batch


@pytest.fixture
def groups():
    (theirs,) = random_groups(num_groups=1, seed=1, kind=Kind.TEACHER)
    (ours,) = random_groups(num_groups=1, seed=2, kind=Kind.HUMAN)
    return theirs, ours


def reduced(term, values, batch, keep=None):
    count = count_units(term, [batch], keep=[keep])
    return float(reduce_units(term, values, batch, count=count, keep=keep))


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("unread", [5.0, float("inf"), float("nan")])
def test_tokens_of_other_authors_change_nothing(groups, aggregate, unread):
    theirs, ours = groups
    term = CrossEntropy(aggregate=aggregate, where=(Kind.HUMAN,))
    both, alone = packed(theirs, ours), packed(ours)
    read = both.where(frozenset({Kind.HUMAN}))
    assert 0 < int(read.sum()) < len(read)
    values = torch.linspace(0.1, 2.0, int(read.sum()))
    among = torch.full(read.shape, unread)
    among[read] = values
    assert reduced(term, among, both) == pytest.approx(reduced(term, values, alone))


def test_a_mask_of_units_is_a_smaller_batch(groups):
    batch = packed(groups[1])
    values = torch.linspace(0.1, 2.0, len(batch.target_N))
    keep = torch.arange(len(values)) % 2 == 0
    kept = values[keep]
    assert reduced(CrossEntropy(), values, batch, keep) == pytest.approx(float(kept.mean()))


def test_every_sequence_weighs_the_same_whatever_its_length(groups):
    batch = packed(groups[1])
    values = torch.linspace(0.1, 2.0, len(batch.target_N))
    means = [float(values[batch.sequence_N == s].mean()) for s in batch.sequence_N.unique()]
    term = CrossEntropy(aggregate="sequence_mean")
    assert reduced(term, values, batch) == pytest.approx(sum(means) / len(means))
