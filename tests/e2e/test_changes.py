"""What may change under a run, and what is refused: a started stage never becomes another one."""

import json

import pytest
from world import (
    Fault,
    dpo,
    grpo,
    intervals,
    listing,
    make_world,
    recipe,
    rows,
    run_recipe,
    sft,
    stage_folder,
    tiles,
    write_recipe,
    write_rows,
)

GATE = {"task": "say", "at_least": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A world whose first stage is finished, and whose second one was killed near its end."""
    world = make_world(tmp_path_factory.mktemp("changes") / "world")
    code, words = run_recipe(write_recipe(world, recipe(sft())), world / "out")
    assert code == 0, words
    code, _ = run_recipe(
        write_recipe(world, content()), world / "out", Fault(before_row="checkpoint")
    )
    assert code < 0
    assert not (stage_folder(world / "out", "grpo") / "done.json").exists()
    return world


def content(**changes):
    second = grpo(**changes.pop("grpo", {}))
    first = sft(**changes.pop("sft", {}))
    return recipe(first, second, **changes)


CHANGES = {
    "option": (
        lambda w: write_recipe(w, content(sft={"optimizer": {"lr": 2e-2}})),
        "stage sft",
        "optimizer.lr: 0.01 -> 0.02",
    ),
    "later stage": (
        lambda w: write_recipe(w, content(grpo={"method": {"group_size": 4}})),
        "stage grpo",
        "composition.source.group_size: 3 -> 4",
    ),
    "seed": (lambda w: write_recipe(w, content(seed=1)), "stage sft", "seed: 0 -> 1"),
    "budget": (
        lambda w: write_recipe(w, content(sft={"budget": {"epochs": 2}})),
        "stage sft",
        "budget.epochs: None -> 2.0; budget.steps: 4 -> None",
    ),
    "data": (
        lambda w: (w / "demos.jsonl").write_text(
            (w / "demos.jsonl").read_text().replace("aa 0", "ab 0")
        ),
        "stage sft",
        "composition.source.path: ",
    ),
    "reward": (
        lambda w: (w / "reward.py").write_text((w / "reward.py").read_text() + "# mended\n"),
        "stage grpo",
        "tasks.say.reward: ",
    ),
    "model": (
        lambda w: (w / "model" / "notes.txt").write_text("other"),
        "stage sft",
        "init: ",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_started_stage_does_not_become_another(base, tmp_path, posttrain, name):
    import shutil

    world = tmp_path / "world"
    shutil.copytree(base, world)
    change, stage, words = CHANGES[name]
    change(world)
    before = listing(world / "out")
    code, _, errors = posttrain("run", world / "recipe.yaml", "--out", world / "out")
    assert code == 2
    assert f"ResumeRefused: {stage} has started in" in errors
    assert words in errors
    if words.endswith(": "):
        line = errors.partition(words)[2].splitlines()[0]
        assert line.endswith("(the content changed)")
        assert " -> " in line
        assert len(line) < 90
    assert "to mend:  undo the change; or choose another --out" in errors
    assert {k: v for k, v in before.items() if k != "lock"} == {
        k: v for k, v in listing(world / "out").items() if k != "lock"
    }

    # The message says what to do. Do it.
    command = errors.partition("rm -r ")[2].splitlines()[0]
    for folder in command.split():
        shutil.rmtree(folder)
    code, _, errors = posttrain("run", world / "recipe.yaml", "--out", world / "out")
    assert code == 0, errors
    assert (stage_folder(world / "out", "grpo") / "done.json").is_file()


def test_what_does_not_touch_the_weights_may_change(base, tmp_path, posttrain):
    import shutil

    world = tmp_path / "world"
    shutil.copytree(base, world)
    free = {"checkpoint_every": 1, "gates": [GATE], "intends": "expansion"}
    changed = content(sft=free, grpo=free, measure={"samples": 6, "max_new_tokens": 4})
    changed["stages"].append(dpo())
    # Where the data lies is no part of what it holds.
    (world / "demos.jsonl").rename(world / "renamed.jsonl")
    changed["stages"][0]["method"]["data"]["path"] = "renamed.jsonl"
    write_recipe(world, changed)
    before = listing(world / "out" / "stages")
    code, _, errors = posttrain("run", world / "recipe.yaml", "--out", world / "out")
    assert code == 0, errors
    after = listing(world / "out" / "stages")
    assert {k: after[k][1] for k in before} == {k: v[1] for k, v in before.items()}
    assert (stage_folder(world / "out", "dpo") / "done.json").is_file()
    assert {json.dumps(b["n"]) for k, b in rows(world / "out") if k == "eval"} == {"4", "6"}


def test_a_renamed_stage_is_another_stage(base, tmp_path, posttrain):
    """Its name seeds its data order, so what follows it starts from other weights."""
    import shutil

    world = tmp_path / "world"
    shutil.copytree(base, world)
    renamed = content(sft={"name": "tuned"})
    write_recipe(world, renamed)
    code, _, errors = posttrain("run", world / "recipe.yaml", "--out", world / "out")
    assert code == 2
    assert "stage grpo has started" in errors
    assert "init: " in errors


def test_a_teacher_folder_counts_by_content(world, posttrain):
    import shutil

    from posttrain.testing import tiny_model

    tiny_model(world / "teacher", seed=1)
    stage = {
        **sft("distil"),
        "method": {
            "name": "opd",
            "tasks": ["say"],
            "teachers": {"*": "path:teacher"},
            "max_new_tokens": 3,
        },
    }
    path = write_recipe(world, recipe(stage))
    assert posttrain("run", path, "--out", world / "out")[0] == 0
    assert ("model", "outside") in {(k, b.get("role")) for k, b in rows(world / "out")}
    shutil.rmtree(world / "teacher")
    tiny_model(world / "teacher", seed=2)
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 2
    assert "references.path:teacher: " in errors
    assert "(the content changed)" in errors


def test_epochs_count_rows_not_updates(world, posttrain):
    """2 epochs of 7 rows, 2 rows a draw, 2 updates a draw: 7 draws, 14 steps, every row twice."""
    from posttrain.run.store import read_uses

    spec = sft(budget={"epochs": 2}, updates_per_draw=2, checkpoint_every=100)
    path = write_recipe(world, recipe(spec, tasks={}))
    assert posttrain("run", path, "--out", world / "out")[0] == 0
    assert tiles(intervals(world / "out", "sft"), 14)
    (file,) = (stage_folder(world / "out", "sft") / "shards").glob("*.uses.parquet")
    counts = {}
    for use in read_uses(file):
        counts[use.task] = counts.get(use.task, 0) + 1
    assert sorted(counts.values()) == [2] * 7


def test_unfinished_and_refused_data_then_mended(world, posttrain):
    """A stage that failed before its first step has not started: mended data just run."""
    good = [json.loads(x) for x in (world / "demos.jsonl").read_text().splitlines()]
    path = write_recipe(world, recipe(sft()))
    code, _ = run_recipe(path, world / "out", Fault(before_file="000002.trajectories.parquet"))
    assert code < 0, "killed in its first commit: nothing is committed"
    write_rows(world / "demos.jsonl", good[:-1])
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 0, errors
    assert tiles(intervals(world / "out", "sft"), 4)
