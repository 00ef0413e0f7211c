"""Every part that is registered can be built and used, and an unknown name is an error.

A part that registers appears here by itself: with its defaults, or with the fewest options that it
needs, which stand in ``NEEDED``.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from posttrain import Dataset, Rollouts
from posttrain.core.trajectory import Column, Group
from posttrain.parts.registry import find, known
from posttrain.parts.rewards.verify import Verify
from posttrain.testing import (
    FakePolicy,
    FakeTaskSet,
    check_signal,
    check_source,
    check_taskset,
    check_term,
    fake_tools,
)

OWN = Rollouts(tasks=("letters",), group_size=4, max_new_tokens=3)
ROWS = Dataset(path="rows.jsonl")
NEEDED = {
    ("term", "weighted_cross_entropy"): {"by": "weight"},
    ("term", "adaptive_entropy_bonus"): {"target": 0.5},
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
