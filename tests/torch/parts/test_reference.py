"""No log-prob is computed twice: data sets come round, adapters switch off."""

import json

import numpy as np
import pytest
import torch
from material import random_groups

from posttrain.core.learner import Lora, Optimizer
from posttrain.core.provenance import Kind, Producer, Sampling
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import pack
from posttrain.parts.composition import method
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.memory import Memory
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.protocols import Request
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.build import StageBuilder
from posttrain.run.plan import make_plan
from posttrain.testing import fake_tools
from posttrain.training.objective import StageObjective


class Counting:
    """A policy that notes what it is asked."""

    def __init__(self, policy, *, digest="d", version=None):
        self.policy, self.version, self.asked = policy, version, []
        self.producer = Producer(kind=Kind.TEACHER, name="c", digest=digest)

    def logprobs(self, trajectories):
        self.asked.append(len(trajectories))
        return self.policy.logprobs(trajectories)


@pytest.fixture
def frozen(engine, tiny_folder):
    return engine.policy(str(tiny_folder))


def flat(groups):
    return [m.columns[Column.REFERENCE_LOGPROB] for g in groups for m in g.members]


def test_the_second_epoch_asks_nothing_and_says_the_same(frozen):
    policy, groups = Counting(frozen), random_groups(num_groups=3, size=4)
    remembering = fake_tools(policies={"input": policy}, memory=Memory())
    signal = ReferenceLogprobs()
    first, again = (flat(signal.score(groups, remembering)) for _ in range(2))
    others = random_groups(num_groups=1, size=2, seed=9)
    mixed = flat(signal.score(others + groups[:1], remembering))
    assert policy.asked == [12, 2]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(first[:4], mixed[2:], strict=True):
        np.testing.assert_array_equal(a, b)
    plain = signal.score(groups, fake_tools(policies={"input": frozen}))
    for a, b in zip(first, flat(plain), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_weights_other_tokens_and_other_spans_are_asked_anew(frozen):
    (group,) = random_groups(num_groups=1, size=1)
    memory, one = Memory(), group.members[0].trajectory
    memory.logprobs(Counting(frozen, digest="a"), [one])
    other = Counting(frozen, digest="b")
    memory.logprobs(other, [one])
    assert other.asked == [1]
    live, nameless = Counting(frozen, version=3), Counting(frozen, digest=None)
    for policy in (live, nameless):
        memory.logprobs(policy, [one])
        memory.logprobs(policy, [one])
        assert policy.asked == [1, 1], "weights that may move are always asked"


def test_the_memory_is_bounded_and_forgets_what_was_not_asked_for_longest(frozen):
    policy = Counting(frozen)
    trajectories = [m.trajectory for g in random_groups(num_groups=4, size=2) for m in g.members]
    sizes = [4 * len(t) for t in trajectories]
    memory = Memory(limit_bytes=sum(sizes[:3]))
    for t in trajectories[:3]:
        memory.logprobs(policy, [t])
    memory.logprobs(policy, [trajectories[0]])  # now the second is the oldest
    memory.logprobs(policy, [trajectories[3]])
    assert memory.num_bytes <= sum(sizes[:3])
    policy.asked.clear()
    memory.logprobs(policy, [trajectories[0]])
    assert policy.asked == []
    memory.logprobs(policy, [trajectories[1]])
    assert policy.asked == [1]


def test_a_checkpoint_holds_the_memory_in_its_order(frozen, tmp_path):
    policy, groups = Counting(frozen), random_groups(num_groups=2, size=3)
    trajectories = [m.trajectory for g in groups for m in g.members]
    memory, resumed = Memory(), Memory()
    values = memory.logprobs(policy, trajectories)
    memory.save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.num_bytes == memory.num_bytes
    policy.asked.clear()
    for a, b in zip(values, resumed.logprobs(policy, trajectories), strict=True):
        np.testing.assert_array_equal(a, b)
    assert policy.asked == []
    resumed.save(tmp_path)
    assert list(resumed._values) == list(memory._values)
    Memory().save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.num_bytes == 0


def learner_with_adapters(engine, folder):
    return engine.learner(
        str(folder), name="t", optimizer=Optimizer(lr=3e-2), lora=Lora(rank=4), seed=0
    )


def test_adapters_off_are_the_policy_it_started_from(engine, tiny_folder):
    learner, frozen = learner_with_adapters(engine, tiny_folder), engine.policy(str(tiny_folder))
    groups = random_groups(num_groups=3, size=4)
    trajectories = [m.trajectory for g in groups for m in g.members]
    objective = StageObjective((CrossEntropy(),))
    for _ in range(3):
        learner.step(pack(groups, needs=frozenset(), max_tokens=999), objective, lr_scale=1.0)
    moved = learner.policy.logprobs(trajectories)
    for own, theirs, live in zip(
        learner.start.logprobs(trajectories), frozen.logprobs(trajectories), moved, strict=True
    ):
        np.testing.assert_array_equal(own, theirs)
        assert np.nanmax(np.abs(own - live)) > 1e-2, "training must have moved the policy"
    ids, values = learner.start.distributions(trajectories[:1], top_k=3)[0]
    expected = frozen.distributions(trajectories[:1], top_k=3)[0]
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(values, expected[1])
    request = Request(
        prompt=trajectories[0].tokens[:2], sampling=Sampling(seed=1), max_new_tokens=5
    )
    (own,), (theirs,) = learner.start.generate([request]), frozen.generate([request])
    assert own.tokens.tolist() == theirs.tokens.tolist()
    assert learner.start.producer == frozen.producer
    assert learner.start.version is None


def test_asking_the_start_changes_nothing_for_the_learner(engine, tiny_folder):
    """Adapters are on again, and trained on, after the reference was asked."""
    asked, plain = (learner_with_adapters(engine, tiny_folder) for _ in range(2))
    groups = random_groups()
    batches = pack(groups, needs=frozenset(), max_tokens=999)
    for _ in range(3):
        asked.start.logprobs([m.trajectory for g in groups for m in g.members])
        for learner in (asked, plain):
            learner.step(batches, StageObjective((CrossEntropy(),)), lr_scale=1.0)
    weights = dict(plain.policy.model.causal.named_parameters())
    for name, weight in asked.policy.model.causal.named_parameters():
        assert torch.equal(weight, weights[name])


def test_the_start_costs_no_second_model(engine, tiny_folder):
    learner = learner_with_adapters(engine, tiny_folder)
    own = {p.data_ptr() for p in learner.policy.model.causal.parameters()}
    start = {p.data_ptr() for p in learner.start._policy.model.causal.parameters()}
    assert start == own


def test_without_adapters_there_is_no_start(engine, tiny_folder):
    learner = engine.learner(str(tiny_folder), name="t", optimizer=Optimizer(), lora=None)
    assert learner.start is None


def test_a_stage_with_adapters_takes_its_reference_from_the_learner(engine, world):
    """Building the stage loads nothing: the reference is the learner without its adapters."""
    asked, planned = [], stage_with_reference(world)
    learner = learner_with_adapters(engine, world / "model")
    shop = StageBuilder(root=world, seed=0, tasksets={}, policy=asked.append)
    parts = shop.parts(planned, learner)
    groups, objective = parts.source.draw(1, step=0), StageObjective((CrossEntropy(),))
    learner.step(pack(groups, needs=frozenset(), max_tokens=999), objective, lr_scale=1.0)
    (signal,) = parts.signals
    trajectories = [m.trajectory for g in groups for m in g.members]
    start, live = (p.logprobs(trajectories) for p in (learner.start, learner.policy))
    for said, own, moved in zip(flat(signal(groups)), start, live, strict=True):
        np.testing.assert_array_equal(said, own)
        assert np.nanmax(np.abs(said - moved)) > 1e-3, "the learner itself has moved"
    assert asked == []


def test_a_data_set_with_a_reference_has_a_memory_in_its_checkpoints(engine, world):
    planned = stage_with_reference(world)
    learner = learner_with_adapters(engine, world / "model")
    shop = StageBuilder(root=world, seed=0, tasksets={}, policy=None)
    parts = shop.parts(planned, learner)
    (memory,) = parts.stateful
    assert isinstance(memory, Memory)
    assert memory.num_bytes == 0
    groups = parts.source.draw(1, step=0)
    (signal,) = parts.signals
    said = flat(signal(groups))
    assert memory.num_bytes == sum(v.nbytes for v in said), "it holds what the signal asked for"


@pytest.fixture
def world(tmp_path, tiny_folder):
    (tmp_path / "model").symlink_to(tiny_folder)
    turns = [{"role": "user", "content": "a"}]
    answers = {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": turns, **answers}) + "\n")
    return tmp_path


def stage_with_reference(root):
    dpo = method("dpo", data=Dataset(path="pairs.jsonl"))
    stage = Stage(name="dpo", method=dpo, budget=Budget(steps=1), lora=Lora(rank=4))
    recipe = Recipe(name="r", model="model", stages=(stage,))
    (planned,) = make_plan(recipe, root=root, base="-").stages
    return planned
