"""The recipes that users start from, and the page about them, work as they stand."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from msgspec import structs

from posttrain.core import config
from posttrain.measure.gates import Gate
from posttrain.measure.registry import metrics
from posttrain.measure.spec import Measure
from posttrain.parts.sources.dataset import Dataset, DatasetRows
from posttrain.recipe import Budget, Recipe, load_recipe
from posttrain.tasks.jsonl import JsonlTasks

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PAGE = ROOT / "docs/recipes.md"
# Set by the method itself, never written by hand.
NOT_FOR_RECIPES = {"preference", "unpaired"}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "data" / name).read_text().splitlines()]


def asked(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def shortened(recipe: Recipe, *, steps: int) -> Recipe:
    """The same stages with a budget of a few steps, and measured with few samples."""
    stages = tuple(
        structs.replace(
            s,
            budget=Budget(steps=steps),
            gates=tuple(structs.replace(g, otherwise="warn", to=None) for g in s.gates),
        )
        for s in recipe.stages
    )
    measure = Measure(tasks=recipe.measure.tasks, samples=2, max_new_tokens=4)
    return structs.replace(recipe, stages=stages, measure=measure)


# --- the files -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_plan_of_every_recipe(path):
    from posttrain.run.preview import preview

    recipe = load_recipe(path)
    text = preview(recipe, root=FOLDER)
    assert text.count("legality    ok") == len(recipe.stages) >= 1
    assert "not on this disk" not in text
    resolved = yaml.safe_load(text.partition("resolved recipe:")[2])
    again = config.convert(resolved, Recipe, origin="plan")
    assert config.digest(again) == config.digest(recipe), "what plan prints is the recipe"


def test_yaml_and_python_are_the_same_recipe():
    ours, theirs = module("pipeline").RECIPE, load_recipe(FOLDER / "pipeline.yaml")
    assert config.differences(config.plain(config.checked(ours)), config.plain(theirs)) == []
    assert config.digest(ours) == config.digest(theirs)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "pipeline"])
def test_runs_for_real_and_again_for_nothing(name, tmp_path):
    from posttrain.api import run
    from posttrain.core.events import StageStarted, StepDone

    recipe = shortened(load_recipe(FOLDER / f"{name}.yaml"), steps=2)
    events = []
    outcome = run(recipe, out=tmp_path / "out", root=FOLDER, observe=events.append)
    names = tuple(s.name for s in recipe.stages)
    assert (outcome.finished, outcome.stopped_by) == (names, None)
    steps = [e for e in events if isinstance(e, StepDone)]
    assert [(e.stage, e.step) for e in steps] == [(n, s) for n in names for s in (1, 2)]
    assert all(e.metrics["grad_norm"] > 0 for e in steps), "a step that teaches nothing"
    for stage in names:
        (folder,) = (tmp_path / "out/stages").glob(f"{stage}-*")
        assert (folder / "model/config.json").is_file()

    events.clear()
    run(recipe, out=tmp_path / "out", root=FOLDER, observe=events.append)
    assert [e.finished for e in events if isinstance(e, StageStarted)] == [True] * len(names)
    assert not [e for e in events if isinstance(e, StepDone)]


def options(config_tree: object) -> set[str]:
    """Every option of every configuration found in a tree, written in the file or not."""
    if isinstance(config_tree, msgspec.Struct):
        fields = config_tree.__struct_fields__
        return set(fields).union(*(options(getattr(config_tree, f)) for f in fields))
    if isinstance(config_tree, dict):
        return set().union(*map(options, config_tree.values()))
    if isinstance(config_tree, tuple | list):
        return set().union(*map(options, config_tree))
    return set()


def test_every_option_is_explained_somewhere():
    text = "\n".join(p.read_text(encoding="utf-8") for p in RECIPES)
    with_comment = re.findall(r"^[ -]*(\w+):[^#\n]*#(.+)", text, re.MULTILINE)
    explained = {key for key, _ in with_comment}
    explained |= {word for _, comment in with_comment for word in re.findall(r"`(\w+)`", comment)}
    known = set().union(*(options(load_recipe(p)) for p in RECIPES)) - NOT_FOR_RECIPES
    assert {"clip_low", "held_out", "alpha", "min_p", "epochs", "label_smoothing"} <= known
    assert known - explained == set(), "add each to a YAML in recipes/ with a comment"


# --- the data --------------------------------------------------------------------------------


def held_out(recipe: Recipe, task: str) -> set[str]:
    spec = recipe.tasks[task]
    return {asked(r["prompt"]) for r in rows(Path(spec.path).name)[-spec.held_out :]}


def test_no_demonstration_or_pair_asks_what_is_held_out():
    pipeline = load_recipe(FOLDER / "pipeline.yaml")
    letters, products = held_out(pipeline, "letters"), held_out(pipeline, "products")
    assert len(letters) == 24
    assert len(products) == 16
    assert not letters & {asked(r["prompt"]) for r in rows("letters_demos.jsonl")}
    assert not products & {asked(r["prompt"]) for r in rows("products_pairs.jsonl")}


def test_the_data_is_right():
    for row in rows("letters_demos.jsonl"):
        (word,) = re.fullmatch(r"First letter of (\w+)\?", asked(row["prompt"])).groups()
        assert row["completion"] == [{"role": "assistant", "content": word[0]}]
    for row in rows("letters_tasks.jsonl"):
        assert row["prompt"] == f"First letter of {row['prompt'][16:-1]}?"
        assert row["answer"] == row["prompt"][16]
    for row in [*rows("products_pairs.jsonl"), *rows("products_tasks.jsonl")]:
        x, y = map(int, re.findall(r"\d+", asked(row["prompt"])))
        if "chosen" in row:
            assert [row[c][0]["content"] for c in ("chosen", "rejected")] == [
                str(x * y),
                str(x + y),
            ]
        else:
            assert row["answer"] == x * y
    assert all(20 <= len(p.read_text().splitlines()) < 100 for p in FOLDER.glob("data/*.jsonl"))


def test_the_reward_distinguishes_right_answers_numbers_and_noise():
    from posttrain.tasks.rewards import find_reward

    reward = find_reward("data/rewards.py:product", FOLDER)
    answers = ["12", " 12\n", "7", "twelve", ""]
    columns = {"answer": ["12"] * 5, "level": ["easy"] * 5}
    scores = reward.score(["3 * 4"] * 5, answers, columns)
    assert scores == [1.0, 1.0, 0.1, 0.0, 0.0]


# --- the page --------------------------------------------------------------------------------


def snippets(kind: str) -> list[str]:
    return [body for info, body in FENCE.findall(PAGE.read_text(encoding="utf-8")) if info == kind]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The recipes in a folder of their own, at the place that the page's commands expect.

    Budgets and samples in the YAML files are cut, so that every command takes seconds.
    """
    place = tmp_path_factory.mktemp("page")
    (place / "src").symlink_to(ROOT / "src")
    shutil.copytree(FOLDER, place / "recipes")
    for path in (place / "recipes").glob("*.yaml"):
        text = msgspec.json.decode(msgspec.json.encode(shortened(load_recipe(path), steps=2)))
        path.write_text(yaml.safe_dump(text))
    return place


