"""Rewards are asked before anything relies on them, and what is odd about them is said."""

from __future__ import annotations

import json

import pytest

from posttrain.core.errors import TaskError
from posttrain.core.proofs import Subject
from posttrain.tasks import trial
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.tasks.trial import try_rewards

CALL = "def f(prompts, completions, **columns):\n    {}\n"


def tasks(folder, body=None, rows=("a", "b", "c"), **changes):
    lines = [json.dumps({"prompt": p, "answer": "2"}) for p in rows]
    (folder / "t.jsonl").write_text("\n".join(lines))
    reward = {}
    if body is not None:
        (folder / "r.py").write_text(body)
        reward = {"reward": "r.py:f"}
    spec = JsonlTasks(**{"path": "t.jsonl", "held_out": 1, **reward, **changes})
    return spec.build("sums", root=folder, chat=False)


def proof(made):
    [found] = try_rewards([made])
    return found


def test_a_reward_is_asked_for_nothing_and_for_the_answer(tmp_path):
    found = proof(tasks(tmp_path))
    assert (found.subject, found.of) == (Subject.REWARDS, "sums")
    assert found.words == "2 completions scored 0 and 1, the same when asked twice"
    assert found.figures["repeatable"] == 1
    body = "import json, pathlib\nseen = pathlib.Path(__file__).with_name('seen')\n" + CALL.format(
        "seen.write_text(json.dumps([prompts, completions])); return [0, 1]"
    )
    proof(tasks(tmp_path, body))
    assert json.loads((tmp_path / "seen").read_text()) == [["a", "a"], ["", "2"]]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import random\n" + CALL.format("return [random.random(), 1]"), "it is not deterministic"),
        ("n = []\n" + CALL.format("n.append(1); return [len(n), 1]"), "asked again 2 and 1: it is"),
        (
            CALL.format("import os; os.chdir('/'); return [0, 1]"),
            "it changed the working directory, which was put back",
        ),
        (CALL.format("print('loud'); return [0, 1]"), "scored 0 and 1, the same when asked twice"),
    ],
)
def test_what_is_odd_is_said(tmp_path, body, says):
    assert says in proof(tasks(tmp_path, body)).words


def test_a_slow_reward_is_called_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "SLOW", 0.0)
    assert "; slow: 0.0 s per completion" in proof(tasks(tmp_path)).words


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("1 / 0\n" + CALL.format("return [0, 1]"), r"raised ZeroDivisionError.*r\.py:1"),
        (CALL.format("return None"), "returned NoneType"),
        (CALL.format("return [float('nan')] * 2"), "returned nan"),
        (CALL.format("return [1.0]"), "returned 1 scores"),
        (CALL.format("return completions[0][0]"), r"IndexError.*r\.py:2"),
        (CALL.format("import sys; sys.exit(0)"), "tried to end the process"),
        ("def f(prompts, completions): return [0, 1]\n", "unexpected keyword argument 'answer'"),
    ],
)
def test_a_reward_that_does_not_answer_is_an_error(tmp_path, body, says):
    with pytest.raises(TaskError, match=says):
        proof(tasks(tmp_path, body))


def test_building_a_task_set_runs_no_code(tmp_path):
    made = tasks(tmp_path, "raise RuntimeError\n" + CALL.format("return [0, 1]"))
    assert len(made.train) == 2
    with pytest.raises(TaskError, match="raised RuntimeError"):
        made.score(made.train, ["", ""])


def test_a_reward_may_change_what_it_gets(tmp_path):
    rows = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    lines = [json.dumps({"prompt": p, "tags": ["x"]}) for p in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (tmp_path / "r.py").write_text(
        CALL.format(
            "n = [len(p) + len(t) + len(completions) for p, t in zip(prompts, columns['tags'])]"
        )
        + "    [x.append(1) for x in (*prompts, *columns['tags'])]; completions.clear()\n"
        + "    return n\n"
    )
    spec = JsonlTasks(path="t.jsonl", held_out=0, reward="r.py:f")
    made = spec.build("sums", root=tmp_path, chat=True)
    assert [made.score(made.train, ["", ""]) for _ in range(3)] == [[4.0, 4.0]] * 3
