"""Data, task sets and models that cannot be used: a message that names the place, and after the
mend the same command in the same folder just runs."""

import json
import shutil

import pytest
from world import dpo, grpo, intervals, recipe, sft, task_set, tiles, turn, write_recipe, write_rows


def lines(path):
    return path.read_text().splitlines()


def broken(name, edit):
    """Spoils a file by a function on its lines."""

    def spoil(world):
        (world / name).write_text("".join(line + "\n" for line in edit(lines(world / name))))

    return spoil


def without_generation(world):
    template = world / "model" / "chat_template.jinja"
    text = template.read_text()
    assert "{% generation %}" in text
    template.write_text(text.replace("{% generation %}", "").replace("{% endgeneration %}", ""))


def empty_mask(world):
    template = world / "model" / "chat_template.jinja"
    text = template.read_text().replace("{% generation %}", "")
    template.write_text(text.replace("{% endgeneration %}", "{% generation %}{% endgeneration %}"))


def long_row(rows):
    row = json.loads(rows[1])
    row["messages"][1]["content"] = "a" * 300
    return [rows[0], json.dumps(row), *rows[2:]]


def equal_pair(rows):
    row = json.loads(rows[2])
    row["rejected"] = row["chosen"]
    return [*rows[:2], json.dumps(row), *rows[3:]]


def no_model(world):
    (world / "model" / "model.safetensors").unlink()


CASES = {
    "not json": (
        broken("demos.jsonl", lambda r: [*r[:3], "{oops", *r[4:]]),
        "DataError",
        ["demos.jsonl, row 4: not JSON"],
    ),
    "column missing": (
        broken("demos.jsonl", lambda r: [r[0], '{"text": "hi"}', *r[2:]]),
        "DataError",
        ["demos.jsonl, row 2: no messages", "text"],
    ),
    "unknown role": (
        broken("demos.jsonl", lambda r: [r[0].replace("assistant", "asistant"), *r[1:]]),
        "DataError",
        ["demos.jsonl, row 1", "did you mean 'assistant'?"],
    ),
    "empty file": (broken("demos.jsonl", lambda r: []), "DataError", ["demos.jsonl is empty"]),
    "file missing": (
        lambda w: (w / "demos.jsonl").unlink(),
        "DataError",
        ["no file", "demos.jsonl", "relative to the recipe"],
    ),
    "too long": (
        broken("demos.jsonl", long_row),
        "DataError",
        ["demos.jsonl, row 2: ", "at most 128, the context", "too_long: skip"],
    ),
    "no generation mask": (
        without_generation,
        "DataError",
        ["demos.jsonl", "generation", "assistant_mask: prefix"],
    ),
    "nothing to train on": (
        empty_mask,
        "DataError",
        ["demos.jsonl", "no trainable token", "assistant_mask: prefix"],
    ),
    "equal answers": (
        broken("pairs.jsonl", equal_pair),
        "DataError",
        ["pairs.jsonl, row 3: chosen and rejected are equal"],
    ),
    "task without prompt": (
        broken("tasks.jsonl", lambda r: [r[0], '{"question": "?"}', *r[2:]]),
        "DataError",
        ["tasks.jsonl, row 2: columns ['question']"],
    ),
    "too few tasks": (
        broken("tasks.jsonl", lambda r: r[:3]),
        "TaskError",
        ["task set say: 3 distinct prompts", "lower held_out, or add rows"],
    ),
    "reward file missing": (
        lambda w: (w / "reward.py").unlink(),
        "TaskError",
        ["no reward file", "reward.py"],
    ),
    "reward function missing": (
        lambda w: (w / "reward.py").write_text("def scores(): ...\n"),
        "TaskError",
        ["reward.py has no function 'score'", "did you mean 'scores'?"],
    ),
    "reward file broken": (
        lambda w: (w / "reward.py").write_text("def score(:\n"),
        "TaskError",
        ["reward.py:1 is not Python: SyntaxError"],
    ),
    "weights missing": (no_model, "ModelError", ["is not a model folder: no *.safetensors"]),
    "weights garbage": (
        lambda w: (w / "model" / "model.safetensors").write_bytes(b"garbage" * 9),
        "ModelError",
        ["model.safetensors is damaged"],
    ),
    "model missing": (
        lambda w: shutil.rmtree(w / "model"),
        "ModelError",
        ["no model folder at model"],
    ),
}