def execute(command: list[str], *, cwd: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=240)
    assert ran.returncode == 0, f"{command}: {ran.stdout[-500:]} {ran.stderr[-2000:]}"
    return ran.stdout + ran.stderr


def test_every_snippet_of_the_page_is_of_a_kind_that_is_executed():
    kinds = [info for info, _ in FENCE.findall(PAGE.read_text(encoding="utf-8"))]
    tested = {"yaml recipe", "yaml gates", "python", "python reward", "sh"}
    tested |= {"json completion", "json messages", "json preference", "json task"}
    assert set(kinds) == tested


def test_gates_on_the_page_are_gates():
    (snippet,) = (text for info, text in FENCE.findall(PAGE.read_text()) if info == "yaml gates")
    gates = msgspec.convert(yaml.safe_load(snippet)["gates"], tuple[Gate, ...])
    assert [g.otherwise for g in gates] == ["stop", "branch", "roll_back", "warn"]
    text = PAGE.read_text(encoding="utf-8")
    assert not [m.name for m in metrics() if m.can_be_asked and f"`{m.name}`" not in text]


def test_the_page_stays_a_page():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.split()) < 1200
    assert text.count("\n") < 170


def test_yaml_on_the_page_runs(copy):
    from posttrain.api import run

    for number, text in enumerate(snippets("yaml recipe")):
        path = copy / f"recipes/page{number}.yaml"
        path.write_text(text)
        outcome = run(load_recipe(path), out=copy / f"out/page{number}", root=path.parent)
        assert outcome.finished == ("practise",)


