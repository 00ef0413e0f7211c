"""Measuring fakes whose every statistic is known: answers, verifiers that change their mind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from posttrain.core.errors import DataError
from posttrain.core.events import Event, Note
from posttrain.core.provenance import Kind, Producer, Role, Span
from posttrain.core.task import Task, TaskSet
from posttrain.measure.measure import measure_policy
from posttrain.measure.measurement import Measurement
from posttrain.measure.spec import Measure
from posttrain.protocols import Prompt
from posttrain.recipe import Recipe
from posttrain.run.plan import protocol_parts
from posttrain.testing import CharRenderer, FakePolicy, FakeTaskSet


@dataclass
class Moody:
    """A task set whose scorer lets every third call of an answer pass."""

    inner: FakeTaskSet = field(default_factory=FakeTaskSet)
    name: str = "moody"
    success: float = 1.0
    calls: int = 0

    @property
    def train(self) -> Sequence[Task]:
        return self.inner.train

    @property
    def held_out(self) -> Sequence[Task]:
        return self.inner.held_out

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        self.calls += 1
        return [float(self.calls % 2 == i % 3 == 0) for i in range(len(tasks))]


@dataclass
class Folding(Moody):
    """Reads every answer as the same one."""

    def final_answer(self, completion: str) -> str:
        return "same"


def measured(
    taskset: TaskSet, policy: FakePolicy | None = None, **others: object
) -> tuple[Measurement, list[Event]]:
    seen: list[Event] = []
    result = measure_policy(
        "fake",
        policy or FakePolicy({"a": 0.5, "b": 0.5}),
        [taskset],
        spec=Measure(samples=8, max_new_tokens=4),
        protocol="p",
        observe=seen.append,
        **others,  # type: ignore[arg-type]
    )
    return result, seen


def test_answers_are_numbered_by_text_or_as_the_task_set_reads_them() -> None:
    task = measured(FakeTaskSet())[0].tasks[0]
    right = task.successes
    for numbers, success in zip(np.asarray(task.raw["answers"]), right, strict=True):
        assert len(set(zip(numbers.tolist(), success.tolist(), strict=True))) <= 2
        assert numbers[0] == 0
    assert (np.asarray(task.raw["answers"]).max(axis=1) + 1 == task.distinct).all()
    folded = measured(Folding())[0].tasks[0]
    assert (folded.distinct == 1).all()


def test_one_letter_answers_have_the_self_bleu_of_their_shares() -> None:
    # BLEU of one letter against seven others: 1 if another is equal, else 0.
    task = measured(FakeTaskSet())[0].tasks[0]
    for bleu, numbers in zip(
        np.asarray(task.raw["self_bleu"]), np.asarray(task.raw["answers"]), strict=True
    ):
        lone = (np.bincount(numbers) == 1).sum()
        assert bleu == pytest.approx(1 - lone / 8)
    assert not np.asarray(task.raw["repetition"]).any()


def test_a_nondeterministic_verifier_is_reported() -> None:
    steady, seen = measured(FakeTaskSet())
    assert steady.tasks[0].raw["recheck"].shape == (8, 4)
    assert not steady.tasks[0].raw["recheck"].any()
    assert not [e for e in seen if isinstance(e, Note)]
    moody, seen = measured(Moody())
    changed = moody.tasks[0].raw["recheck"]
    assert changed.any()
    (note,) = [e for e in seen if isinstance(e, Note)]
    assert "moody: the verifier is not deterministic" in note.text
    assert f"of 32 answers that were scored twice, {changed.sum()} got" in note.text


@dataclass(frozen=True)
class TemplateRenderer:
    """Writes one token of a chat template before every prompt."""

    inner: CharRenderer = field(default_factory=CharRenderer)
    has_template: bool = True

    def prompt(self, task: Task) -> Prompt:
        bare = self.inner.prompt(task)
        author = Producer(kind=Kind.TEMPLATE, name="chat-template", digest="f" * 64)
        span = Span(length=1, role=Role.USER, producer=author)
        tokens = np.concatenate([[7], bare.tokens]).astype(np.int32)
        return Prompt(tokens=tokens, spans=(span, *bare.spans))

    def text(self, tokens: np.ndarray) -> str:
        return self.inner.text(tokens)


def test_the_template_is_a_part_of_the_protocol() -> None:
    parts = {"decoding": "x"}
    plain = measured(FakeTaskSet(), parts=parts)[0]
    policy = FakePolicy({"a": 1.0}, renderer=TemplateRenderer())  # type: ignore[arg-type]
    chat = measured(FakeTaskSet(), policy, parts=parts)[0]
    assert dict(plain.parts) == {"decoding": "x", "template": "none"}
    assert dict(chat.parts) == {"decoding": "x", "template": "f" * 64}
    assert not measured(FakeTaskSet())[0].parts


def test_no_held_out_prompts_is_a_clear_error() -> None:
    with pytest.raises(DataError, match="letters: no held-out prompts"):
        measured(FakeTaskSet(size=0))


def recipe(**others: object) -> Recipe:
    import msgspec

    tasks = {"letters": {"type": "jsonl", "path": "t.jsonl", "reward": "number"}}
    fields = {"name": "x", "model": "m", "tasks": tasks, **others}
    return msgspec.convert(fields, Recipe)


def test_protocol_parts_say_what_people_can_compare(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}\n")
    sets = [FakeTaskSet()]
    usual = protocol_parts(recipe(), sets, root=tmp_path)
    assert usual["decoding"] == "the policy's own distribution, at most 64 tokens"
    warm = recipe(measure={"sampling": {"temperature": 0.7}, "max_new_tokens": 9, "seed": 3})
    other = protocol_parts(warm, sets, root=tmp_path)
    assert other["decoding"] == "temperature 0.7, at most 9 tokens"
    assert other["seeds"] == "from 3"
    same = {n for n in usual if usual[n] == other[n]}
    assert same == {"samples", "prompts of letters", "verifier of letters"}
    changed = recipe(tasks={"letters": {"type": "jsonl", "path": "t.jsonl", "reward": "exact"}})
    judged = protocol_parts(changed, sets, root=tmp_path)
    assert {n for n in usual if usual[n] != judged[n]} == {"verifier of letters"}
    asked = protocol_parts(recipe(), [FakeTaskSet(size=9)], root=tmp_path)
    assert {n for n in usual if usual[n] != asked[n]} == {"prompts of letters"}


def test_the_mapping_of_parts_cannot_be_changed() -> None:
    result = measured(FakeTaskSet(), parts={"decoding": "x"})[0]
    assert isinstance(result.parts, MappingProxyType)
