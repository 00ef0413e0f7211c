"""References that follow the learner: their weights, what is exact, and who uses them."""

import numpy as np
import pytest
import torch
from material import random_groups, trajectory, with_column
from staging import check_resume, make_world, untimed

from posttrain.core.errors import ConfigError, LegalityError, RunError
from posttrain.core.learner import MOVING, Lora, MovingReference, Optimizer
from posttrain.core.rendering import SAMPLED
from posttrain.core.task import Task
from posttrain.core.trajectory import Column, Discard
from posttrain.engines.local.engine import LocalEngine
from posttrain.numerics.batch import pack
from posttrain.parts.base import bound
from posttrain.parts.composition import Compose, Composition, method
from posttrain.parts.distillation.divergences import TeacherReverseKL
from posttrain.parts.distillation.presets import SUCCESS_SHOWN, Sdft, Sdpo
from posttrain.parts.distillation.teachers import TeacherDistribution, TeacherLogprobs
from posttrain.parts.legality import admit, check_composition
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.preference.self_play import TrDpo
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.recipe import Budget, Stage
from posttrain.testing import FakeTaskSet, check_signal, fake_tools
from posttrain.training.objective import StageObjective

OBJECTIVE = StageObjective((CrossEntropy(),))
PAIRS = Dataset(path="pairs.jsonl")


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


def make(engine, folder, spec, *, lora=None, lr=1e-2):
    return engine.learner(str(folder), name="t", optimizer=Optimizer(lr=lr), lora=lora, moving=spec)


def trained(learner):
    return {n: w.double().numpy().copy() for n, w in learner._masters.state().items()}


def following(learner):
    return {n: w.double().numpy().copy() for n, w in learner._average.state().items()}


def step(learner, seed):
    batches = pack(random_groups(seed=seed), needs=frozenset(), max_tokens=99)
    learner.step(batches, OBJECTIVE, lr_scale=1.0)


# --- the weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
@pytest.mark.parametrize(("every", "rate"), [(1, 0.05), (2, 0.6), (3, 1.0), (1, 1.0)])
def test_it_follows_by_the_recursion(engine, tiny_folder, lora, every, rate):
    """φ ← (1 − rate) φ + rate θ in float64, from the learner's own weights after every step."""
    learner = make(engine, tiny_folder, MovingReference(every=every, rate=rate), lora=lora)
    expected = trained(learner)
    for number in range(1, 6):
        step(learner, number)
        if number % every == 0:
            now = trained(learner)
            expected = {n: (1 - rate) * w + rate * now[n] for n, w in expected.items()}
        for name, weight in following(learner).items():
            np.testing.assert_allclose(weight, expected[name], atol=2e-7, err_msg=name)
    assert max(np.abs(expected[n] - w).max() for n, w in trained(learner).items()) > (
        1e-3 if (every, rate) != (1, 1.0) else -1
    )


def test_a_copy_is_exact_and_is_used(engine, tiny_folder):
    learner = make(engine, tiny_folder, MovingReference(every=2))
    probe = [m.trajectory for g in random_groups(seed=9) for m in g.members]
    start = learner.policy.logprobs(probe)
    step(learner, 0)
    same = zip(learner.moving.logprobs(probe), start, strict=True)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in same), "not due yet"
    moved = zip(learner.policy.logprobs(probe), start, strict=True)
    assert max(np.nanmax(np.abs(a - b)) for a, b in moved) > 0.01
    step(learner, 1)
    same = zip(learner.moving.logprobs(probe), learner.policy.logprobs(probe), strict=True)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in same)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_only_what_is_trained_exists_twice(engine, tiny_folder, lora):
    learner = make(engine, tiny_folder, MovingReference(), lora=lora)
    ours = dict(learner.policy.model.causal.named_parameters())
    twice = set()
    for name, weight in learner.moving.model.causal.named_parameters():
        assert not weight.requires_grad
        if weight.data_ptr() != ours[name].data_ptr():
            twice.add(name)
    assert twice == set(learner._masters.state())
    assert all(ours[n].requires_grad for n in twice), "the learner is still trained"


