"""What every term can be limited by, and how its weight may move over a stage."""

import math

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, random_groups, trajectory, with_column

from posttrain.core.config import convert
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.base import Limit, Term, WeightSchedule
from posttrain.parts.composition import Composition
from posttrain.parts.legality import check_composition, column_readers
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.preference.unpaired import Kto
from posttrain.parts.registry import known
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy, Dft
from posttrain.training.objective import StageObjective
from posttrain.training.units import selected_units, top_entropy


def rewarded(groups, seed=0):
    rng = np.random.default_rng(seed)
    return with_column(groups, Column.REWARD, lambda t: np.asarray(float(rng.integers(-1, 2))))


def packed(groups, objective, max_tokens=10_000):
    return pack(groups, needs=objective.needs, max_tokens=max_tokens)


def by_hand(learner, batch):
    """(log-prob, entropy) at every trained token, in float64, without our head."""
    model = learner.policy.model
    logp = model.head(model.predicting(batch)).double().log_softmax(-1)
    written = logp.gather(-1, batch.target_N[:, None])[:, 0]
    return written, -(logp.exp() * logp).sum(-1).detach()


# --- entropy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.99])
def test_top_entropy_is_the_top_of_every_sequence(share):
    rng = np.random.default_rng(3)
    sequence = np.repeat(np.arange(30), rng.integers(1, 40, 30))
    entropy, readable = rng.random(len(sequence)), rng.random(len(sequence)) < 0.7
    kept = top_entropy(*map(torch.from_numpy, (entropy, readable, sequence)), share=share).numpy()
    for s in range(30):
        mine = np.flatnonzero((sequence == s) & readable)
        most = sorted(mine, key=lambda i: -entropy[i])
        wanted = set(most[: math.ceil(round(share * len(mine), 9))])
        assert set(np.flatnonzero(kept & (sequence == s))) == wanted


def test_a_share_of_a_whole_number_is_not_rounded_up_by_float_dust():
    sequence = torch.zeros(30, dtype=torch.int64)
    for share, kept in ((0.1, 3), (0.7, 21), (0.3, 9)):
        mask = top_entropy(torch.rand(30), sequence == 0, sequence, share=share)
        assert int(mask.sum()) == kept


def test_equal_entropies_keep_the_earlier_token():
    sequence = torch.tensor([0, 0, 0, 1, 1])
    mask = top_entropy(torch.ones(5), sequence < 2, sequence, share=0.5)
    assert mask.tolist() == [True, True, False, True, False]


def test_the_entropy_limit_averages_over_its_tokens_only(learner):
    objective = StageObjective((CrossEntropy(limit=Limit(entropy_share=0.4)),))
    (batch,) = packed(random_groups(), objective)
    written, entropy = by_hand(learner, batch)
    chosen = []
    for s in range(batch.num_sequences):
        mine = np.flatnonzero(batch.sequence_N.numpy() == s)
        most = sorted(mine, key=lambda i: -float(entropy[i]))
        chosen += most[: math.ceil(round(0.4 * len(mine), 9))]
    assert objective.counts([batch]) == (len(chosen),)
    assert len(chosen) < len(batch.target_N)
    expected = -written[chosen].mean()
    loss, grads = gradients(learner, [batch], objective)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    learner.policy.model.causal.zero_grad(set_to_none=True)
    expected.backward()
    params = learner.policy.model.causal.named_parameters()
    assert largest_gap(grads, {n: p.grad for n, p in params if p.grad is not None}) < 1e-5


def test_the_entropy_limit_counts_only_tokens_of_the_authors_read():
    mixed = random_groups(num_groups=1, kind=Kind.EXTERNAL) + random_groups(num_groups=1)
    term = CrossEntropy(where=(Kind.EXTERNAL,), limit=Limit(entropy_share=0.5))
    (batch,) = packed(mixed, StageObjective((term,)))
    keep = selected_units(term, batch, entropy_N=torch.rand(len(batch.target_N)))
    external = batch.where((Kind.EXTERNAL,))
    assert not (keep & ~external).any()
    for s in batch.sequence_N[external].unique():
        of_s = batch.sequence_N == s
        assert int((keep & of_s).sum()) == math.ceil(int(of_s.sum()) / 2)


