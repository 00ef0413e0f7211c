"""Opponents, rivals, hints and ranks: SPIN, XPO, STaR's second try, and AOT."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, random_groups, trajectory, with_column
from staging import check_resume, make_world

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.learner import MovingReference
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Discard, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.base import bound
from posttrain.parts.composition import Composition, method
from posttrain.parts.guided.external import ExplorationBonus
from posttrain.parts.legality import admit, check_composition, column_readers
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.offline.filters import KeepRewards
from posttrain.parts.preference.pairs import Aot, Dpo
from posttrain.parts.preference.ranking import (
    MatchQuantiles,
    PreferDemonstration,
    RankPairs,
    quantiles,
)
from posttrain.parts.preference.self_play import Spin, Xpo
from posttrain.parts.preference.unpaired import AotUnpaired
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.members import Guided, Hinted, Rival
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.parts.supervised.rejection import Star
from posttrain.testing import check_signal, check_term, fake_tools
from posttrain.training.objective import StageObjective

PAIRS = Dataset(path="pairs.jsonl")


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


# --- AOT -------------------------------------------------------------------------------------


def softplus(x):
    return np.logaddexp(0.0, x)


def aot(pi, ref, *, beta, paired):
    """The paper's cost on a whole batch: sort both samples, compare rank by rank. [P, 2] each."""
    if paired:
        left, right = pi[:, 0] - pi[:, 1], ref[:, 0] - ref[:, 1]
    else:
        left, right = (pi - ref).T
    return softplus(-beta * (np.sort(left) - np.sort(right))).mean()


RNG = np.random.default_rng(4)
LENGTHS = [(2, 3), (1, 1), (4, 2), (3, 3), (2, 1)]
TOKENS = [[RNG.normal(-1.5, 0.7, n) for n in pair] for pair in LENGTHS]
REFERENCE = [[RNG.normal(-1.5, 0.7, n) for n in pair] for pair in LENGTHS]


def summed(values):
    return np.array([[side.sum() for side in pair] for pair in values])


def numeric(paired, beta):
    """d cost / d log-prob of every answer, by central differences."""
    pi, ref, out = summed(TOKENS), summed(REFERENCE), np.zeros((len(LENGTHS), 2))
    for place in np.ndindex(out.shape):
        up, down = pi.copy(), pi.copy()
        up[place] += 1e-6
        down[place] -= 1e-6
        out[place] = (
            aot(up, ref, beta=beta, paired=paired) - aot(down, ref, beta=beta, paired=paired)
        ) / 2e-6
    return out


def batch_with(columns_of):
    groups = []
    for index, pair in enumerate(LENGTHS):
        members = [
            Scored(trajectory=trajectory([1 + index], [3] * n)).with_columns(
                {c: np.asarray(v) for c, v in columns_of(index, side).items()}
            )
            for side, n in enumerate(pair)
        ]
        groups.append(Group(task="test/0", members=tuple(members)))
    return groups


@pytest.mark.parametrize("paired", [True, False])
def test_aot_is_the_cost_between_sorted_samples_and_has_its_gradient(paired):
    """From the ranks of the signal, term by term, against the paper's batch formula in float64."""
    beta, of = 0.8, "margins" if paired else "rewards"
    term = Aot(beta=beta) if paired else AotUnpaired(beta=beta)
    matched = quantiles(summed(TOKENS), summed(REFERENCE), of=of)
    groups = batch_with(
        lambda i, side: {
            Column.PREFERENCE: 1.0 - 2 * side,
            Column.QUANTILE: matched[i, side],
        }
    )
    (batch,) = pack(groups, needs=frozenset({Column.PREFERENCE, Column.QUANTILE}), max_tokens=999)
    flat = [np.concatenate([t for pair in values for t in pair]) for values in (TOKENS, REFERENCE)]
    logp = torch.tensor(flat[0], requires_grad=True)
    columns = {
        **{c: v.double() for c, v in batch.columns.items()},
        Column.QUANTILE: torch.tensor(matched.reshape(-1)),
        Column.REFERENCE_LOGPROB: torch.tensor(flat[1]),
    }
    at = replace(batch, columns=columns)
    loss = term.values({Stat.LOGPROB: logp}, at).loss.mean()
    expected = aot(summed(TOKENS), summed(REFERENCE), beta=beta, paired=paired)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
    loss.backward()
    per_answer = np.repeat(numeric(paired, beta).reshape(-1), np.array(LENGTHS).reshape(-1))
    np.testing.assert_allclose(logp.grad.numpy(), per_answer, atol=1e-8)
    order = np.argsort(summed(TOKENS)[:, 0]), np.argsort(summed(TOKENS)[:, 1])
    assert not np.array_equal(*order), "ranks must differ between sides, or nothing is sorted"


def pairs(learner, *, groups=5, seed=2):
    drawn = random_groups(num_groups=groups, size=2, seed=seed)
    rng = np.random.default_rng(seed)
    drawn = with_column(
        drawn,
        Column.REFERENCE_LOGPROB,
        lambda t: np.where(t.trainable, rng.normal(-2, 0.6, len(t)), np.nan).astype(np.float32),
    )
    signs = iter([1.0, -1.0] * groups)
    return with_column(drawn, Column.PREFERENCE, lambda t: np.array(next(signs)))


