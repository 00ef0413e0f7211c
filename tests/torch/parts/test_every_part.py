"""Every part that is registered can be built and used, and an unknown name is an error.

A part that registers appears here by itself: with its defaults, or with the fewest options that it
needs, which stand in ``NEEDED``.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs
from staging import REWARD

from posttrain import Budget, Dataset, JsonlTasks, Recipe, Rollouts, Stage
from posttrain.catalogue.example import datasets_of, legal_example
from posttrain.core.config import convert
from posttrain.core.errors import ConfigError
from posttrain.core.trajectory import Column, Group
from posttrain.parts.legality import admit
from posttrain.parts.registry import find, known, tag_of
from posttrain.parts.rewards.verify import Verify
from posttrain.protocols import ScalarStart
from posttrain.run.build import StageBuilder
from posttrain.run.plan import make_plan
from posttrain.testing import (
    FakePolicy,
    FakeTaskSet,
    check_signal,
    check_source,
    check_taskset,
    check_term,
    fake_tools,
)
from posttrain.training.stage import micro_batches

OWN = Rollouts(tasks=("letters",), group_size=4, max_new_tokens=3)
ROWS = Dataset(path="rows.jsonl")
NEEDED = {
    ("term", "weighted_cross_entropy"): {"by": "weight"},
    ("term", "adaptive_entropy_bonus"): {"target": 0.5, "initial": 0.005},
    ("signal", "soft_length_penalty"): {"max_tokens": 3, "cache_tokens": 2},
    ("signal", "teacher_distribution"): {"routes": {"*": "teacher"}},
    ("signal", "teacher_logprobs"): {"routes": {"*": "teacher"}},
    ("signal", "foreign_teacher"): {"teacher": "teacher"},
    ("signal", "span_advantage"): {"teacher": "teacher"},
    ("signal", "delta_advantage"): {"teacher": "teacher", "base": "base"},
    ("signal", "keep_rewards"): {"best": 1},
    ("signal", "reward_model"): {"model": "judge"},
    ("signal", "process_reward"): {"model": "judge"},
    ("source", "rollouts"): {"tasks": ("letters",), "group_size": 4, "max_new_tokens": 3},
    ("source", "dataset"): {"path": "rows.jsonl"},
    ("source", "mix"): {"parts": (ROWS, OWN), "shares": (0.5, 0.5)},
    ("source", "redraw"): {"source": OWN},
    ("task_set", "jsonl"): {"path": "rows.jsonl", "held_out": 2},
    ("task_set", "reasoning_gym"): {"dataset": "chain_sum", "train": 4, "held_out": 2},
}


def built(role, tag):
    return find(role, tag)(**NEEDED.get((role, tag), {}))


def test_no_entry_is_left_over():
    assert not [place for place in NEEDED if place[1] not in known(place[0])]


# --- alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", known("term"))
def test_every_term_keeps_the_contract(tag):
    check_term(built("term", tag))


def column(name: Column, trajectory, nth: int):
    """Plausible values: log-probs below zero, and numbers of both signs in every group."""
    value = 1.0 if nth % 2 else -1.0
    if not name.per_token:
        return np.asarray(value)
    value = -2.0 if name.endswith("logprob") else value
    return np.where(trajectory.trainable, value, np.nan).astype(np.float32)


def with_needs(groups, needs):
    out = []
    for group in groups:
        members = []
        for nth, member in enumerate(group.members):
            missing = needs - member.columns.keys() - {Column.BEHAVIOUR_LOGPROB}
            made = {c: column(c, member.trajectory, nth) for c in sorted(missing)}
            members.append(member.with_columns(made))
        out.append(Group(task=group.task, members=tuple(members)))
    return out


@pytest.mark.parametrize("tag", known("signal"))
def test_every_signal_keeps_the_contract(tag):
    signal = built("signal", tag)
    live = FakePolicy({"a": 0.4, "b": 0.6}, version=0, judgement=lambda text: len(text) / 10)
    other = FakePolicy({"a": 0.7, "b": 0.3}, name="other", judgement=len)
    policies = dict.fromkeys(signal.references(), other)
    tools = fake_tools(live, policies=policies, tasksets={"letters": FakeTaskSet()}, longest=3)
    tools = replace(tools, judge=lambda groups: Verify().score(groups, tools))
    source = Rollouts(tasks=("letters",), group_size=max(2, signal.min_group), max_new_tokens=3)
    groups = with_needs(source.open(tools, seed=0).draw(3, step=0), signal.needs)
    for scored in check_signal(signal, groups, tools):
        assert all(signal.provides <= member.columns.keys() for member in scored.members)


@pytest.mark.parametrize("tag", known("source"))
def test_every_source_keeps_the_contract(tag, tmp_path):
    rows = [{"prompt": f"say {i}", "completion": "ab"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tools = fake_tools(tasksets={"letters": FakeTaskSet(size=64)}, root=tmp_path)
    check_source(built("source", tag), tools)


@pytest.mark.parametrize("tag", known("task_set"))
def test_every_task_set_keeps_the_contract(tag, tmp_path):
    rows = [{"prompt": f"say {i}", "answer": "a"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_taskset(built("task_set", tag).build("set", root=tmp_path, chat=False))


# --- in a stage ------------------------------------------------------------------------------


def row(columns, i):
    """A row of a data file with these columns; labels differ from row to row."""
    values = {
        "prompt": f"say {i}",
        "completion": "abcdef"[: 2 + i % 4],
        "chosen": "abcd"[: 1 + i % 4],
        "rejected": "xyz"[: 1 + i % 3],
        "label": bool(i % 2),
        "reward": float(i % 3 - 1),
        "weight": 1.0 + i % 2,
        "completions": ["a", "b"],
        "labels": [True, bool(i % 2)],
    }
    return {name: values[name] for name in columns}


@pytest.fixture
def stage_of(tmp_path, engine, tiny_folder):
    """Builds the stage of a method, with everything that its example names."""
    tasks = [{"prompt": f"say {i}", "answer": "abcdef"[: 3 + i % 3]} for i in range(12)]
    (tmp_path / "reward.py").write_text(REWARD)
    write_rows(tmp_path / "tasks.jsonl", tasks)
    spec = JsonlTasks(path="tasks.jsonl", reward="reward.py:reward", held_out=2)

    def build(method):
        composition = method.compose()
        for data in datasets_of(composition):
            columns = {*data.row_columns, *filter(None, data.number_columns.values())}
            write_rows(tmp_path / data.path, [row(columns, i) for i in range(12)])
        stage = Stage(name="s", method=method, budget=Budget(steps=2), groups_per_step=4)
        recipe = Recipe(name="r", model="m", tasks={"sums": spec}, stages=(stage,))
        (planned,) = make_plan(recipe, root=tmp_path, base="b").stages
        head = composition.scalar_head
        learner = engine.learner(
            str(tiny_folder),
            name="s",
            optimizer=planned.spec.optimizer,
            lora=None,
            moving=composition.moving,
            scalar=head and ScalarStart(trunk=head.trunk, model=str(tiny_folder), lr=head.lr),
        )
        builder = StageBuilder(
            root=tmp_path,
            seed=0,
            tasksets={"sums": spec.build("sums", root=tmp_path, chat=True)},
            policy=lambda ref: engine.policy(str(tiny_folder)),
        )
        return planned, builder.parts(planned, learner)

    return build


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SHORT = {"max_new_tokens": 6, "length_cache": 4}
"""So that a step of a tiny model takes no time."""


@pytest.mark.parametrize("name", known("method"))
def test_every_method_takes_a_step(name, stage_of):
    """From the recipe's example to an optimiser step, with nothing but what the method says."""
    _, method = legal_example(name, known("method")[name])
    short = {n: v for n, v in SHORT.items() if n in method.__struct_fields__}
    planned, parts = stage_of(structs.replace(method, **short))
    groups = parts.source.draw(planned.spec.groups_per_step, step=0)
    for signal in parts.signals:
        groups = signal(groups)
    admission = admit(groups, parts.terms, version=parts.learner.policy.version, max_age=0)
    batches = micro_batches(planned.spec, parts, admission.kept)
    report = parts.learner.step(batches, parts.objective.at(step=0, steps=2), lr_scale=1.0)
    assert np.isfinite([report.loss, report.grad_norm]).all()
    tags = {tag_of(term) for term in parts.terms}
    assert all(any(m.startswith(tag) for m in report.metrics) for tag in tags)