def test_small_rates_are_not_lost_in_bfloat16(tiny_folder):
    engine = LocalEngine(device=torch.device("cpu"), dtype="bfloat16")
    learner = make(engine, tiny_folder, MovingReference(rate=0.01), lr=1e-3)
    before = following(learner)
    for seed in range(4):
        step(learner, seed)
    moved = np.mean([np.abs(w - before[n]).mean() for n, w in following(learner).items()])
    gone = np.mean([np.abs(w - before[n]).mean() for n, w in trained(learner).items()])
    assert 0.01 * gone < moved < 0.05 * gone
    live = dict(learner.moving.model.causal.named_parameters())
    state = learner._average.state()
    assert all(torch.equal(live[n], w.bfloat16()) for n, w in state.items())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_save_and_load_go_on_bit_for_bit(engine, tiny_folder, tmp_path, lora):
    spec = MovingReference(every=2, rate=0.3)
    straight = make(engine, tiny_folder, spec, lora=lora)
    for seed in range(3):
        step(straight, seed)
    straight.save(tmp_path)
    resumed = make(engine, tiny_folder, spec, lora=lora)
    resumed.load(tmp_path)
    for seed in range(3, 6):
        step(straight, seed)
        step(resumed, seed)
    ours, theirs = straight._average.state(), resumed._average.state()
    assert all(torch.equal(ours[n], w) for n, w in theirs.items())


def test_a_checkpoint_without_it_is_refused(engine, tiny_folder, tmp_path):
    make(engine, tiny_folder, None).save(tmp_path)
    with pytest.raises(RunError, match=r"(?i)moving ?reference"):
        make(engine, tiny_folder, MovingReference()).load(tmp_path)


# --- TR-DPO ----------------------------------------------------------------------------------


def test_tr_dpo_that_is_never_due_is_dpo(world):
    _, still = world.run(TrDpo(data=PAIRS, every=99), "tr", steps=3)
    _, plain = world.run(method("dpo", data=PAIRS, beta=0.05), "dpo", steps=3)
    # Only a reference that never moves has log-probs that can be remembered.
    assert [m.pop("logprobs_remembered") for m in plain] == [0.0] * 3
    assert untimed(still) == untimed(plain)


def test_tr_dpo_with_a_copy_at_every_step_never_leaves_log_2(world):
    """The reference is the policy that is about to be updated: every ratio is 1."""
    _, metrics = world.run(TrDpo(data=PAIRS, every=1, rate=1.0), "tr", steps=3)
    assert [m["loss"] for m in metrics] == pytest.approx([np.log(2)] * 3, abs=1e-5)
    assert all(abs(m["dpo/margin"]) < 1e-4 for m in metrics)
    assert all(m["grad_norm"] > 0.1 for m in metrics), "and still there is something to learn"


def test_tr_dpo_moves_only_when_it_is_due(world):
    _, copied = world.run(TrDpo(data=PAIRS, every=2, rate=1.0), "copied", steps=4)
    _, still = world.run(TrDpo(data=PAIRS, every=99), "still", steps=4)
    assert untimed(copied[:2]) == untimed(still[:2])
    assert copied[2]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert copied[3]["loss"] != pytest.approx(np.log(2), abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"lora": Lora(rank=2)}])
def test_a_stopped_tr_dpo_stage_resumes_exactly(world, options):
    _, metrics = check_resume(world, TrDpo(data=PAIRS, every=3, rate=0.6), steps=5, **options)
    assert len(metrics) == 5


# --- teachers --------------------------------------------------------------------------------


def test_self_distillation_from_an_average_resumes_exactly(world):
    method = Sdft(tasks=("rows",), max_new_tokens=4, context="{answer} {question}", rate=0.2)
    learner, _ = check_resume(world, method, steps=4, stop_after=1)
    assert learner.moving is not None


def test_sdft_from_the_learner_or_from_a_frozen_policy_keeps_no_second_weights():
    assert Sdft(tasks=("t",)).compose().moving == MovingReference(rate=0.01)
    for teacher in ("learner", "base"):
        assert Sdft(tasks=("t",), teacher=teacher).compose().moving is None


def rewarded(learner, *rewards):
    tasks = {"letters": FakeTaskSet()}
    spec = Rollouts(tasks=("letters",), group_size=len(rewards), max_new_tokens=4)
    tools = fake_tools(learner.policy, policies={"t": learner.policy}, tasksets=tasks)
    (group,) = spec.open(tools, seed=3).draw(1, step=0)
    left = iter(rewards)
    (group,) = with_column([group], Column.REWARD, lambda t: np.array(next(left)))
    return group, tools


