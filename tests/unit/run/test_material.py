"""Prompts that fit, rows that were left out, and held-out prompts in what is trained on."""

import pytest

from posttrain.core.errors import TaskError
from posttrain.core.provenance import Kind, Producer
from posttrain.core.task import Task
from posttrain.protocols import DataFile
from posttrain.run.material import PromptLengths, SampledPrompts, notes_of, overlaps
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.testing import CharRenderer


def sampled(*texts, new=4):
    tasks = tuple(Task(taskset="t", prompt=text) for text in texts)
    return SampledPrompts(name="t", tasks=tasks, max_new_tokens=new, what_for="stage s")


def fits(*sampled, context):
    PromptLengths().check_fit(sampled, renderer=CharRenderer(), context=context)


def test_the_longest_prompt_and_its_answer_must_fit():
    fits(sampled("a", "b" * 16), context=20)
    with pytest.raises(TaskError) as error:
        fits(sampled("a", "b" * 17, "c"), context=20)
    assert "stage s: the longest prompt of task set t" in str(error.value)
    assert "has 17 tokens, and an answer may have 4" in str(error.value)
    assert "max_new_tokens to at most 3" in str(error.value)
    with pytest.raises(TaskError, match="longer context"):
        fits(sampled("b" * 30), context=20)


def test_prompts_that_surely_fit_are_not_rendered(monkeypatch):
    class Counting:
        digest = "counting"
        calls = 0

        def prompt(self, task):
            self.calls += 1
            return CharRenderer().prompt(task)

    counting = Counting()
    lengths = PromptLengths()
    many = sampled(*(f"p{i}" for i in range(50)))
    lengths.check_fit([many, many], renderer=counting, context=5000)
    assert counting.calls == 1
    lengths.check_fit([many, many], renderer=counting, context=300)
    assert counting.calls == 50


def test_duplicates_of_a_task_file_are_said(tmp_path):
    rows = "".join(f'{{"prompt": "q{i % 4}", "answer": "a{i}"}}\n' for i in range(8))
    (tmp_path / "t.jsonl").write_text(rows)
    tasks = JsonlTasks(path="t.jsonl", held_out=1).build("t", root=tmp_path, chat=False)
    assert list(notes_of({"t": tasks})) == [
        "task set t: 4 of 8 rows left out: duplicates of an earlier prompt, 4 with another answer"
    ]


def test_held_out_prompts_that_are_trained_on_are_said(tmp_path):
    for name, start in (("t", 0), ("u", 6)):
        rows = "".join(f'{{"prompt": "q  {i}", "answer": "a"}}\n' for i in range(start, start + 10))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    sets = {
        name: JsonlTasks(path=f"{name}.jsonl", held_out=4).build(name, root=tmp_path, chat=False)
        for name in ("t", "u")
    }  # t holds out 6 to 9; u trains on 6 to 11
    demos = DataFile(
        name="demos",
        producer=Producer(kind=Kind.HUMAN, name="demos"),
        digest="d",
        licence=None,
        rows=2,
        skipped=0,
        questions=frozenset({"q 9", "q 3"}),
    )
    found = list(overlaps(sets, measured=["t"], drawn=["u"], files=[demos]))
    assert [words.partition(" (one")[0] for words in found] == [
        "4 of 4 held-out prompts of task set t also stand in the training part of task set u",
        "1 of 4 held-out prompts of task set t also stand in data set demos",
    ]
    assert not list(overlaps(sets, measured=["u"], drawn=["t"], files=[]))
