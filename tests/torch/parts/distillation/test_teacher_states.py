"""Teachers' hidden states instead of their distributions: the same numbers from far fewer."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, random_groups
from staging import make_world, untimed
from test_distillation_terms import DENSE, name

from posttrain.core.errors import LegalityError
from posttrain.core.learner import Lora, MovingReference, Optimizer
from posttrain.core.statistics import Divergence, DivergenceKind, Stat
from posttrain.core.trajectory import Column, Group
from posttrain.engines.local.policy import LocalPolicy
from posttrain.numerics import fused, logits
from posttrain.numerics.batch import pack
from posttrain.numerics.divergence import LogitSides, divergence, sloped
from posttrain.numerics.head import token_stats
from posttrain.numerics.logits import LinearHead
from posttrain.parts.composition import Composition
from posttrain.parts.distillation.divergences import (
    EntropyAwareKL,
    TeacherForwardKL,
    TeacherReverseKL,
    TeacherTotalVariation,
)
from posttrain.parts.distillation.presets import Opd
from posttrain.parts.distillation.teachers import TeacherDistribution
from posttrain.parts.legality import compared_in_the_loss
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.testing import check_signal, fake_tools, tiny_model
from posttrain.training import stage as stages
from posttrain.training.objective import StageObjective

V, X = 37, 6
OWN = frozenset({Stat.LOGPROB, Stat.SAMPLED_LOGPROB, Stat.ENTROPY})
SOFT = [
    Divergence(kind, coefficient=0.3, temperature=2.0)
    for kind in DivergenceKind
    if kind is not DivergenceKind.SORTED_L1
]
COMPARED = [t.divergence for t in DENSE] + SOFT
SIGNAL = TeacherDistribution(routes={"*": "t"})


@pytest.fixture(params=["kept", "computed again", "chunks", "kept chunks"])
def way(request, monkeypatch):
    """Every way through the function."""
    if "kept" not in request.param:
        monkeypatch.setattr(fused, "KEEP_ELEMENTS", 0)
    if "chunks" in request.param:
        monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 5 * V)


# --- the head --------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", COMPARED, ids=str)
def test_slope_is_the_gradient_of_the_divergence(wanted):
    """In float64, by autograd of the definition."""
    make = torch.Generator().manual_seed(0)
    z, t = (torch.randn(9, V, dtype=torch.float64, generator=make) * 3 for _ in range(2))
    z.requires_grad_()
    nothing = torch.empty(9, 0, dtype=torch.long)
    expected = divergence(wanted, z.log_softmax(-1), nothing, t.log_softmax(-1))
    (slope,) = torch.autograd.grad(expected.sum(), z)
    soft, room, out, spare = z.detach() / wanted.temperature, *(torch.empty_like(t) for _ in "123")
    sides = LogitSides.of(soft, t / wanted.temperature, soft.softmax(-1), room_NV=room)
    value = sloped(wanted, sides, out_NV=out, spare_NV=spare)
    torch.testing.assert_close(value, expected.detach(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(out, slope, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("wanted", COMPARED, ids=str)
def test_slope_is_finite_where_probabilities_vanish(wanted):
    z = torch.tensor([[0.0, -300.0, -300.0, 1.0], [0.0, -300.0, 5.0, -99.0]])
    t = torch.tensor([[1.0, -300.0, 0.0, -300.0], [0.0, -300.0, -99.0, 5.0]])
    out, room, spare = (torch.empty_like(z) for _ in range(3))
    sides = LogitSides.of(z, t, z.softmax(-1), room_NV=room)
    assert bool(sloped(wanted, sides, out_NV=out, spare_NV=spare).isfinite().all())
    assert bool(out.isfinite().all())


def situation(seed=0):
    """A packed batch of which every third sequence has no teacher, the others one of two that are
    of several widths; in both forms, with the heads that belong to it."""
    (batch,) = pack(random_groups(vocab=V), needs=frozenset(), max_tokens=10_000)
    num, rng = len(batch.target_N), np.random.default_rng(seed)

    def made(*shape, scale=1.0):
        return torch.tensor(rng.normal(0, scale, shape), dtype=torch.float32)

    batch = replace(batch, temperature_N=torch.tensor(np.resize([0.5, 1, 2, 0], num)).float())
    linear = LinearHead(made(V, 4), made(V), 1.3)
    other_XV = made(X, V)
    heads = (linear, lambda hidden_NX: torch.tanh(hidden_NX @ other_XV) * 4)
    number_S = torch.arange(batch.num_sequences) % 3
    states = made(num, X)
    of_N = number_S[batch.sequence_N]
    logp = torch.stack([linear(states[:, :4]), heads[1](states)]).log_softmax(-1)
    logp = logp[of_N.clamp(max=1), torch.arange(num)]
    states[of_N == 0, 4:] = float("nan")
    states[of_N == 2] = float("nan")
    logp[of_N == 2] = float("nan")
    number_S = number_S.float().masked_fill(number_S == 2, float("nan"))
    own = {Column.TEACHER_STATES: states, Column.TEACHER_HEAD: number_S}
    ids = torch.zeros(num, 0, dtype=torch.long)
    dense = {Column.TEACHER_LOGPROBS: logp, Column.TEACHER_IDS: ids}
    leaves = [t.requires_grad_() for t in (made(num, X), made(V, X, scale=1.5), made(V))]
    return replace(batch, columns=own), replace(batch, columns=dense), heads, leaves, of_N != 2


def evaluated(batch, head, leaves, wanted, known, *, heads=(), weigh=None):
    """Statistics, and gradients of a random weighting of them, NaN asked where nobody teaches."""
    stats = token_stats(leaves[0], head, batch, wanted=wanted, vocab_size=V, teachers=heads)
    rng, total = np.random.default_rng(5), 0.0
    for stat in sorted(wanted, key=repr):
        weights = torch.tensor(rng.normal(size=len(known)), dtype=torch.float32)
        if isinstance(stat, Divergence):
            weights[~known] = 0
            total = total + (stats[stat][known] * weights[known]).sum()
        else:
            total = total + (stats[stat] * weights).sum()
    return stats, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("own", [frozenset(), OWN, frozenset({Stat.ENTROPY})], ids=len)
@pytest.mark.parametrize(
    "compared", [*([c] for c in COMPARED), COMPARED], ids=lambda c: str(c[0]) if c[1:] else "all"
)
def test_states_give_the_values_and_gradients_of_log_probs(way, compared, own):
    """Against autograd through log-softmax, which never comes near the function tested."""
    states, dense, heads, leaves, known = situation()
    wanted, head = own | frozenset(compared), LinearHead(leaves[1], leaves[2], 0.7)
    expected = evaluated(dense, lambda h: head(h), leaves, wanted, known)
    ways = {
        "states": evaluated(states, head, leaves, wanted, known, heads=heads),
        "states by autograd": evaluated(
            states, lambda h: head(h), leaves, wanted, known, heads=heads
        ),
        "log-probs": evaluated(dense, head, leaves, wanted, known),
    }
    for found in ways.values():
        assert set(found[0]) == set(wanted)
        for stat in wanted:
            torch.testing.assert_close(
                found[0][stat], expected[0][stat], atol=1e-5, rtol=1e-5, equal_nan=True
            )
            assert bool(found[0][stat].isnan().any()) == isinstance(stat, Divergence)
        for ours, theirs in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-5)


def test_log_probs_and_states_in_one_batch(way):
    """One teacher's weights move, another's do not."""
    states, dense, heads, leaves, known = situation()
    mixed = {**states.columns, **{c: v.clone() for c, v in dense.columns.items()}}
    second = states.columns[Column.TEACHER_HEAD][states.sequence_N] == 1
    mixed[Column.TEACHER_STATES] = mixed[Column.TEACHER_STATES].clone()
    mixed[Column.TEACHER_STATES][second] = float("nan")
    mixed[Column.TEACHER_LOGPROBS][~second] = float("nan")
    wanted, head = frozenset(COMPARED), LinearHead(leaves[1], leaves[2], 0.7)
    expected = evaluated(dense, lambda h: head(h), leaves, wanted, known)
    found = evaluated(replace(states, columns=mixed), head, leaves, wanted, known, heads=heads)
    for stat in wanted:
        torch.testing.assert_close(
            found[0][stat], expected[0][stat], atol=1e-5, rtol=1e-5, equal_nan=True
        )
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-5)


def test_a_token_without_a_teacher_gets_no_gradient_whatever_is_asked(way):
    states, _, heads, leaves, known = situation()
    wanted, head = TeacherReverseKL().divergence, LinearHead(leaves[1])
    stats = token_stats(
        leaves[0], head, states, wanted=frozenset({wanted}), vocab_size=V, teachers=heads
    )
    stats[wanted].sum().backward()  # NaN
    assert bool(leaves[0].grad[~known].eq(0).all())
    assert bool(leaves[0].grad[known].ne(0).any(-1).all())
    assert bool(leaves[1].grad.isfinite().all())


def test_a_second_backward_pass_gives_the_same_gradient():
    states, _, heads, leaves, known = situation()
    head, wanted = LinearHead(leaves[1], leaves[2]), frozenset({*COMPARED, *OWN})
    stats = token_stats(leaves[0], head, states, wanted=wanted, vocab_size=V, teachers=heads)
    total = sum((stats[w][known] ** 2).sum() for w in sorted(wanted, key=repr))
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_bfloat16_is_as_close_as_its_precision():
    states, dense, heads, leaves, known = situation()
    half = [t.detach().bfloat16().requires_grad_() for t in leaves]
    wanted, head = frozenset({TeacherReverseKL().divergence}), LinearHead(half[1], half[2])
    rounded = LinearHead(heads[0].weight_VX.bfloat16(), heads[0].bias_V.bfloat16(), 1.3)
    found = evaluated(states, head, half, wanted, known, heads=(rounded, heads[1]))
    expected = evaluated(dense, lambda h: head(h), half, wanted, known)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


# --- the signal ------------------------------------------------------------------------------


@pytest.fixture
def teachers(engine, tmp_path):
    """Two frozen teachers, the second with a head that is not one product."""
    kinds = {"t": "qwen3", "capped": "gemma2"}
    return {
        ref: engine.policy(str(tiny_model(tmp_path / ref, seed=seed, family=family)))
        for seed, (ref, family) in enumerate(kinds.items(), 7)
    }


def routed(teachers):
    """(groups with states, groups with log-probs, heads) of groups that go to two teachers."""
    groups = random_groups(num_groups=4)
    groups = [
        Group(task=f"{'two' if i % 2 else 'one'}/0", members=g.members)
        for i, g in enumerate(groups)
    ]
    signal = TeacherDistribution(routes={"two": "capped", "*": "t"})
    numbers = {ref: n for n, ref in enumerate(teachers)}
    scored = check_signal(signal, groups, fake_tools(policies=teachers, heads=numbers))
    heads = tuple(t.hidden.head for t in teachers.values())
    return scored, signal.score(groups, fake_tools(policies=teachers)), heads


def with_states(groups, teacher):
    """Groups with the hidden states of one teacher."""
    return SIGNAL.score(groups, fake_tools(policies={"t": teacher}, heads={"t": 0}))


def test_no_array_over_the_vocabulary_crosses_the_signal(teachers):
    scored, dense, _ = routed(teachers)
    for group, full in zip(scored, dense, strict=True):
        for member, other in zip(group.members, full.members, strict=True):
            assert member.columns.keys() == {Column.TEACHER_STATES, Column.TEACHER_HEAD}
            states, length = member.columns[Column.TEACHER_STATES], len(member.trajectory)
            assert states.shape == (length, 32)
            assert states.nbytes < other.columns[Column.TEACHER_LOGPROBS].nbytes
            known = ~np.isnan(states).any(-1)
            assert (known == member.trajectory.trainable).all()


@pytest.mark.parametrize("term", DENSE, ids=name)
def test_a_step_is_that_of_log_probs_however_it_is_split(learner, teachers, term):
    scored, dense, heads = routed(teachers)
    objective = StageObjective((term,), teachers=heads)
    packed = pack(dense, needs=objective.needs, max_tokens=10_000)
    expected_loss, expected = gradients(learner, packed, StageObjective((term,)))
    for max_tokens in (10_000, 30, 1):
        batches = pack(scored, needs=objective.needs, max_tokens=max_tokens)
        assert all(Column.TEACHER_LOGPROBS not in b.columns for b in batches)
        loss, grads = gradients(learner, batches, objective)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert largest_gap(grads, expected) < 2e-5


@pytest.mark.parametrize("term", DENSE, ids=name)
def test_a_teacher_equal_to_the_learner_gives_no_loss_and_no_gradient(
    learner, engine, tiny_folder, term
):
    teacher = engine.policy(str(tiny_folder))
    groups = with_states(random_groups(), teacher)
    objective = StageObjective((term,), teachers=(teacher.hidden.head,))
    batches = pack(groups, needs=objective.needs, max_tokens=10_000)
    loss, grads = gradients(learner, batches, objective)
    assert abs(loss) < 2e-6
    if not isinstance(term, TeacherTotalVariation):  # at the kink of |x| rounding picks a side
        assert max(float(g.abs().max()) for g in grads.values()) < 2e-5


def test_states_that_are_missing_or_not_finite_are_refused(teachers):
    scored, _, _ = routed(teachers)
    needs = StageObjective((TeacherReverseKL(),)).needs
    (first, *_) = scored
    bare = Group(task=first.task, members=tuple(replace(m, columns={}) for m in first.members))
    with pytest.raises(LegalityError, match="has no teacher_"):
        pack([bare, *scored[1:]], needs=needs, max_tokens=999)
    broken = first.members[0].columns[Column.TEACHER_STATES].copy()
    broken[-1] = np.inf
    members = (first.members[0].with_columns({Column.TEACHER_STATES: broken}), *first.members[1:])
    with pytest.raises(LegalityError, match="teacher_states is not finite"):
        pack([Group(task=first.task, members=members)], needs=needs, max_tokens=999)


# --- who has hidden states -------------------------------------------------------------------


def test_only_what_never_changes_has_hidden_states(engine, tiny_folder, world):
    """States of one version must not meet the head of another."""
    assert engine.policy(str(tiny_folder)).hidden is not None
    plain = engine.learner(str(tiny_folder), name="x", optimizer=Optimizer(), lora=None)
    assert plain.policy.hidden is None
    follows = engine.learner(
        str(tiny_folder), name="x", optimizer=Optimizer(), lora=None, moving=MovingReference()
    )
    assert follows.moving is not None
    assert follows.moving.hidden is None


def test_adapters_off_have_those_of_the_policy_it_started_from(engine, tiny_folder, tmp_path):
    untied = tiny_model(tmp_path / "untied", tied=False)
    on_layers, on_head = (
        engine.learner(
            str(folder),
            name="t",
            optimizer=Optimizer(lr=3e-2),
            lora=Lora(rank=4, target_modules=modules),
        )
        for folder, modules in (
            (tiny_folder, ("q_proj", "down_proj")),
            (untied, ("q_proj", "lm_head")),
        )
    )
    assert on_head.start.hidden is None
    trajectories = [m.trajectory for g in random_groups() for m in g.members]
    frozen = engine.policy(str(tiny_folder)).hidden
    expected = frozen.states(trajectories)
    objective = StageObjective((TeacherReverseKL(),), teachers=(frozen.head,))
    groups = with_states(random_groups(), on_layers.start)
    for _ in range(2):
        batches = pack(groups, needs=objective.needs, max_tokens=999)
        on_layers.step(batches, objective, lr_scale=1.0)
    hidden = on_layers.start.hidden
    for own, theirs in zip(hidden.states(trajectories), expected, strict=True):
        np.testing.assert_array_equal(own, theirs)
    some = torch.randn(3, 32)
    torch.testing.assert_close(hidden.head(some), frozen.head(some), rtol=0, atol=0)


# --- a whole stage ---------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


def packed_columns(monkeypatch):
    """The columns of every batch that a stage packs."""
    seen = []

    def spy(*args, **options):
        batches = pack(*args, **options)
        seen.extend(frozenset(b.columns) for b in batches)
        return batches

    monkeypatch.setattr(stages, "pack", spy)
    return seen


def test_a_stage_takes_the_same_steps_either_way(world, monkeypatch, tmp_path):
    """Two updates to a draw: the teacher is frozen, so its states stay right."""
    engine, other = world.engine, str(tiny_model(tmp_path / "teacher", seed=9))
    taught = SimpleNamespace(learner=engine.learner, policy=lambda _: engine.policy(other))
    world = replace(world, engine=taught)
    method = Opd(tasks=("rows",), group_size=2, max_new_tokens=5, teachers={"*": "base"})
    seen = packed_columns(monkeypatch)
    options = {"steps": 4, "updates_per_draw": 2, "groups_per_step": 4}
    _, metrics = world.run(method, "states", **options)
    assert set(seen) == {frozenset({Column.TEACHER_STATES, Column.TEACHER_HEAD})}
    monkeypatch.setattr(LocalPolicy, "hidden", None)
    seen.clear()
    _, expected = world.run(method, "log-probs", **options)
    assert set(seen) == {frozenset({Column.TEACHER_LOGPROBS, Column.TEACHER_IDS})}
    assert metrics[-1]["loss"] > 0.1
    for ours, theirs in zip(untimed(metrics), untimed(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-6)


def test_whatever_else_reads_the_log_probs_gets_them():
    source = Rollouts(tasks=("letters",))

    def compared(*terms, signals=(SIGNAL,)):
        return compared_in_the_loss(Composition(source=source, signals=signals, terms=terms))

    assert compared(TeacherReverseKL(), TeacherForwardKL()) == ("t",)
    assert compared(TeacherReverseKL(), EntropyAwareKL()) == ()
    few = TeacherDistribution(routes={"*": "t"}, top_k=4)
    assert compared(TeacherReverseKL(), signals=(few,)) == ()
    assert compared(TeacherReverseKL(), signals=(SIGNAL, SIGNAL)) == ()
