"""Choosing among answers: who stays, why the others go, and what the stage then trains on."""

import json

import numpy as np
import pytest
import torch
from material import random_groups, trajectory, with_column

from posttrain.core.errors import ConfigError, DataError, Interrupted, LegalityError
from posttrain.core.events import StepDone
from posttrain.core.learner import Optimizer
from posttrain.core.trajectory import Column, Discard, Group, Scored
from posttrain.engines.local.engine import LocalEngine
from posttrain.parts.base import WeightSchedule
from posttrain.parts.composition import Compose, method
from posttrain.parts.legality import admit, check_composition
from posttrain.parts.offline.filters import KeepPositiveAdvantages, KeepRewards
from posttrain.parts.registry import known, tag_of
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.formats import row_numbers
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.parts.supervised.rejection import Raft, RestEm, Rft, Ssd, Star
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.build import StageBuilder
from posttrain.run.journal import Journal
from posttrain.run.ledger import Ledger
from posttrain.run.plan import make_plan
from posttrain.run.stage_folder import StageWriter
from posttrain.run.store import UseRole, read_uses
from posttrain.tasks.jsonl import JsonlTasks, JsonlTaskSet
from posttrain.testing import check_signal, fake_tools
from posttrain.training.stage import run_stage


def group(rewards, answers=None):
    answers = answers or [[10 + i] for i in range(len(rewards))]
    members = tuple(
        Scored(trajectory=trajectory([1, 2], a)).with_columns({Column.REWARD: np.asarray(r)})
        for r, a in zip(rewards, answers, strict=True)
    )
    return Group(task="test/0", members=members)


def verdicts(spec, *groups):
    scored = spec.score(groups, fake_tools())
    return [[str(tuple(Discard)[int(m.scalar(Column.DISCARD))]) for m in g.members] for g in scored]


def test_a_threshold_keeps_what_reaches_it():
    assert verdicts(KeepRewards(at_least=0.5), group([0.4, 0.5, 1.0, 0.0])) == [
        ["reward too low", "kept", "kept", "reward too low"]
    ]


def test_the_best_of_each_group_stays_and_of_equals_the_earlier():
    assert verdicts(KeepRewards(best=1), group([0.0, 1.0, 1.0]), group([-1.0, -2.0])) == [
        ["not among the best", "kept", "not among the best"],
        ["kept", "not among the best"],
    ]
    assert verdicts(KeepRewards(best=2), group([0.3, 0.1, 0.2])) == [
        ["kept", "not among the best", "kept"]
    ]


def test_duplicates_go_before_the_best_are_chosen_and_after_the_threshold():
    answers = [[10, 11], [10, 11], [12], [13], [10, 11]]
    spec = KeepRewards(at_least=1.0, best=2, distinct=True)
    assert verdicts(spec, group([0.0, 1.0, 1.0, 1.0, 1.0], answers)) == [
        ["reward too low", "kept", "kept", "not among the best", "duplicate"]
    ]


def test_an_earlier_verdict_stands():
    first = KeepRewards(at_least=0.5).score([group([0.0, 1.0, 2.0])], fake_tools())
    (second,) = KeepRewards(best=1).score(first, fake_tools())
    codes = [m.scalar(Column.DISCARD) for m in second.members]
    wanted = [Discard.LOW_REWARD, Discard.NOT_BEST, Discard.KEPT]
    assert codes == [w.code for w in wanted]


def test_positive_advantages_stay():
    groups = with_column([group([0.0, 0.0, 0.0])], Column.ADVANTAGE, lambda t: np.zeros(len(t)))
    values = iter([0.2, 0.0, -0.3])
    groups = with_column(groups, Column.ADVANTAGE, lambda t: np.full(len(t), next(values)))
    (scored,) = KeepPositiveAdvantages().score(groups, fake_tools())
    assert [m.scalar(Column.DISCARD) for m in scored.members] == [
        Discard.KEPT.code,
        Discard.NO_ADVANTAGE.code,
        Discard.NO_ADVANTAGE.code,
    ]


def test_a_filter_keeps_the_contract_of_signals():
    groups = with_column(random_groups(), Column.REWARD, lambda t: np.asarray(1.0))
    scored = check_signal(KeepRewards(best=1), groups)
    assert all(Column.DISCARD in m.columns for g in scored for m in g.members)


