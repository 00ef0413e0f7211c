"""What a run tries before it begins: nothing is recorded, and what would fail is found."""

import json

import msgspec
import pytest
from staging import make_world

import posttrain
from posttrain.core.errors import DataError, TaskError
from posttrain.core.events import Note
from posttrain.core.files import hash_folder
from posttrain.core.proofs import Subject
from posttrain.measure.spec import Measure
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run import pipeline
from posttrain.run.check import check
from posttrain.run.folder import RunFolder
from posttrain.run.preview import preview
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.testing import tiny_model

GRPO = posttrain.method("grpo", tasks=["rows"], group_size=2, max_new_tokens=3)
SFT = posttrain.method("sft", data={"path": "rows.jsonl"})


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


def recipe_of(world, *methods, steps=2):
    stages = tuple(
        Stage(name=f"s{i}", method=method, budget=Budget(steps=steps), groups_per_step=2)
        for i, method in enumerate(methods)
    )
    tasks = {"rows": JsonlTasks(path="rows.jsonl", reward="reward.py:reward", held_out=2)}
    measure = Measure(samples=2, max_new_tokens=2)
    return Recipe(name="r", model=str(world.model), tasks=tasks, stages=stages, measure=measure)


def test_every_stage_takes_a_draw_and_nothing_is_written(world):
    before = hash_folder(world.root)
    found = check(recipe_of(world, SFT, GRPO), root=world.root, engine=world.engine)
    steps = {p.of: p for p in found.proofs if p.subject is Subject.STEP}
    assert set(steps) == {"s0", "s1"}
    assert "from the base" not in steps["s0"].words
    assert "from the base" in steps["s1"].words
    assert all(p.figures["seconds_per_step"] > 0 for p in steps.values())
    assert hash_folder(world.root) == before


def test_a_rehearsal_changes_no_bit_of_the_run(world, monkeypatch):
    results = []
    for worth in (1, 100):
        monkeypatch.setattr(pipeline, "WORTH", worth)
        out = world.root / f"out-{worth}"
        recipe = recipe_of(world, SFT, GRPO)
        pipeline.run(recipe, out=out, root=world.root, engine=world.engine)
        stages = RunFolder(out).stages()
        results.append([hash_folder(stage.model) for stage in stages])
    assert results[0] == results[1]


def test_a_task_that_cannot_guide_is_found_by_plan(world):
    uft = posttrain.method(
        "uft", tasks=["rows"], group_size=2, max_new_tokens=3, demonstration="nowhere"
    )
    recipe = recipe_of(world, uft)
    for found in (preview, check):
        options = {} if found is preview else {"engine": world.engine, "rehearse_from": 9}
        with pytest.raises(TaskError, match="no text under 'nowhere'"):
            found(recipe, root=world.root, **options)


def test_measuring_on_nothing_is_found_by_plan(world):
    recipe = recipe_of(world, SFT)
    tasks = {"rows": msgspec.structs.replace(recipe.tasks["rows"], held_out=0)}
    recipe = msgspec.structs.replace(recipe, tasks=tasks)
    with pytest.raises(DataError, match="no held-out prompts"):
        preview(recipe, root=world.root)


def test_a_stage_that_would_fail_at_its_first_step_is_found_before_anything_is_written(world):
    (world.root / "reward.py").write_text("def reward(prompts, completions):\n    return [1.0]\n")
    out = world.root / "out"
    with pytest.raises(TaskError):
        pipeline.run(
            recipe_of(world, SFT, GRPO, steps=40), out=out, root=world.root, engine=world.engine
        )
    assert not RunFolder(out).is_run


def test_a_stage_that_asks_a_head_of_an_earlier_one_is_tried_later(world):
    data = {"path": "pairs.jsonl"}
    judge = posttrain.method("bradley_terry", data=data)
    practise = posttrain.method(
        "grpo",
        tasks=["rows"],
        group_size=2,
        max_new_tokens=3,
        rewards=[{"type": "reward_model", "model": "s0"}],
    )
    said = []
    found = check(
        recipe_of(world, judge, practise),
        root=world.root,
        engine=world.engine,
        observe=lambda event: said.append(event.text) if isinstance(event, Note) else None,
    )
    assert [p.of for p in found.proofs if p.subject is Subject.STEP] == ["s0"]
    assert any("s1" in text and "scalar head of s0" in text for text in said)


def test_a_plan_runs_no_code_from_outside_unless_trusted(world, tmp_path_factory):
    """The code leaves a mark where it runs."""
    outside = tmp_path_factory.mktemp("outside")
    mark = outside / "ran"
    model = tiny_model(outside / "model")
    (model / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class C(Qwen3Config):\n    model_type = 'own'\n"
        "class M(Qwen3ForCausalLM):\n    config_class = C\n"
    )
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    settings["auto_map"]["AutoModelForCausalLM"] = "own.M"
    (model / "config.json").write_text(json.dumps(settings))
    recipe = msgspec.structs.replace(
        recipe_of(world, SFT), model=str(model), remote_code=str(model)
    )
    words = preview(recipe, root=world.root)
    assert "needs --trust-code" in words
    assert "weights " not in words
    assert not mark.exists()
    assert "weights " in preview(recipe, root=world.root, trust_code=True)
    assert mark.exists()
