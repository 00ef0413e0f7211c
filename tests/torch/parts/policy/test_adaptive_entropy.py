"""A coefficient that moves with what was measured, and comes back bit for bit."""

import pytest
import torch
from material import gradients, random_groups, trajectory
from staging import check_resume, make_world

from posttrain.core.errors import ConfigError
from posttrain.core.trajectory import Group, Scored
from posttrain.engines.local.engine import LocalLearner
from posttrain.numerics.batch import pack
from posttrain.parts.base import WeightSchedule
from posttrain.parts.policy.presets import AdaptiveEntropy
from posttrain.parts.policy.regularisers import AdaptiveEntropyBonus, EntropyBonus
from posttrain.testing import check_term
from posttrain.training.objective import StageObjective

NAME = "adaptive_entropy_bonus"


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


def played(bonus, entropies):
    """Coefficients in force when updates measure these entropies, by the formula alone."""
    c, last, out = bonus.initial, None, []
    for h in entropies:
        out.append(c if last is None or last <= bonus.target else 0.0)
        c += bonus.step if h < bonus.target else -bonus.step
        c, last = min(max(c, 0.0), bonus.cap), h
    return out


def test_the_coefficient_follows_the_rule():
    bonus = AdaptiveEntropyBonus(target=0.5, initial=0.01, step=0.005, cap=0.0125)
    entropies = [0.6, 0.6, 0.6, 0.45, 0.4, 0.3, 0.2, 0.9, 0.3]
    objective, state, got = StageObjective((bonus,)), {}, []
    for number, entropy in enumerate(entropies):
        now = objective.at(step=number, steps=len(entropies), state=state)
        got.append(now.weights[0])
        assert now.moving == {f"{NAME}/weight": got[-1]}
        state = now.after({f"{NAME}/entropy": entropy})
    assert got == pytest.approx(played(bonus, entropies), abs=1e-15)
    assert got[:4] == pytest.approx([0.01, 0, 0, 0]), "above the target it does not act"
    assert max(got) == bonus.cap
    assert min(got) == 0


def test_the_defaults_are_those_of_the_authors_scripts():
    """Skywork-OR1: ENTROPY_COEFF 0, TGT_ENTROPY 0.2, MAX_ENT_COEF 0.005, DELTA_ENT_COEF 1e-4."""
    (_, bonus) = AdaptiveEntropy(tasks=("t",)).compose().terms
    assert bonus == AdaptiveEntropyBonus(target=0.2, initial=0.0, step=1e-4, cap=0.005)


def test_a_step_without_tokens_changes_nothing_that_is_remembered():
    state = {f"{NAME}/coefficient": 0.02, f"{NAME}/entropy": 0.1}
    objective = StageObjective((AdaptiveEntropyBonus(target=0.5),)).at(step=1, steps=2, state=state)
    assert objective.after({}) == state


def test_two_bonuses_remember_apart():
    objective = StageObjective((AdaptiveEntropyBonus(target=0.5), AdaptiveEntropyBonus(target=0.1)))
    state = objective.after({f"{NAME}-1/entropy": 0.3, f"{NAME}-2/entropy": 0.3})
    assert state[f"{NAME}-1/coefficient"] == pytest.approx(1e-4)
    assert state[f"{NAME}-2/coefficient"] == 0


def test_a_schedule_multiplies_the_coefficient():
    bonus = AdaptiveEntropyBonus(target=0.5, weight_schedule=WeightSchedule(end=0.0))
    objective = StageObjective((bonus,)).at(step=1, steps=3, state={f"{NAME}/coefficient": 0.04})
    assert objective.weights == pytest.approx((0.02,))


def test_in_force_it_is_an_entropy_bonus_of_that_weight(learner):
    """Same gradient as the plain bonus, and none at all above the target."""
    batches = pack(random_groups(), needs=frozenset(), max_tokens=999)
    adaptive = StageObjective((AdaptiveEntropyBonus(target=9.0),))
    below = adaptive.at(step=1, steps=2, state={f"{NAME}/coefficient": 0.3, f"{NAME}/entropy": 1.0})
    above = adaptive.at(step=1, steps=2, state={**below.state, f"{NAME}/entropy": 10.0})
    value, grads = gradients(learner, batches, below)
    plain, expected = gradients(learner, batches, StageObjective((EntropyBonus(weight=0.3),)))
    assert value == pytest.approx(plain, rel=1e-6)
    assert all(torch.allclose(grads[n], g, atol=1e-7) for n, g in expected.items())
    _, still = gradients(learner, batches, above)
    assert all(float(g.abs().max()) == 0 for g in still.values())


