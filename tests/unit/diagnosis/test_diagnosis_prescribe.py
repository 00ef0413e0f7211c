"""A prescription fits the bottleneck and the supplies, and its recipe is legal as it stands."""

import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import yaml
from diagnosis_readings import TRUTHS, evidence, sampling

from posttrain.core import config
from posttrain.core.errors import ConfigError
from posttrain.diagnosis.card import Bottleneck
from posttrain.diagnosis.conditions import diagnose_task
from posttrain.diagnosis.prescribe import (
    Supplies,
    fill,
    group_size,
    learning_rate,
    prescribe,
)
from posttrain.diagnosis.rules import load_rules
from posttrain.lab.tour import BASE
from posttrain.measure.spec import Measure
from posttrain.recipe import Recipe
from posttrain.run.plan import make_plan
from posttrain.tasks.jsonl import JsonlTasks

BOOK = load_rules()
ROOT = Path("/nowhere")


@pytest.fixture
def world(tmp_path):
    """A ground recipe with three task sets, and everything that a user could bring."""
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "1", "answer": "1"}\n' * 40)
    (tmp_path / "demos.jsonl").write_text('{"prompt": "1", "completion": "1"}\n')
    for name in ("base", "teacher", "before"):
        shutil.copytree(BASE, tmp_path / name)
    tasks = JsonlTasks(path=str(tmp_path / "tasks.jsonl"))
    ground = Recipe(
        name="ground",
        model=str(tmp_path / "base"),
        tasks={"t": tasks, "u": tasks, "v": tasks},
        measure=Measure(samples=16, max_new_tokens=9),
    )
    everything = Supplies(
        demos={"*": str(tmp_path / "demos.jsonl")},
        teachers={"*": str(tmp_path / "teacher")},
        before=str(tmp_path / "before"),
        scaffold="Think. {question}",
    )
    return ground, everything


def found(case: str, task: str = "t"):
    return diagnose_task(evidence(TRUTHS[case][0], task=task), BOOK)


def made(prescription) -> Recipe:
    return config.convert(yaml.safe_load(prescription.recipe), Recipe, origin="prescription")


def test_the_recipe_says_why_and_only_what_is_not_the_default(world):
    ground, everything = world
    (prescription,) = prescribe(
        [found("habit")], book=BOOK, ground=ground, supplies=everything, num_weights=640_000
    )
    notes, _, body = prescription.recipe.partition("\n\n")
    assert all(row.startswith("#") for row in notes.splitlines())
    words = " ".join(notes.replace("#", " ").split())
    for choice in prescription.choices:
        assert " ".join(f"{choice.what}: {choice.why}".split()) in words
    assert f"it worked if: {prescription.gate}" in words
    assert "null" not in body
    assert "betas" not in body
    recipe = made(prescription)
    assert config.convert(config.brief(recipe), Recipe, origin="brief") == recipe


def only(tasks, world, **changes):
    ground, supplies = world
    (prescription,) = prescribe(
        tasks,
        book=BOOK,
        ground=ground,
        supplies=replace(supplies, **changes),
        num_weights=640_000,
    )
    return prescription


@pytest.mark.parametrize(
    ("case", "method", "terms"),
    [
        ("never", "sft", {"cross_entropy"}),
        ("entry", "sft", {"cross_entropy"}),
        ("forgotten", "opd", {"teacher_reverse_kl"}),
        ("scaffold", "context_distillation", {"teacher_reverse_kl"}),
        ("own states", "opd", {"teacher_reverse_kl"}),
        ("habit", "raft", {"cross_entropy"}),
        ("rare", "grpo", {"clipped_policy_gradient"}),
    ],
)
def test_the_stage_fits_the_bottleneck_and_is_legal(world, case, method, terms):
    prescription = only([found(case)], world)
    recipe = made(prescription)
    (stage,) = recipe.stages
    (planned,) = make_plan(recipe, root=ROOT, base="digest").stages
    assert str(stage.method.__struct_config__.tag) == method
    assert {str(t.__struct_config__.tag) for t in planned.composition.terms} == terms
    assert {g.task for g in stage.gates} == {"t"}
    assert recipe.measure.samples >= 64, "the gate asks for pass@64"
    reasons = {c.what: c for c in prescription.choices}
    assert {"provenance", "interface", "objective", "prompts", "kl budget"} <= set(reasons)
    assert all(c.why and c.setting for c in prescription.choices)


def test_without_demonstrations_a_missing_entry_is_trained_from_prefixes(world):
    assert only([found("entry")], world, demos={}).treatment == "begin"


def test_what_imitating_itself_did_not_mend_is_practised(world):
    ground, supplies = world
    (prescription,) = prescribe(
        [found("habit")],
        book=BOOK,
        ground=ground,
        supplies=supplies,
        tried=frozenset({("t", "reinforce")}),
    )
    assert prescription.treatment == "practise"