@pytest.mark.parametrize("of", ["margins", "rewards"])
def test_micro_batches_change_nothing_about_ranks(learner, of):
    term = (Aot(beta=0.5),) if of == "margins" else (AotUnpaired(beta=0.5),)
    groups = check_signal(MatchQuantiles(of=of), pairs(learner), fake_tools(learner.policy))
    objective, needs = StageObjective(term), column_readers(term)
    value, grads = gradients(learner, pack(groups, needs=needs, max_tokens=9999), objective)
    split = pack(groups, needs=needs, max_tokens=12)
    assert len(split) > 2
    again, parts = gradients(learner, split, objective)
    assert again == pytest.approx(value, rel=1e-5)
    assert largest_gap(grads, parts) < 1e-5


@pytest.mark.parametrize("of", ["margins", "rewards"])
def test_on_one_pair_it_is_dpo(learner, of):
    tools = fake_tools(learner.policy)
    (group,) = MatchQuantiles(of=of).score(pairs(learner, groups=1), tools)
    term = Aot(beta=0.3) if of == "margins" else AotUnpaired(beta=0.3)
    both = (term, Dpo(beta=0.3))
    batches = pack([group], needs=column_readers(both), max_tokens=999)
    value, grads = gradients(learner, batches, StageObjective((term,)))
    plain, expected = gradients(learner, batches, StageObjective((both[1],)))
    assert value == pytest.approx(plain, rel=1e-5)
    assert largest_gap(expected, grads) < 1e-4


def test_what_is_in_no_pair_takes_no_part(learner):
    groups = pairs(learner)
    out = iter([Discard.EQUAL_REWARDS.code] * 2 + [0] * 8)
    marked = with_column(groups, Column.DISCARD, lambda t: np.array(float(next(out))))
    score = bound(MatchQuantiles(), fake_tools(learner.policy))
    (first, *rest) = score(marked)
    assert [m.scalar(Column.QUANTILE) for m in first.members] == [0, 0]
    alone = score(groups[1:])
    for a, b in zip(rest, alone, strict=True):
        got, expected = ([m.scalar(Column.QUANTILE) for m in g.members] for g in (a, b))
        assert got == pytest.approx(expected)
    assert score(marked[:1])[0].members[0].scalar(Column.QUANTILE) == 0
    three = Group(task="test/0", members=(*groups[0].members, groups[1].members[0]))
    with pytest.raises(LegalityError, match="one of each"):
        score([three])


@pytest.mark.parametrize("paired", [True, False])
def test_aot_learns_and_resumes_exactly(world, paired):
    name = "aot" if paired else "aot_unpaired"
    transport = method(name, data=PAIRS, beta=0.5)
    _, metrics = check_resume(world, transport, steps=6, stop_after=3, groups_per_step=6)
    assert metrics[0][name] == pytest.approx(np.log(2), abs=1e-4), "it starts at its reference"
    assert metrics[-1][name] < 0.5


def test_aot_in_draws_of_one_pair_is_dpo(world):
    _, ranked = world.run(method("aot", data=PAIRS, beta=0.1), "aot", steps=3, groups_per_step=1)
    _, plain = world.run(method("dpo", data=PAIRS, beta=0.1), "dpo", steps=3, groups_per_step=1)
    assert [m["loss"] for m in ranked] == pytest.approx([m["loss"] for m in plain], abs=1e-5)
    assert [m["grad_norm"] for m in ranked] == pytest.approx(
        [m["grad_norm"] for m in plain], rel=1e-3
    )


# --- SPIN ------------------------------------------------------------------------------------


def written(*members):
    return Group(
        task="test/0",
        members=tuple(Scored(trajectory=trajectory([1], a, kind=kind)) for kind, a in members),
    )


def test_demonstrations_are_chosen_and_repetitions_are_left_out():
    sample, demo = (Kind.TEACHER, [5, 6]), (Kind.EXTERNAL, [7, 8])
    groups = [written(sample, demo), written((Kind.TEACHER, [7, 8]), demo), written(sample, sample)]
    first, same, alone = check_signal(PreferDemonstration(), groups)

    def read(group, column):
        return [m.scalar(column) for m in group.members]

    assert read(first, Column.PREFERENCE) == [-1, 1]
    assert read(first, Column.DISCARD) == [0, 0]
    assert read(same, Column.PREFERENCE) == [0, 0]
    duplicate, unranked = Discard.DUPLICATE.code, Discard.UNRANKED.code
    assert read(same, Column.DISCARD) == [duplicate, unranked]
    assert read(alone, Column.DISCARD) == [unranked, unranked]
    kept = admit([first, same, alone], (Dpo(),), version=0, max_age=0).kept
    assert len(kept) == 1