# --- rewards ---------------------------------------------------------------------------------


def test_a_reward_limit_keeps_exactly_its_sequences(learner):
    groups = rewarded(random_groups())
    members = [m for g in groups for m in g.members]
    good = [Group(task="test/0", members=(m,)) for m in members if m.scalar(Column.REWARD) > 0]
    bad = [Group(task="test/0", members=(m,)) for m in members if m.scalar(Column.REWARD) <= 0]
    assert any(m.scalar(Column.REWARD) == 0 for m in members)
    for rewards, alone in (("positive", good), ("negative", bad)):
        limited = StageObjective((CrossEntropy(limit=Limit(rewards=rewards)),))
        plain = StageObjective((CrossEntropy(),))
        loss, grads = gradients(learner, packed(groups, limited), limited)
        loss_alone, grads_alone = gradients(learner, packed(alone, plain), plain)
        assert loss == pytest.approx(loss_alone, rel=1e-6)
        assert largest_gap(grads, grads_alone) < 1e-5


def test_a_limit_that_keeps_nothing_gives_no_gradient(learner):
    groups = with_column(random_groups(), Column.REWARD, lambda t: np.asarray(0.0))
    objective = StageObjective((CrossEntropy(limit=Limit(rewards="positive")),))
    loss, grads = gradients(learner, packed(groups, objective), objective)
    assert loss == 0
    assert all(float(g.abs().max()) == 0 for g in grads.values())


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize(
    "limit",
    [
        Limit(entropy_share=0.3),
        Limit(rewards="positive"),
        Limit(rewards="negative", entropy_share=0.6),
    ],
    ids=["entropy", "positive", "negative+entropy"],
)
def test_micro_batches_change_nothing_under_a_limit(learner, limit, aggregate):
    terms = (
        Dft(limit=limit, aggregate=aggregate),
        CrossEntropy(weight=0.3, limit=Limit(entropy_share=0.5)),
    )
    objective = StageObjective(terms)
    groups = rewarded(random_groups())
    whole, parts = packed(groups, objective), packed(groups, objective, 12)
    assert len(parts) > 3
    assert objective.counts(whole) == objective.counts(parts)
    loss, grads = gradients(learner, whole, objective)
    loss_parts, grads_parts = gradients(learner, parts, objective)
    assert loss_parts == pytest.approx(loss, rel=1e-6)
    assert largest_gap(grads, grads_parts) < 1e-5


# --- weights that move -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0]),
        ("cosine", [0.8 * 0.5 * (1 + math.cos(math.pi * p / 4)) for p in range(5)]),
    ],
)
def test_a_schedule_is_exact_at_every_update(shape, expected):
    term = CrossEntropy(weight=0.8, weight_schedule=WeightSchedule(end=0.0, shape=shape))
    objective = StageObjective((term, CrossEntropy(weight=0.5)))
    got = [objective.at(step=s, steps=5).weights for s in range(5)]
    assert [w[0] for w in got] == pytest.approx(expected, abs=1e-12)
    assert got[0][0] == 0.8
    assert got[-1][0] == 0.0
    assert {w[1] for w in got} == {0.5}
    assert objective.at(step=0, steps=1).weights == (0.8, 0.5)  # a stage of one update
    assert list(objective.at(step=2, steps=5).moving) == ["cross_entropy-1/weight"]


def test_the_weight_scales_the_gradient_and_not_the_shown_loss(learner):
    term = CrossEntropy(weight=2.0, weight_schedule=WeightSchedule(end=0.0))
    objective, plain = StageObjective((term,)), StageObjective((CrossEntropy(),))
    batches = packed(random_groups(), plain)
    loss, grads = gradients(learner, batches, plain)
    for step, weight in ((0, 2.0), (2, 1.0), (3, 0.5), (4, 0.0)):
        now = objective.at(step=step, steps=5)
        loss_now, grads_now = gradients(learner, batches, now)
        assert loss_now == pytest.approx(weight * loss, abs=1e-6)
        assert max(float((weight * grads[n] - grads_now[n]).abs().max()) for n in grads) < 1e-6
        report = learner.step(batches, now, lr_scale=0.0)
        assert report.metrics["cross_entropy"] == pytest.approx(loss, rel=1e-6)