def test_admission_trains_on_the_kept_and_says_why_the_others_went():
    answers = [group([0.0, 1.0]), group([0.0, 0.0])]
    groups = KeepRewards(at_least=1.0).score(answers, fake_tools())
    admission = admit(groups, [CrossEntropy()], version=0, max_age=0)
    assert [len(g.members) for g in admission.kept] == [1]
    assert admission.kept[0].members[0].scalar(Column.REWARD) == 1.0
    discarded = admission.discarded[Discard.LOW_REWARD]
    assert sum(len(g.members) for g in discarded) == 3


@pytest.mark.parametrize("options", [{}, {"best": 0}])
def test_a_filter_that_does_nothing_or_everything_is_refused(options):
    with pytest.raises(ConfigError):
        KeepRewards(**options)


@pytest.mark.parametrize("kind", [Raft, RestEm])
def test_keeping_the_whole_group_is_refused(kind):
    with pytest.raises(ConfigError, match="best < group_size"):
        kind(tasks=("t",), best=8, group_size=8)


def test_an_answer_without_a_reward_is_refused():
    bare = Group(task="test/0", members=(Scored(trajectory=trajectory([1], [2])),))
    with pytest.raises(LegalityError, match="no reward"):
        KeepRewards(at_least=1.0).score([bare], fake_tools())


def test_every_named_method_is_legal():
    for kind in (Rft, Raft, Star, RestEm, Ssd):
        check_composition(kind(tasks=("t",)).compose(), stage="s")
        assert known("method")[tag_of(kind)] is kind


# --- numbers of a data file ------------------------------------------------------------------


def test_numbers_of_a_row():
    spec = Dataset(path="x", reward="score", weight="w")
    numbers = row_numbers({"score": -2, "w": 0.5, "prompt": "p"}, spec.number_columns)
    assert {c: float(v) for c, v in numbers.items()} == {Column.REWARD: -2.0, Column.WEIGHT: 0.5}
    assert spec.provides == {Column.REWARD, Column.WEIGHT}
    assert row_numbers({"score": 1}, Dataset(path="x").number_columns) == {}


@pytest.mark.parametrize("value", [None, "1", True, float("nan"), float("inf")])
def test_a_reward_must_be_a_number(value):
    with pytest.raises(DataError, match="finite number"):
        row_numbers({"score": value}, Dataset(path="x", reward="score").number_columns)


def test_a_weight_is_not_negative():
    with pytest.raises(DataError, match="0 or more"):
        row_numbers({"w": -0.1}, Dataset(path="x", weight="w").number_columns)


# --- whole stages ----------------------------------------------------------------------------

REWARD = """
def reward(prompts, completions, **columns):
    return [float(sum(c.isalpha() for c in text) % 2) for text in completions]
"""


@pytest.fixture
def world(tmp_path, tiny_folder):
    """A folder with a task set, logged answers, and a way to run a stage in it."""
    rows = [{"prompt": f"say {i}"} for i in range(12)]
    logged = [
        {"prompt": f"say {i}", "completion": "abc"[: 1 + i % 3], "score": i % 3 - 1.0, "w": i % 2}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "logged.jsonl").write_text("".join(json.dumps(r) + "\n" for r in logged))
    (tmp_path / "reward.py").write_text(REWARD)
    spec = JsonlTasks(path="rows.jsonl", reward="reward.py:reward", held_out=2)
    taskset = JsonlTaskSet("rows", spec, root=tmp_path, chat=True)
    engine = LocalEngine(device=torch.device("cpu"))

    def go(intervention, out, *, steps=4, stop_after=None, **options):
        stage = Stage(
            name="s",
            method=intervention,
            budget=Budget(steps=steps),
            optimizer=Optimizer(lr=1e-2),
            groups_per_step=3,
            checkpoint_every=1,
            **options,
        )
        recipe = Recipe(name="r", model=str(tiny_folder), tasks={"rows": spec}, stages=(stage,))
        (planned,) = make_plan(recipe, root=tmp_path, base="-").stages
        learner = engine.learner(str(tiny_folder), name="s", optimizer=stage.optimizer, lora=None)
        builder = StageBuilder(
            root=tmp_path,
            seed=0,
            tasksets={"rows": taskset},
            policy=lambda ref: engine.policy(str(tiny_folder)),
        )
        seen = []

        def stop():
            return stop_after is not None and len(seen) >= stop_after

        folder = tmp_path / out
        journal = Journal(
            StageWriter(folder / "stage", Ledger.open(folder / "ledger.jsonl")),
            stage="s",
            identity=planned.identity,
            facts={},
        )
        run_stage(
            stage,
            builder.parts(planned, learner),
            steps=steps,
            journal=journal,
            observe=seen.append,
            stop=stop,
        )
        return learner, [event.metrics for event in seen if isinstance(event, StepDone)]

    return go, tmp_path


