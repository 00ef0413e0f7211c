"""The verifier: one reward per trajectory, from the task set that its task belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from posttrain.core.errors import TaskError
from posttrain.core.provenance import Kind, Producer, Role, Span
from posttrain.core.task import Task
from posttrain.core.trajectory import Column, Group, Scored, Trajectory
from posttrain.parts.base import bound
from posttrain.parts.rewards.verify import Verify
from posttrain.testing import fake_tools

ME = Producer(kind=Kind.LEARNER, name="run")


def verify(groups, *tasksets):
    """The groups as ``verify`` judges them in a stage with these task sets."""
    return bound(Verify(), fake_tools(tasksets={t.name: t for t in tasksets}))(groups)


@dataclass
class Counting:
    """Scores a completion by its length, plus an offset of the set; remembers its calls."""

    name: str
    train: tuple[Task, ...]
    held_out: tuple[Task, ...] = ()
    success: float = 1.0
    offset: float = 0.0
    calls: list = field(default_factory=list)
    wrong: list | None = None

    def score(self, tasks, completions):
        self.calls.append((list(tasks), list(completions)))
        if self.wrong is not None:
            return self.wrong
        return [len(c) + self.offset for c in completions]


def rollouts(task: Task, *completions: str, prompt: str = "Q:") -> Group:
    members = []
    for completion in completions:
        tokens = np.array([*map(ord, prompt + completion), 0], np.int32)
        spans = (
            Span(
                length=len(prompt),
                role=Role.USER,
                producer=Producer(kind=Kind.ENVIRONMENT, name="t"),
            ),
            Span(length=len(completion) + 1, role=Role.ASSISTANT, producer=ME, versions=(0, 0)),
        )
        trajectory = Trajectory(
            task=task.key, tokens=tokens, prompt_length=len(prompt), spans=spans
        )
        members.append(Scored(trajectory=trajectory))
    return Group(task=task.key, members=tuple(members))


A = tuple(Task(taskset="a", prompt=p) for p in ("x", "y", "z"))
B = tuple(Task(taskset="b", prompt=p) for p in ("x", "y"))


def rewards(groups):
    return [[m.scalar(Column.REWARD) for m in g.members] for g in groups]


def test_each_set_is_asked_once_and_rewards_return_to_their_trajectories():
    a = Counting("a", A[:2], A[2:])
    b = Counting("b", B, offset=100.0)
    groups = [
        rollouts(A[0], "one", ""),
        rollouts(B[1], "four"),
        rollouts(A[2], "seven"),  # held out
        rollouts(B[0], "1", "22", "333"),
        rollouts(A[0], "again"),
    ]
    scored = verify(groups, a, b)
    assert rewards(scored) == [[3.0, 0.0], [104.0], [5.0], [101.0, 102.0, 103.0], [5.0]]
    assert a.calls == [([A[0], A[0], A[2], A[0]], ["one", "", "seven", "again"])]
    assert b.calls == [([B[1], B[0], B[0], B[0]], ["four", "1", "22", "333"])]
    assert [g.task for g in scored] == [g.task for g in groups]


def test_trajectories_are_shared_and_other_columns_kept():
    [group] = [rollouts(A[0], "one")]
    old = Group(
        task=group.task,
        members=(group.members[0].with_columns({Column.PREFERENCE: np.asarray(1.0)}),),
    )
    [new] = verify([old], Counting("a", A))
    assert new.members[0].trajectory is old.members[0].trajectory
    assert new.members[0].scalar(Column.PREFERENCE) == 1.0
    assert old.members[0].scalar(Column.REWARD) is None


def test_rewards_keep_their_precision():
    [group] = verify([rollouts(A[0], "")], Counting("a", A, offset=0.1))
    assert group.members[0].scalar(Column.REWARD) == 0.1


def test_no_groups_ask_nobody():
    a = Counting("a", A)
    assert list(verify([], a)) == []
    assert a.calls == []


def test_unknown_task_and_unknown_set():
    products = Counting("products", A[:2])
    with pytest.raises(TaskError, match="which no task set holds"):
        verify([rollouts(A[2], "one")], products)
    other = Task(taskset="product", prompt="x")
    with pytest.raises(TaskError, match="did you mean 'products'"):
        verify([rollouts(other, "one")], products)


@pytest.mark.parametrize("wrong", [[], [1.0, 2.0], [float("nan")], [float("inf")]])
def test_scorer_that_breaks_its_promise(wrong):
    with pytest.raises(TaskError, match="task set a scored 1 completions"):
        verify([rollouts(A[0], "one")], Counting("a", A, wrong=wrong))


def test_a_repeated_task_is_no_clash():
    repeated = Counting("a", (A[0], A[0]), (A[1],))
    assert rewards(verify([rollouts(A[0], "ab")], repeated)) == [[2.0]]


def test_two_prompts_under_one_key_are_refused(monkeypatch):
    monkeypatch.setattr(Task, "key", property(lambda _: "a/00000000"))
    with pytest.raises(TaskError, match="stands for two prompts: 'x' and 'y'"):
        verify([], Counting("a", A[:2]))
