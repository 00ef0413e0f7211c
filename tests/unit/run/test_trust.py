"""Code that did not come with the recipe runs only when the user says so."""

from __future__ import annotations

import json

import pytest

from posttrain import JsonlTasks, Recipe
from posttrain.core.errors import ConfigError, TaskError
from posttrain.run.trust import check_trust, code_of_recipe

BODY = "def f(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"


@pytest.fixture
def world(tmp_path):
    """A recipe's folder, and another beside it."""
    for name in ("home", "away"):
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "r.py").write_text(BODY)
        (tmp_path / name / "inside" / "r.py").write_text("import helper\n" + BODY)
        (tmp_path / name / "inside" / "helper.py").write_text("x = 1\n")
        (tmp_path / name / "t.jsonl").write_text(json.dumps({"prompt": "a", "answer": "1"}))
    return tmp_path


def recipe(reward, **changes):
    tasks = {"t": JsonlTasks(path="t.jsonl", reward=reward, held_out=0)}
    return Recipe(name="r", model="m", tasks=tasks, **changes)


@pytest.mark.parametrize("reward", ["exact", "r.py:f", "inside/r.py:f", "../home/r.py:f"])
def test_code_in_the_recipes_folder_runs(world, reward):
    check_trust(recipe(reward), root=world / "home", trust_code=False)


@pytest.mark.parametrize("reward", ["../away/r.py:f", "../away/inside/r.py:f", "linked.py:f"])
def test_code_from_elsewhere_needs_consent(world, reward):
    (world / "home" / "linked.py").symlink_to(world / "away" / "r.py")
    with pytest.raises(
        ConfigError, match=r"(?s)task set t runs .*/away/.*\.py.*--trust-code"
    ) as found:
        check_trust(recipe(reward), root=world / "home", trust_code=False)
    assert "outside the recipe's folder" in str(found.value)
    check_trust(recipe(reward), root=world / "home", trust_code=True)


def test_absolute_paths_inside_are_inside(world):
    check_trust(recipe(f"{world / 'home' / 'r.py'}:f"), root=world / "home", trust_code=False)


def test_a_linked_module_is_where_it_leads(world):
    (world / "home" / "inside" / "helper.py").unlink()
    (world / "home" / "inside" / "helper.py").symlink_to(world / "away" / "inside" / "helper.py")
    with pytest.raises(ConfigError, match=r"/away/inside/helper\.py"):
        check_trust(recipe("inside/r.py:f"), root=world / "home", trust_code=False)


def test_code_of_models_counts(world):
    (world / "home" / "m").mkdir()
    check_trust(recipe("exact", remote_code="m"), root=world / "home", trust_code=False)
    (world / "home" / "m").rmdir()
    with pytest.raises(ConfigError, match="the model runs code of m"):
        check_trust(recipe("exact", remote_code="m"), root=world / "home", trust_code=False)


def test_a_missing_file_is_named(world):
    with pytest.raises(TaskError, match="no reward file"):
        check_trust(recipe("none.py:f"), root=world / "home", trust_code=False)


def test_a_plan_can_say_what_code_will_run(world):
    inside = [c.words for c in code_of_recipe(recipe("inside/r.py:f"), root=world / "home")]
    assert inside == ["task set t runs inside/r.py", "task set t runs inside/helper.py"]
    [away] = [c.words for c in code_of_recipe(recipe("../away/r.py:f"), root=world / "home")]
    assert away.endswith("/away/r.py, outside the recipe's folder: needs --trust-code")
    assert not list(code_of_recipe(recipe("exact"), root=world / "home"))