def test_python_on_the_page_runs_and_is_the_yaml_beside_it(copy):
    (code,) = snippets("python")
    check = "\nfrom posttrain.core import config\nprint(config.digest(recipe))"
    printed = execute([sys.executable, "-c", code + check], cwd=copy).splitlines()
    (text,) = snippets("yaml recipe")
    beside = config.convert(yaml.safe_load(text), Recipe, origin="page")
    assert "('practise',)" in printed
    assert config.digest(beside) in printed


def test_shell_on_the_page_runs(copy):
    from posttrain.cli.main import cli

    for line in [line for body in snippets("sh") for line in body.splitlines()]:
        program, *words = shlex.split(line)
        assert (program, words[0] in cli.commands) == ("posttrain", True)
        printed = execute([sys.executable, "-m", "posttrain", *words], cwd=copy)
        assert printed
    assert (copy / "out/sft/report.html").is_file()
    assert "already finished" in execute(
        [sys.executable, "-m", "posttrain", "run", "recipes/sft.yaml", "--out", "out/sft"],
        cwd=copy,
    )


@pytest.mark.parametrize("kind", ["completion", "messages", "preference"])
def test_rows_on_the_page_are_read_as_that_format(kind, tmp_path):
    from transformers import AutoTokenizer

    from posttrain.chat.renderer import ChatRenderer

    (row,) = snippets(f"json {kind}")
    (tmp_path / "rows.jsonl").write_text(row)
    source = DatasetRows(
        Dataset(path="rows.jsonl", preference=kind == "preference"),
        root=tmp_path,
        renderer=ChatRenderer(AutoTokenizer.from_pretrained(ROOT / "src/posttrain/lab/base")),
        context=128,
        seed=0,
    )
    assert (source.format, source.num_groups) == (kind, 1)
    answer = {"completion": "q", "messages": "q", "preference": "12"}[kind]
    assert f"<|assistant|>⟦{answer}<|end|>⟧" in source.preview()


def test_the_task_row_and_the_reward_on_the_page_fit_together(tmp_path):
    from posttrain.tasks.jsonl import JsonlTaskSet

    (row,), (code,) = snippets("json task"), snippets("python reward")
    (tmp_path / "rows.jsonl").write_text(row)
    (tmp_path / "mine.py").write_text(code)
    spec = JsonlTasks(path="rows.jsonl", reward="mine.py:reward", held_out=0)
    tasks = JsonlTaskSet("mine", spec, root=tmp_path, chat=True)
    (task,) = tasks.train
    assert tasks.score([task, task], ["it is 12.", "it is 7."]) == [1.0, 0.0]


def test_policy_references_on_the_page_are_the_ones_that_exist():
    from posttrain.core.errors import ConfigError
    from posttrain.run.plan import make_plan

    named = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) == {"base", "input", "learner", "path:../models/teacher"}
    first, second = load_recipe(FOLDER / "pipeline.yaml").stages[:2]

    def plan(ref: str) -> None:
        method = structs.replace(second.method, reference=ref, kl_weight=0.1)
        stages = (first, structs.replace(second, method=method))
        recipe = structs.replace(load_recipe(FOLDER / "pipeline.yaml"), stages=stages)
        make_plan(recipe, root=FOLDER, base="0")

    for ref in ["base", "input", first.name, "path:../src/posttrain/lab/base"]:
        plan(ref)
    for ref in ["previous", second.name, "elsewhere"]:
        with pytest.raises(ConfigError, match=ref):
            plan(ref)


def test_identity_is_what_the_page_says(tmp_path):
    from posttrain.run.plan import make_plan

    recipe = load_recipe(FOLDER / "grpo.yaml")
    (stage,) = recipe.stages

    def identity(root: Path = FOLDER, **changes) -> str:
        changed = structs.replace(recipe, stages=(structs.replace(stage, **changes),))
        return make_plan(changed, root=root, base="0").stages[0].identity

    same = identity()
    shutil.copytree(FOLDER / "data", tmp_path / "data")
    assert identity(tmp_path) == same
    assert identity(gates=(), checkpoint_every=1) == same
    assert identity(name="other") != same
    assert identity(optimizer=structs.replace(stage.optimizer, lr=1e-4)) != same
    for file in ("products_tasks.jsonl", "rewards.py"):
        path = tmp_path / "data" / file
        before = path.read_text()
        path.write_text("\n" + before)
        assert identity(tmp_path) != same
        path.write_text(before)