# --- what is refused -------------------------------------------------------------------------


def of(term, *signals, source=None):
    source = source or Rollouts(tasks=("sums",))
    return Composition(source=source, signals=signals, terms=(term,))


def test_a_reward_limit_needs_rewards():
    term = CrossEntropy(limit=Limit(rewards="positive"))
    with pytest.raises(LegalityError, match="the limit of cross_entropy needs reward"):
        check_composition(of(term), stage="s")
    check_composition(of(term, Verify()), stage="s")


def test_pairs_have_no_tokens_to_choose_from():
    pairs = Dataset(path="pairs.jsonl", preference=True)
    for limit in (Limit(entropy_share=0.2), Limit(rewards="positive")):
        term = Dpo(limit=limit)
        with pytest.raises(LegalityError, match=r"compares whole pairs|needs reward"):
            check_composition(of(term, ReferenceLogprobs(), source=pairs), stage="s")


def test_a_schedule_that_goes_nowhere_is_refused():
    term = CrossEntropy(weight=0.5, weight_schedule=WeightSchedule(end=0.5))
    with pytest.raises(LegalityError, match="would do nothing"):
        check_composition(of(term), stage="s")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5])
def test_a_share_is_between_nothing_and_everything(share):
    with pytest.raises(ConfigError, match="entropy_share"):
        Limit(entropy_share=share)


def test_an_end_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="finite"):
        WeightSchedule(end=math.nan)


def test_yaml_reads_the_options_and_names_mistakes():
    row = {
        "type": "cross_entropy",
        "limit": {"entropy_share": 0.2, "rewards": "negative"},
        "weight_schedule": {"shape": "cosine", "end": 0.1},
    }
    assert convert(row, CrossEntropy, origin="x") == CrossEntropy(
        limit=Limit(entropy_share=0.2, rewards="negative"),
        weight_schedule=WeightSchedule(shape="cosine", end=0.1),
    )
    row["limit"] = {"entropy_shares": 0.2}
    with pytest.raises(ConfigError, match="entropy_share"):
        convert(row, CrossEntropy, origin="x")


def test_every_term_has_the_options():
    for term in known("term").values():
        assert issubclass(term, Term)
        assert {"weight", "where", "limit", "weight_schedule"} <= set(term.__struct_fields__)


def test_sequences_without_a_readable_token_are_no_trouble():
    members = (
        Scored(trajectory=trajectory([1, 2], [3, 4], kind=Kind.EXTERNAL)),
        Scored(trajectory=trajectory([1, 2], [5])),
    )
    (batch,) = pack([Group(task="test/0", members=members)], needs=frozenset(), max_tokens=99)
    term = CrossEntropy(where=(Kind.LEARNER,), limit=Limit(entropy_share=0.5))
    assert selected_units(term, batch).tolist() == [False, False, True]


def test_a_term_over_sequences_is_limited_by_reward():
    groups = rewarded(random_groups())
    term = Kto(limit=Limit(rewards="positive"))
    (batch,) = pack(groups, needs=term.limit.needs, max_tokens=10_000)
    rewards = [m.scalar(Column.REWARD) for g in groups for m in g.members]
    assert selected_units(term, batch).tolist() == [r > 0 for r in rewards]


def test_a_micro_batch_of_other_authors_needs_no_rewards():
    """In a mix only the learner's answers have rewards; the others may fill a batch alone."""
    own = rewarded(random_groups(num_groups=2))
    demos = random_groups(num_groups=2, kind=Kind.EXTERNAL, seed=7)
    limited = CrossEntropy(where=(Kind.LEARNER,), limit=Limit(rewards="positive"))
    terms = (limited, CrossEntropy(where=(Kind.EXTERNAL,)))
    batches = pack([*demos, *own], needs=column_readers(terms), max_tokens=12)
    assert any(Column.REWARD not in b.columns for b in batches)
    lengths = [
        int(m.trajectory.trainable.sum())
        for g in own
        for m in g.members
        if m.scalar(Column.REWARD) > 0
    ]
    assert StageObjective(terms).counts(batches)[0] == sum(lengths)