def test_a_learner_measures_over_all_micro_batches_and_remembers(learner):
    groups = random_groups()
    objective = StageObjective((AdaptiveEntropyBonus(target=1.0, initial=0.0),))
    (whole,) = pack(groups, needs=frozenset(), max_tokens=999)
    model = learner.policy.model
    with torch.no_grad():
        logp = model.head(model.predicting(whole)).log_softmax(-1).double()
    by_hand = float(-(logp.exp() * logp).sum(-1).mean())
    assert learner.state == {}
    learner.step(pack(groups, needs=frozenset(), max_tokens=12), objective, lr_scale=0.0)
    assert learner.state[f"{NAME}/entropy"] == pytest.approx(by_hand, rel=1e-5)
    expected = 1e-4 if by_hand < 1.0 else 0.0
    assert learner.state[f"{NAME}/coefficient"] == pytest.approx(expected)


def test_a_stopped_stage_remembers(world):
    method = AdaptiveEntropy(
        tasks=("rows",),
        group_size=4,
        max_new_tokens=4,
        target=3.0,
        initial=0.05,
        step=0.02,
        cap=1.0,
    )
    learner, metrics = check_resume(world, method, steps=5, stop_after=2)
    weights = [m[f"{NAME}/weight"] for m in metrics]
    measured = [m[f"{NAME}/entropy"] for m in metrics]
    bonus = AdaptiveEntropyBonus(target=3.0, initial=0.05, step=0.02, cap=1.0)
    assert weights == pytest.approx(played(bonus, measured), abs=1e-12)
    assert len(set(weights)) > 2, (measured, "it moves, or the test says nothing")
    assert learner.state[f"{NAME}/entropy"] == measured[-1]


def test_what_would_be_lost_without_the_state(world, monkeypatch):
    """The same stage with its memory wiped at the interruption ends elsewhere."""
    method = AdaptiveEntropy(
        tasks=("rows",), group_size=4, max_new_tokens=4, target=9.0, initial=0.0, step=0.5, cap=9.0
    )
    whole, _ = world.run(method, "whole", steps=4)
    world.run(method, "cut", steps=4, stop_after=2)
    path = world.root / "cut/stage/checkpoint/learner.pt"
    assert torch.load(path, weights_only=True)["state"]
    load = LocalLearner.load

    def forgetful(learner, folder):
        load(learner, folder)
        learner._state = {}

    monkeypatch.setattr(LocalLearner, "load", forgetful)
    wiped, _ = world.run(method, "cut", steps=4)
    ours = dict(whole.policy.model.causal.named_parameters())
    theirs = wiped.policy.model.causal.named_parameters()
    assert max(float((ours[n] - w).detach().abs().max()) for n, w in theirs) > 0


@pytest.mark.parametrize("options", [{"target": 0}, {"step": 0}, {"initial": -1}, {"initial": 2}])
def test_options_without_a_meaning(options):
    with pytest.raises(ConfigError, match=r"(?i)adaptive_?entropy_?bonus"):
        AdaptiveEntropyBonus(**{"target": 1, **options})


def test_contract():
    check_term(AdaptiveEntropyBonus(target=1.0, initial=0.005))


def test_the_bonus_and_the_marks_have_the_temperature_of_the_samples(learner):
    """Values and gradient are those of the distribution that was sampled, as in the ratio."""
    member = trajectory([7, 8, 9], [10, 11, 12], temperature=0.7)
    group = Group(task="test/0", members=(Scored(trajectory=member),))
    batches = pack([group], needs=frozenset(), max_tokens=999)
    value, grads = gradients(learner, batches, StageObjective((EntropyBonus(weight=1.0),)))
    model = learner.policy.model
    model.causal.zero_grad(set_to_none=True)
    logp = (model.head(model.predicting(batches[0])) / 0.7).log_softmax(-1)
    entropies = -(logp.exp() * logp).sum(-1)
    (-entropies.mean()).backward()
    assert value == pytest.approx(-float(entropies.detach().mean()), rel=1e-5)
    for name, weight in model.causal.named_parameters():
        if name in grads:
            assert torch.allclose(grads[name], weight.grad, atol=1e-6), name
    (marked,) = learner.policy.entropies([member])
    assert marked[3:] == pytest.approx(entropies.detach().tolist(), rel=1e-5)