def test_a_teacher_is_shown_the_first_other_answer_that_succeeded(learner):
    group, tools = rewarded(learner, 0.0, 1.0, 1.0, 0.5)
    spec = TeacherDistribution(routes={"*": "t"}, context="{success}! {question}")
    (scored,) = check_signal(spec, [group], tools)
    renderer = learner.policy.renderer
    for member, shown in zip(scored.members, (1, 2, 1, 1), strict=True):
        record, sibling = member.trajectory, group.members[shown].trajectory
        text = renderer.text(sibling.tokens[sibling.prompt_length :])
        question = tools.drawn_tasks[record.task].text
        shown_task = Task(taskset="x", prompt=f"{text}! {question}")
        prompt = renderer.prompt(shown_task, rules=SAMPLED).tokens
        answer = record.tokens[record.prompt_length :]
        by_hand = trajectory(prompt.tolist(), answer.tolist())
        ((_, values),) = learner.policy.distributions([by_hand], top_k=None)
        got = member.columns[Column.TEACHER_LOGPROBS][record.prompt_length :]
        np.testing.assert_allclose(got, values[len(prompt) :], atol=1e-5)
        assert member.scalar(Column.DISCARD) == 0


def test_without_a_successful_sibling_there_is_nothing_to_learn(learner):
    spec = TeacherDistribution(routes={"*": "t"}, context=SUCCESS_SHOWN, top_k=4)
    group, tools = rewarded(learner, 0.0, 1.0, 0.0)
    score = bound(spec, tools)
    (scored,) = score([group])
    alone = Discard.NO_SUCCESS.code
    assert [m.scalar(Column.DISCARD) for m in scored.members] == [0, alone, 0], "not itself"
    cut = iter([Discard.CUT_OFF.code, 0, 0])
    (marked,) = with_column([group], Column.DISCARD, lambda t: np.array(float(next(cut))))
    (scored,) = score([marked])
    assert [m.scalar(Column.DISCARD) for m in scored.members] == [2, alone, 0]
    admitted = admit([scored], (CrossEntropy(),), version=0, max_age=0)
    assert len(admitted.kept[0].members) == 1


def test_sdpo_runs_and_resumes_exactly(world):
    method = Sdpo(
        tasks=("rows",), group_size=4, max_new_tokens=4, context="{success} {question}", top_k=None
    )
    learner, metrics = check_resume(world, method, steps=3, stop_after=1)
    assert any(m["loss"] > 1e-4 for m in metrics)
    assert learner.moving is not None


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"every": 0}, {"rate": 0.0}, {"rate": 1.5}])
def test_a_reference_that_could_not_move_is_refused(options):
    with pytest.raises(ConfigError, match=r"(?i)moving ?reference"):
        MovingReference(**options)


def test_it_must_be_declared_and_used(world):
    term = (Dpo(),)
    pairs = Dataset(path="pairs.jsonl", preference=True)
    undeclared = Compose(source=pairs, signals=(ReferenceLogprobs(policy=MOVING),), terms=term)
    with pytest.raises(ConfigError, match="has no moving reference"):
        world.plan(undeclared)
    unused = Compose(
        source=pairs, signals=(ReferenceLogprobs(),), terms=term, moving=MovingReference()
    )
    with pytest.raises(ConfigError, match="no part refers to policy 'moving'"):
        world.plan(unused)


def test_its_name_and_its_options_count_in_the_identity(world):
    identities = {world.plan(TrDpo(data=PAIRS, rate=rate)).identity for rate in (0.6, 0.7)}
    assert len(identities) == 2
    with pytest.raises(ConfigError, match="stage name 'moving'"):
        Stage(name="moving", method=method("dpo", data=PAIRS), budget=Budget(steps=1))


def test_no_stage_starts_from_it(world):
    method = TrDpo(data=PAIRS)
    with pytest.raises(ConfigError, match="refers to policy 'moving'"):
        world.plan(method, init=MOVING)


def test_siblings_need_rewards_and_a_group():
    def composed(size, *signals):
        spec = TeacherDistribution(routes={"*": "base"}, context="{success} {question}")
        return Composition(
            source=Rollouts(tasks=("t",), group_size=size),
            signals=(*signals, spec),
            terms=(TeacherReverseKL(),),
        )

    check_composition(composed(2, Verify()), stage="s")
    with pytest.raises(LegalityError, match="needs reward"):
        check_composition(composed(2), stage="s")
    with pytest.raises(LegalityError, match="groups of 1"):
        check_composition(composed(1, Verify()), stage="s")
    with pytest.raises(ConfigError, match="at least 2"):
        Sdpo(tasks=("t",), group_size=1)
    with pytest.raises(ConfigError, match="a template with"):
        TeacherLogprobs(routes={"*": "base"}, context="{success} {question}")


def test_the_composition_of_tr_dpo_written_out():
    assert TrDpo(data=PAIRS, rate=1.0, every=64).compose() == Composition(
        source=Dataset(path="pairs.jsonl", preference=True),
        signals=(ReferenceLogprobs(policy="moving"),),
        terms=(Dpo(beta=0.05),),
        moving=MovingReference(every=64, rate=1.0),
    )