# --- unknown names ---------------------------------------------------------------------------

OPEN = {"type": "rollouts", "tasks": ["t"]}
CLOSED = {"type": "cross_entropy"}


def composed(**changes):
    method = {"name": "compose", "source": OPEN, "terms": [CLOSED], **changes}
    return {"stages": [{"name": "s", "method": method, "budget": {"steps": 1}}]}


def named(**method):
    return {"stages": [{"name": "s", "method": method, "budget": {"steps": 1}}]}


UNKNOWN = {
    "a term": (composed(terms=[{"type": "cros_entropy"}]), "cros_entropy", "cross_entropy"),
    "a signal": (composed(signals=[{"type": "verifyy"}]), "verifyy", "verify"),
    "a source": (composed(source={"type": "rolouts"}), "rolouts", "rollouts"),
    "a source in a mix": (
        composed(source={"type": "mix", "parts": [{"type": "datset"}], "shares": [1]}),
        *("datset", "dataset"),
    ),
    "a judge": (named(name="grpo", tasks=["t"], rewards=[{"type": "verifi"}]), "verifi", "verify"),
    "a sieve": (
        composed(source={"type": "redraw", "source": OPEN, "keep": [{"type": "keep_reward"}]}),
        *("keep_reward", "keep_rewards"),
    ),
    "a method": (named(name="grpoo", tasks=["t"]), "grpoo", "grpo"),
    "a task set": ({"tasks": {"t": {"type": "jsonll"}}}, "jsonll", "jsonl"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_name_in_a_recipe_is_an_error_with_the_nearest(case):
    changes, wrong, right = UNKNOWN[case]
    with pytest.raises(ConfigError, match=f"Invalid value '{wrong}' - at") as caught:
        convert({"name": "r", "model": "m", **changes}, Recipe, origin="r.yaml")
    assert caught.value.fix == f"did you mean '{right}'?"


@pytest.mark.parametrize("role", ["term", "signal", "source", "method", "task_set"])
def test_an_unknown_name_in_python_is_an_error_with_the_nearest(role):
    for tag in known(role):
        assert find(role, tag) is known(role)[tag]
    with pytest.raises(ConfigError, match=f"no {role} '{tag}x'") as caught:
        find(role, f"{tag}x")
    assert caught.value.fix == f"did you mean '{tag}'?"


def test_a_signal_that_does_not_judge_is_no_judge():
    wrong = named(name="grpo", tasks=["t"], rewards=[{"type": "group_advantage"}])
    with pytest.raises(ConfigError) as caught:
        convert({"name": "r", "model": "m", **wrong}, Recipe, origin="r.yaml")
    judges = sorted(tag for tag, kind in known("signal").items() if kind.judges)
    assert caught.value.fix == f"known: {', '.join(judges)}"
