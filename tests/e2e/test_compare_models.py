"""`posttrain compare` of two models: results from samples, and those from log-probs of both."""

import json
import re

import pytest
from world import make_world, recipe, task_set, write_recipe

from posttrain.testing import tiny_model

UNSTEADY = """
import random
def score(prompts, completions, **columns):
    return [random.random() for _ in completions]
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two models of one tokenizer, and one of another."""
    folder = make_world(tmp_path_factory.mktemp("two") / "world")
    tiny_model(folder / "other", seed=1)
    tiny_model(folder / "foreign", seed=1)
    file = folder / "foreign/tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    a, b = list(words)[5:7]
    words[a], words[b] = words[b], words[a]
    file.write_text(json.dumps(content))
    measure = {"samples": 16, "max_new_tokens": 5}
    write_recipe(folder, recipe(measure=measure), "tasks.yaml")
    return folder


def compared(posttrain, folder, before, after, *more, tasks="tasks.yaml"):
    return posttrain("compare", folder / before, folder / after, "--tasks", folder / tasks, *more)


def test_everything_that_two_models_can_be_asked(two, posttrain):
    code, table, errors = compared(posttrain, two, "model", "other")
    assert code == 0, errors
    for words in ("where the change came from", "NSCR", "kl_forward", "kl_reverse", "role"):
        assert words in table, words
    assert "missing" not in table


def test_a_model_has_not_moved_from_itself(two, posttrain):
    code, table, errors = compared(posttrain, two, "model", "model")
    assert code == 0, errors
    for name in ("kl_reverse", "kl_forward"):
        assert re.search(rf"{name}\s+-?0\.00\s+\[-?0\.00, 0\.00\]", table), table
    assert "how probable success was before" not in table, "nothing is newly solved"


def test_what_was_never_seen_gets_a_probability(two, posttrain):
    """With two samples of the first and few successes, some prompts are newly solved."""
    (two / "rare.py").write_text(
        "def score(prompts, completions, answer, **columns):\n"
        "    return [float(c.startswith(a)) for c, a in zip(completions, answer)]\n"
    )
    tasks = {"say": task_set(reward="rare.py:score", success=1.0)}
    measure = {"samples": 64, "max_new_tokens": 5}
    write_recipe(two, recipe(tasks=tasks, measure=measure), "rare.yaml")
    code, table, errors = compared(posttrain, two, "model", "other", tasks="rare.yaml")
    assert code == 0, errors
    assert "prompts that only AFTER was seen to solve" in table
    assert "by the ways the later policy writes" in table
    assert "reach_log10" in table


def test_other_tokens_can_be_sampled_and_not_scored(two, posttrain):
    code, table, errors = compared(posttrain, two, "model", "foreign")
    assert code == 0, errors
    assert "where the change came from" in table
    assert "have different tokens" in table
    assert "kl_forward" not in table
    assert "compare them by samples" in table


def test_tempered_sampling_leaves_out_what_it_cannot_estimate(two, posttrain):
    measure = {"samples": 16, "max_new_tokens": 5, "sampling": {"temperature": 0.7}}
    write_recipe(two, recipe(measure=measure), "warm.yaml")
    code, table, errors = compared(posttrain, two, "model", "other", tasks="warm.yaml")
    assert code == 0, errors
    assert "temperature=0.7" in table
    assert "kl_forward" not in table


def test_other_templates_are_refused(two, posttrain):
    tiny_model(two / "curt", seed=1)
    file = two / "curt/chat_template.jinja"
    file.write_text("<|user|>" + file.read_text())
    code, _, errors = compared(posttrain, two, "model", "curt")
    assert code == 2
    assert "the template" in errors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"measure": {"samples": 8, "max_new_tokens": 5}}, "samples"),
        ({"measure": {"samples": 4, "max_new_tokens": 6}}, "decoding"),
        ({"measure": {"samples": 4, "max_new_tokens": 5, "seed": 9}}, "seeds"),
        ({"tasks": {"say": task_set(held_out=6)}}, "prompts of say"),
        ({"tasks": {"say": task_set(reward="more.py:score")}}, "verifier of say"),
    ],
)
def test_measured_in_two_ways_is_refused_and_the_way_is_named(two, posttrain, changes, says):
    (two / "more.py").write_text((two / "reward.py").read_text() + "\n# stricter\n")
    files = []
    for name, changed in (("one", {}), ("two", changes)):
        path = write_recipe(two, recipe(**changed), f"{name}.yaml")
        files.append(two / f"{name}.json")
        done = posttrain("probe", two / "model", "--tasks", path, "--out", files[-1])
        assert done[0] == 0, done[2]
    code, _, errors = posttrain("compare", *files)
    assert code == 2
    assert f"what differs: the {says}" in errors
    assert "measure both policies again with one recipe" in errors


def test_a_nondeterministic_scorer_is_reported(two, posttrain):
    (two / "unsteady.py").write_text(UNSTEADY)
    tasks = {"say": task_set(reward="unsteady.py:score", success=0.5)}
    path = write_recipe(two, recipe(tasks=tasks), "unsteady.yaml")
    code, table, errors = posttrain("probe", two / "model", "--tasks", path)
    assert code == 0, errors
    assert "the verifier is not deterministic" in table


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model", "nowhere", "--tasks", "tasks.yaml"], "no model"),
        (["model", "--tasks", "tasks.yaml"], "two, BEFORE and AFTER"),
        (["model", "other"], "add --tasks recipe.yaml"),
        (["a.json", "b.json", "--samples", "4"], "--samples without models"),
    ],
)
def test_mistakes(two, posttrain, monkeypatch, arguments, says):
    monkeypatch.chdir(two)
    code, _, errors = posttrain("compare", *arguments)
    assert code == 2
    assert says in errors


def test_few_prompts_are_refused(two, posttrain):
    write_recipe(two, recipe(tasks={"say": task_set(held_out=4)}), "few.yaml")
    code, _, errors = compared(posttrain, two, "model", "other", tasks="few.yaml")
    assert code == 2
    assert "too few prompts to judge by: say (4)" in errors