def test_a_step_of_spin_is_a_step_of_dpo_on_the_same_pairs(world):
    """log 2 at the start, since the opponent is the reference; then the demonstration rises."""
    method = Spin(tasks=("rows",), max_new_tokens=4)
    _, metrics = check_resume(world, method, steps=3)
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert metrics[-1]["dpo/chosen"] > metrics[-1]["dpo/rejected"]


def test_iterations_inside_a_stage_start_anew(world):
    """A fresh copy is both opponent and reference: log 2 again whenever it is taken."""
    method = Spin(tasks=("rows",), max_new_tokens=4, every=2)
    _, metrics = check_resume(world, method, steps=5, stop_after=3)
    losses = [m["loss"] for m in metrics]
    assert losses[0::2] == pytest.approx([np.log(2)] * 3, abs=1e-5)
    assert all(abs(loss - np.log(2)) > 1e-3 for loss in losses[1::2])


def test_spin_written_out():
    members = Guided(count=1, start=1, end=1, learn=True)
    for every, opponent in ((None, "input"), (50, "moving")):
        composition = Spin(tasks=("t",), every=every).compose()
        assert composition == Composition(
            source=Rollouts(tasks=("t",), policy=opponent, group_size=2, members=members),
            signals=(PreferDemonstration(), ReferenceLogprobs(policy=opponent)),
            terms=(Dpo(beta=0.1),),
            moving=None if every is None else MovingReference(every=50),
        )
        check_composition(composition, stage="s")


# --- XPO -------------------------------------------------------------------------------------


def test_the_bonus_lowers_what_the_reference_says(learner):
    mine, theirs = (
        random_groups(num_groups=2, seed=1),
        random_groups(num_groups=2, kind=Kind.TEACHER),
    )
    term = ExplorationBonus(weight=0.5)
    check_term(term)
    batches = pack([*mine, *theirs], needs=frozenset(), max_tokens=999)
    value, grads = gradients(learner, batches, StageObjective((term,)))
    logp = learner.policy.logprobs([m.trajectory for g in theirs for m in g.members])
    assert value == pytest.approx(0.5 * np.mean([np.nansum(v) for v in logp]), rel=1e-5)
    nll = CrossEntropy(weight=0.5, aggregate="sequence_sum", where=(Kind.TEACHER,))
    _, imitating = gradients(learner, batches, StageObjective((nll,)))
    assert all(torch.allclose(grads[n], -g, atol=1e-6) for n, g in imitating.items())


def test_without_its_bonus_xpo_is_online_dpo_against_the_reference():
    plain = Xpo(tasks=("t",), bonus=0.0).compose()
    assert plain == Composition(
        source=Rollouts(tasks=("t",), group_size=2, members=Rival(policy="input")),
        signals=(Verify(), RankPairs(), ReferenceLogprobs()),
        terms=(Dpo(beta=0.1),),
    )
    full = Xpo(tasks=("t",)).compose()
    assert full.terms[1:] == (ExplorationBonus(weight=1e-5),)
    check_composition(full, stage="s")


def test_xpo_resumes_exactly(world):
    method = Xpo(tasks=("rows",), max_new_tokens=4, bonus=1e-3, group_size=3)
    _, metrics = check_resume(world, method, steps=4, groups_per_step=6)
    assert any(m.get("exploration_bonus", 0.0) < -1 for m in metrics)


def test_a_bonus_that_would_imitate_is_refused():
    with pytest.raises(ConfigError, match="above 0"):
        ExplorationBonus(weight=-1.0)
    with pytest.raises(LegalityError, match="where=learner"):
        check_composition(
            Composition(
                source=Rollouts(tasks=("t",), members=Rival()),
                terms=(ExplorationBonus(where=(Kind.LEARNER,)), CrossEntropy()),
            ),
            stage="s",
        )


# --- STaR ------------------------------------------------------------------------------------


def test_the_plain_answer_comes_first_and_the_hinted_one_mends_failures():
    keep = Star(tasks=("t",), hint="{question} ({answer})").compose().signals[1]
    assert keep == KeepRewards(at_least=1.0, best=1)
    rewards = [(1, 1), (1, 0), (0, 1), (0, 0)]
    groups = random_groups(num_groups=4, size=2)
    left = iter([r for row in rewards for r in row])
    groups = with_column(groups, Column.REWARD, lambda t: np.array(float(next(left))))
    judged = keep.score(groups, fake_tools())
    kept = [[m.scalar(Column.DISCARD) == 0 for m in g.members] for g in judged]
    assert kept == [[True, False], [True, False], [False, True], [False, False]]


def test_star_with_and_without_a_hint_written_out():
    plain = Star(tasks=("t",)).compose()
    assert plain.source.members is None
    assert plain.source.group_size == 1
    hinted = Star(tasks=("t",), hint="{question} ({answer})").compose()
    assert hinted.source.members == Hinted(context="{question} ({answer})")
    assert hinted.source.group_size == 2
    check_composition(hinted, stage="s")
    with pytest.raises(ConfigError, match="hinted with context"):
        Star(tasks=("t",), hint="no braces").compose()