def test_every_treatment_makes_a_legal_stage(world):
    """Each one in turn is the only treatment of a rule that holds."""
    ground, supplies = world
    readings = [found("habit"), found("done", task="u"), found("forgotten", task="v")]
    for name in BOOK.treatments:
        rules = tuple(
            msgspec.structs.replace(r, treat=(name,)) if r.id == "not-chosen" else r
            for r in BOOK.rules
        )
        book = msgspec.structs.replace(BOOK, rules=rules)
        first = prescribe(readings, book=book, ground=ground, supplies=supplies)[0]
        assert first.treatment == name
        (planned,) = make_plan(made(first), root=ROOT, base="digest").stages
        asked = {g.task for g in planned.spec.gates}
        assert asked == {"t", "u", "v"}, "what must not be lost is watched too"


def test_without_supplies_a_support_bottleneck_says_what_to_obtain(world):
    prescription = only([found("never")], world, demos={}, teachers={})
    assert prescription.recipe is None
    assert "Nothing on-policy can help" in prescription.obtain
    assert "--demos" in prescription.obtain


def test_supplies_serve_only_the_task_they_are_for(world):
    there = only([found("never")], world, demos={"t": "/d.jsonl"}, teachers={})
    elsewhere = only([found("never")], world, demos={"u": "/d.jsonl"}, teachers={})
    assert (there.treatment, elsewhere.treatment) == ("import", None)


def test_a_teacher_serves_when_there_are_no_demonstrations(world):
    prescription = only([found("never")], world, demos={})
    (stage,) = made(prescription).stages
    assert prescription.treatment == "distil"
    assert stage.method.teacher == f"path:{world[1].teachers['*']}"


def test_nothing_is_prescribed_where_nothing_is_left(world):
    ground, supplies = world
    assert prescribe([found("done")], book=BOOK, ground=ground, supplies=supplies) == ()


def test_support_comes_before_choice_and_choice_before_retention(world):
    ground, supplies = world
    tasks = [found("forgotten", task="v"), found("habit", task="u"), found("never")]
    order = prescribe(tasks, book=BOOK, ground=ground, supplies=supplies)
    assert [p.bottleneck for p in order] == ["support", "choice", "retention"]
    assert order[0].treatment == "rehearsed-import"  # u and v have something to keep


def test_tasks_with_one_bottleneck_are_treated_in_one_stage(world):
    tasks = [found("habit"), found("habit", task="u")]
    prescription = only(tasks, world)
    assert made(prescription).stages[0].method.tasks == ("t", "u")
    assert prescription.tasks == ("t", "u")


def test_later_tasks_are_watched_and_never_treated(world):
    prescription = only([found("habit"), found("habit", task="u")], world, later=("u",))
    (stage,) = made(prescription).stages
    assert stage.method.tasks == ("t",)
    (watch,) = [g for g in stage.gates if g.task == "u"]
    assert (watch.metric, watch.otherwise) == ("pass@32", "warn")
    assert watch.at_most_lost is not None


def test_recall_takes_each_task_from_who_was_best_at_it(world):
    tasks = [found("forgotten"), found("done", task="u")]
    teachers = made(only(tasks, world)).stages[0].method.teachers
    assert teachers == {"t": f"path:{world[1].before}", "*": "input"}


def test_what_was_tried_gives_way_to_the_next_treatment_then_to_words(world):
    ground, supplies = world
    tasks, tried, seen = [found("never")], frozenset(), []
    for _ in range(3):
        (p,) = prescribe(tasks, book=BOOK, ground=ground, supplies=supplies, tried=tried)
        seen.append(p.treatment)
        tried |= {("t", p.treatment)}
    assert seen == ["import", "distil", None]


def test_the_group_is_large_enough_to_be_informative():
    def needing(value):
        return [diagnose_task(evidence({**sampling(0.1, 0.9), "needed_group": value}), BOOK)]

    assert [group_size(needing(v)) for v in (2, 8, 9, 30, 65, float("inf"))] == [
        *(8, 8, 16, 32, 64, 64)
    ]


def test_dose_scales_the_steps_and_nothing_else(world):
    ground, supplies = world
    one, half = (
        made(
            prescribe([found("habit")], book=BOOK, ground=ground, supplies=supplies, dose=d)[0]
        ).stages[0]
        for d in (1.0, 0.5)
    )
    assert half.budget.steps * 2 == one.budget.steps
    assert msgspec.structs.replace(half, budget=one.budget) == one


def test_a_leaning_makes_a_provisional_prescription(world):
    values = sampling(0.0, 0.0)
    wide = evidence(values, half=0.35)
    task = diagnose_task(wide, BOOK)
    assert task.bottleneck is Bottleneck.UNDETERMINED
    assert only([task], world).provisional is True
    assert only([found("never")], world).provisional is False


def test_the_rate_follows_the_size():
    assert learning_rate(2e-4, 640_000) == 2e-4
    assert learning_rate(2e-4, 64_000_000) == 2e-5  # a hundred times the size, a tenth the rate
    assert learning_rate(1e-3, None) == learning_rate(1e-3, 7_000_000_000)


def test_an_unknown_word_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'task'"):
        fill({"tasks": ["$tsk"]}, {"task": "t", "lr": 1.0})
