"""Packed, prefix-shared computation equals the model library's own, one sequence at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, on_policy, random_groups, trajectory, with_column
from transformers import AutoModelForCausalLM

from posttrain.core.errors import LegalityError
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack, pack_trajectories
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.regularisers import ReferenceKL
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import tiny_model
from posttrain.training.objective import StageObjective
from posttrain.training.stage import micro_batches


def stock_logprobs(folder, sequence):
    """[T] log-prob of each token given those before it, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
    logp = logits.log_softmax(-1)
    return [float("nan")] + [float(logp[i, t]) for i, t in enumerate(sequence[1:])]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_equals_unpacked(family, tied, tmp_path, engine):
    folder = tiny_model(tmp_path / "m", family=family, tied=tied, seed=3)
    policy = engine.policy(str(folder))
    prompt, other = [7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21]
    sequences = [
        trajectory(prompt, [30, 31, 32]),
        trajectory(prompt, [33]),
        trajectory(other, [30, 31, 32, 33, 34, 35, 36]),
        trajectory([], [30, 31, 32]),
    ]
    for t, values in zip(sequences, policy.logprobs(sequences), strict=True):
        expected = stock_logprobs(folder, t.tokens.tolist())
        trained = np.flatnonzero(np.isfinite(values))
        assert trained.tolist() == [i for i in np.flatnonzero(t.trainable) if i > 0]
        np.testing.assert_allclose(values[trained], np.array(expected)[trained], atol=2e-5)


def test_shared_prompt_is_computed_once_and_last_tokens_never():
    prompt = list(range(10, 30))
    group = [trajectory(prompt, [5, 6, 7]) for _ in range(8)]
    ((batch, members),) = pack_trajectories(group, max_tokens=10_000)
    assert members == list(range(8))
    assert batch.num_tokens == len(prompt) + 8 * 2
    assert len(batch.target_N) == 8 * 3


def test_a_large_group_splits_and_a_pair_never(learner):
    groups = random_groups(num_groups=1, size=6)
    assert len(pack(groups, needs=frozenset(), max_tokens=1)) == 6
    signs = iter([1.0, -1.0])
    pair = Group(
        task="test/0",
        members=tuple(
            Scored(trajectory=m.trajectory).with_columns({Column.PREFERENCE: np.array(next(signs))})
            for m in groups[0].members[:2]
        ),
    )
    (batch,) = pack([pair], needs=frozenset({Column.PREFERENCE}), max_tokens=1)
    assert batch.pairs_P2.tolist() == [[0, 1]]


def test_a_group_that_fits_is_not_split_to_fill_a_batch():
    prompt = list(range(10, 40))
    groups = [
        Group(
            task=f"test/{g}",
            members=tuple(Scored(trajectory=trajectory([g, *prompt], [5, 6, 7])) for _ in range(4)),
        )
        for g in range(3)
    ]
    alone = 31 + 4 * 2
    batches = pack(groups, needs=frozenset(), max_tokens=2 * alone - 1)
    assert [b.num_tokens for b in batches] == [alone] * 3
    assert [b.num_sequences for b in pack(groups, needs=frozenset(), max_tokens=2 * alone)] == [
        8,
        4,
    ]
    # A group may be longer than a micro-batch: then it is one of its own, or its prompt is
    # computed in each of several.
    kept = pack(groups, needs=frozenset(), max_tokens=alone - 1, group_tokens=alone)
    assert [b.num_tokens for b in kept] == [alone] * 3
    split = pack(groups, needs=frozenset(), max_tokens=alone - 1)
    assert sum(b.num_tokens for b in split) > 3 * alone
    # A stage stretches the learner's own number so, and keeps to one that it names.
    parts = SimpleNamespace(terms=(), learner=SimpleNamespace(micro_batch_tokens=alone - 1))
    for named, wanted in ((None, kept), (alone - 1, split)):
        laid = micro_batches(SimpleNamespace(micro_batch_tokens=named), parts, groups)
        assert [b.num_tokens for b in laid] == [b.num_tokens for b in wanted]


@pytest.mark.parametrize(
    "terms",
    [
        (CrossEntropy(),),
        (CrossEntropy(aggregate="sequence_mean"),),
        (ClippedPolicyGradient(), ReferenceKL(weight=0.3)),
        (ClippedPolicyGradient(aggregate="sequence_mean"), CrossEntropy(weight=0.1)),
    ],
)
def test_splitting_a_step_into_micro_batches_changes_nothing(learner, terms):
    objective = StageObjective(terms)
    rng = np.random.default_rng(1)
    groups = on_policy(random_groups(), learner.policy)
    groups = with_column(
        groups, Column.ADVANTAGE, lambda t: rng.normal(size=len(t)).astype(np.float32)
    )
    # About where the policy is: e^(reference - policy) in the thousands would show rounding alone.
    groups = with_column(
        groups, Column.REFERENCE_LOGPROB, lambda t: rng.normal(-6, 0.3, len(t)).astype(np.float32)
    )
    whole = pack(groups, needs=objective.needs, max_tokens=10_000)
    parts = pack(groups, needs=objective.needs, max_tokens=12)
    assert len(whole) == 1
    assert len(parts) > 3
    loss, grads = gradients(learner, whole, objective)
    loss_parts, grads_parts = gradients(learner, parts, objective)
    assert loss_parts == pytest.approx(loss, rel=1e-6)
    assert largest_gap(grads, grads_parts) < 1e-5


def test_splitting_pairs_changes_nothing(learner):
    objective = StageObjective((Dpo(beta=0.3),))
    rng = np.random.default_rng(1)
    groups = random_groups(num_groups=5, size=2)
    groups = with_column(
        groups, Column.REFERENCE_LOGPROB, lambda t: rng.normal(-2, 0.3, len(t)).astype(np.float32)
    )
    signs = iter([1.0, -1.0] * 5)
    groups = with_column(groups, Column.PREFERENCE, lambda t: np.array(next(signs)))
    loss, grads = gradients(
        learner, pack(groups, needs=objective.needs, max_tokens=9999), objective
    )
    split = pack(groups, needs=objective.needs, max_tokens=20)
    assert len(split) > 1
    loss_split, grads_split = gradients(learner, split, objective)
    assert loss_split == pytest.approx(loss, rel=1e-6)
    assert largest_gap(grads, grads_split) < 1e-5


def test_chunked_head_gives_the_same_gradient(learner, monkeypatch):
    objective = StageObjective((CrossEntropy(),))
    batches = pack(random_groups(), needs=frozenset(), max_tokens=10_000)
    loss, grads = gradients(learner, batches, objective)
    monkeypatch.setattr(
        "posttrain.numerics.logits.CHUNK_ELEMENTS", 5 * learner.policy.model.vocab_size
    )
    loss_chunked, grads_chunked = gradients(learner, batches, objective)
    assert loss_chunked == pytest.approx(loss, rel=1e-6)
    assert largest_gap(grads, grads_chunked) < 1e-5


def test_missing_and_nan_columns_are_refused():
    groups = random_groups(num_groups=1)
    with pytest.raises(LegalityError, match="has no advantage"):
        pack(groups, needs=frozenset({Column.ADVANTAGE}), max_tokens=99)
    groups = with_column(groups, Column.ADVANTAGE, lambda t: np.full(len(t), np.nan, np.float32))
    with pytest.raises(LegalityError, match="not finite"):
        pack(groups, needs=frozenset({Column.ADVANTAGE}), max_tokens=99)