@pytest.fixture(scope="module")
def recipe_of_three():
    """The broken file may belong to the last stage: it is found before the first one trains."""
    one = {"budget": {"steps": 1}}
    measure = {"samples": 2, "max_new_tokens": 2}
    return recipe(sft(**one), grpo(**one), dpo(**one), measure=measure)


@pytest.mark.parametrize("name", CASES)
def test_a_message_then_a_mend_then_a_run(shared, tmp_path, posttrain, recipe_of_three, name):
    spoil, kind, words = CASES[name]
    world = tmp_path / "world"
    for part in ("model", "demos.jsonl", "pairs.jsonl", "tasks.jsonl", "reward.py"):
        copy = shutil.copytree if (shared / part).is_dir() else shutil.copy
        world.mkdir(exist_ok=True)
        copy(shared / part, world / part)
    path, out = write_recipe(world, recipe_of_three), world / "out"
    spoil(world)
    for command in (("run", path, "--out", out), ("plan", path)):
        code, _, errors = posttrain(*command)
        assert code == 2
        assert f"{kind}: " in errors
        for word in words if kind != "ModelError" or command[0] == "run" else ["model"]:
            assert word in errors, errors
    assert not list(out.glob("stages/*/metrics.jsonl")), "something was trained"

    shutil.rmtree(world / "model", ignore_errors=True)
    shutil.copytree(shared / "model", world / "model")
    for part in ("demos.jsonl", "pairs.jsonl", "tasks.jsonl", "reward.py"):
        shutil.copy(shared / part, world / part)
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 0, errors
    assert tiles(intervals(out, "dpo"), 1)


REFERENCES = {
    "task set": (
        lambda: recipe(grpo(method={"tasks": ["sya"]})),
        "stage grpo draws from task set 'sya'",
        "did you mean 'say'?",
    ),
    "gate": (
        lambda: recipe(sft(gates=[{"task": "sya", "at_least": 0.1}])),
        "gate on task 'sya'",
        "did you mean 'say'?",
    ),
    "init": (
        lambda: recipe(sft(), grpo(init="stf")),
        "stage grpo refers to policy 'stf'",
        "did you mean 'sft'?",
    ),
    "init is no role": (
        lambda: recipe(sft(init="learner")),
        "stage sft refers to policy 'learner'",
        "base",
    ),
    "reference is the learner": (
        lambda: recipe(grpo(method={"reference": "learner"})),
        "stage grpo refers to policy 'learner'",
        "base, input",
    ),
    "teacher": (
        lambda: recipe(
            {**sft("d"), "method": {"name": "opd", "tasks": ["say"], "teachers": {"*": "path:x"}}}
        ),
        "no model folder",
        "relative to the recipe's folder",
    ),
    "demonstrations for dpo": (
        lambda: recipe(dpo(data={"path": "demos.jsonl"})),
        "demos.jsonl",
        "prompt + chosen + rejected",
    ),
    "built-in reward": (
        lambda: recipe(grpo(), tasks={"say": task_set(reward="exakt")}),
        "no reward named 'exakt'",
        "did you mean 'exact'?",
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_to_what_is_not_there(shared, tmp_path, posttrain, name):
    content, found, hint = REFERENCES[name]
    path = write_recipe(shared, content(), "reference.yaml")
    for command in (("run", path, "--out", tmp_path / "out"), ("plan", path)):
        code, _, errors = posttrain(*command)
        assert code == 2
        assert found in errors
        assert hint in errors
    assert not (tmp_path / "out" / "stages").exists()


def test_long_rows_may_be_skipped(world, posttrain):
    rows = [json.loads(x) for x in lines(world / "demos.jsonl")]
    rows.append({"messages": [turn("user", "x"), turn("assistant", "a" * 300)]})
    write_rows(world / "demos.jsonl", rows)
    path = write_recipe(world, recipe(sft(data={"path": "demos.jsonl", "too_long": "skip"})))
    assert posttrain("run", path, "--out", world / "out")[0] == 0