def uses(folder):
    return [
        u for p in sorted((folder / "stage/shards").glob("*.uses.parquet")) for u in read_uses(p)
    ]


def test_a_rejection_stage_trains_on_right_answers_and_records_the_others(world):
    go, root = world
    rft = Rft(tasks=("rows",), group_size=4, max_new_tokens=5)
    _, metrics = go(rft, "rft", steps=3)
    recorded = uses(root / "rft")
    assert len(recorded) == 3 * 3 * 4
    trained = [u for u in recorded if u.role is UseRole.TRAIN]
    left_out = [u for u in recorded if u.role is UseRole.DISCARDED]
    assert trained
    assert {u.reward for u in trained} == {1.0}
    assert {u.reason for u in left_out if u.reward == 0.0} == {"reward too low"}
    assert all(u.reason == "duplicate" for u in left_out if u.reward == 1.0)
    shown = sum(m.get("discarded/reward too low", 0) for m in metrics)
    assert shown == sum(u.reason == "reward too low" for u in left_out)
    assert {u.producer for u in recorded} != {"s"}  # a frozen copy wrote them, not the learner


def test_a_step_without_a_kept_answer_changes_nothing(world):
    go, root = world
    learner, metrics = go(Rft(tasks=("rows",), at_least=5.0, max_new_tokens=4), "none", steps=2)
    assert [m["loss"] for m in metrics] == [0.0, 0.0]
    start, _ = go(Rft(tasks=("rows",), at_least=5.0, max_new_tokens=4), "again", steps=1)
    for (name, a), (_, b) in zip(
        learner.policy.model.causal.named_parameters(),
        start.policy.model.causal.named_parameters(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    assert {u.role for u in uses(root / "none")} == {UseRole.DISCARDED}


@pytest.mark.parametrize("name", ["weighted_sft", "awr", "a_lol", "r_gold", "dft", "psft"])
def test_a_method_runs_on_logged_answers(world, name):
    go, root = world
    data = Dataset(path="logged.jsonl", reward="score", weight="w")
    _, metrics = go(method(name, data=data), name, steps=4, updates_per_draw=2)
    assert all(np.isfinite(m["loss"]) for m in metrics)
    assert max(m["grad_norm"] for m in metrics) > 0
    if name == "a_lol":  # rewards of a draw are −1, 0 and 1, so one of three is above their mean
        kept = [u for u in uses(root / name) if u.role is UseRole.TRAIN]
        assert {u.reward for u in kept} <= {0.0, 1.0}
        assert {u.reason for u in uses(root / name) if u.role is UseRole.DISCARDED} == {
            "no advantage"
        }
    if name == "psft":
        ratios = [m["psft/ratio"] for m in metrics]
        assert ratios[0] == pytest.approx(1, abs=1e-5)  # drawn now
        assert ratios[2] == pytest.approx(1, abs=1e-5)
        assert abs(ratios[1] - 1) > 1e-4  # one update later


def test_a_moving_weight_survives_an_interruption_bit_for_bit(world):
    go, _ = world
    term = CrossEntropy(weight=1.0, weight_schedule=WeightSchedule(end=0.1, shape="cosine"))
    composed = Compose(
        source=Dataset(path="logged.jsonl"), terms=(term, replace_weight(term, weight=0.2))
    )
    whole, metrics = go(composed, "whole", steps=5)
    with pytest.raises(Interrupted):
        go(composed, "parts", steps=5, stop_after=2)
    resumed, rest = go(composed, "parts", steps=5)
    weights = [m["cross_entropy-1/weight"] for m in metrics]
    assert weights[0] == 1.0
    assert weights[-1] == pytest.approx(0.1, abs=1e-12)
    assert weights[2] == pytest.approx(0.55, abs=1e-12)  # the middle of a cosine
    assert [m["cross_entropy-1/weight"] for m in rest] == weights[2:]
    for (name, a), (_, b) in zip(
        whole.policy.model.causal.named_parameters(),
        resumed.policy.model.causal.named_parameters(),
        strict=True,
    ):
        assert torch.equal(a, b), name


def replace_weight(term, **options):
    fields = {f: getattr(term, f) for f in term.__struct_fields__}
    return CrossEntropy(**{**fields, **options})
