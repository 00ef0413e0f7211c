"""What may change under a run, and what is refused: a started stage never becomes another one."""

import hashlib
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
    "model": (lambda w: change_model(w), "stage sft", "init: "),
}
NAMES = {"option": "optimizer", "later stage": "method"}
"""Under which a change is accepted, where that is not its own name."""


def change_model(world):
    config = world / "model" / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"note": 1,', 1))


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
    named = f"run --accept {NAMES.get(name, name)}"
    assert f"undo the change; or go on from its last checkpoint all the same: {named}" in errors
    assert "choose another --out" in errors
    assert "rm " not in errors
    unchanged = {"lock", "ledger.jsonl", "ledger.jsonl.head"}  # a kill's last row is put right
    assert {k: v for k, v in before.items() if k not in unchanged} == {
        k: v for k, v in listing(world / "out").items() if k not in unchanged
    }

    # The message says what to do. Do it, in both ways.
    shutil.copytree(world, tmp_path / "again")
    for place, words in ((world, ["--accept", NAMES.get(name, name)]),
                         (tmp_path / "again", ["--restart", stage.split()[1]])):  # fmt: skip
        command = ["run", place / "recipe.yaml", "--out", place / "out"]
        code, _, errors = posttrain(*command, *words)
        assert code == 0, errors
        assert (stage_folder(place / "out", "grpo") / "done.json").is_file()
        assert posttrain("ledger", "verify", place / "out")[0] == 0
        before = listing(place / "out")
        assert posttrain(*command)[0] == 0, "once is enough"
        ledgers = [x["ledger.jsonl"] for x in (before, listing(place / "out"))]
        assert ledgers[0] == ledgers[1]
    kinds = [kind for kind, _ in rows(world / "out")]
    assert kinds.count("accept") == (1 if stage == "stage grpo" else 2), "what builds on it too"


def test_a_mended_reward_goes_on_from_the_last_checkpoint(tmp_path, posttrain):
    """Steps that were taken are not taken again; the ledger says what changed, and when."""
    world = make_world(tmp_path / "world")
    path, out = write_recipe(world, recipe(grpo(checkpoint_every=1))), world / "out"
    assert run_recipe(path, out, Fault(before_file="000003.uses.parquet"))[0] < 0
    reward = world / "reward.py"
    old, new = reward.read_text(), reward.read_text().replace("0.1", "0.2")
    reward.write_text(new)
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "run --accept reward" in errors
    assert posttrain("run", path, "--out", out, "--accept", "data")[0] == 2, "another name"
    assert run_recipe(path, out, Fault(before_file="000004.uses.parquet"), accept=["reward"])[0] < 0
    code, _, errors = posttrain("run", path, "--out", out)  # no word is needed any more
    assert code == 0, errors
    assert intervals(out, "grpo") == [[0, 1], [1, 2], [2, 3], [3, 4]]
    (body,) = (b for kind, b in rows(out) if kind == "accept")
    assert (body["name"], body["parts"], body["step"]) == ("grpo", ["reward"], 2)
    (line,) = body["changes"]
    assert [digest(text) in line for text in (old, new)] == [True, True]
    identities = [b["identity"] for kind, b in rows(out) if kind == "update"]
    assert identities == [body["old"]] * 2 + [body["new"]] * 2

    reward.write_text(old)  # what it was at first is another change now
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "run --accept reward" in errors


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_bad_row_is_taken_out_and_nothing_is_lost(world, posttrain):
    path, out = write_recipe(world, recipe(sft(), dpo())), world / "out"
    assert run_recipe(path, out, Fault(before_row="checkpoint"))[0] < 0
    good = [json.loads(x) for x in (world / "demos.jsonl").read_text().splitlines()]
    write_rows(world / "demos.jsonl", good[:-1])
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "run --accept data" in errors
    code, _, errors = posttrain("run", path, "--out", out, "--accept", "data")
    assert code == 0, errors
    assert intervals(out, "sft") == [[0, 2], [2, 4]]


def test_other_versions_are_named_and_gone_on_with(base, tmp_path, monkeypatch, posttrain):
    import shutil

    from posttrain.run import resume

    world = tmp_path / "world"
    shutil.copytree(base, world)
    path, out = world / "recipe.yaml", world / "out"
    here = resume.versions()
    monkeypatch.setattr(resume, "versions", lambda: {**here, "numpy": "9.9.9"})
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert f"stage grpo has started in {out}" in errors, "the first one is finished"
    assert f"versions.numpy: {here['numpy']} -> 9.9.9" in errors
    assert "run --accept versions" in errors
    assert posttrain("run", path, "--out", out, "--accept", "versions")[0] == 0
    monkeypatch.undo()
    assert posttrain("run", path, "--out", out)[0] == 0, "finished stages depend on none"


def test_another_meaning_of_a_configuration_leaves_finished_stages_alone(
    base, tmp_path, monkeypatch, posttrain
):
    import shutil

    from posttrain.run import plan

    world = tmp_path / "world"
    shutil.copytree(base, world)
    path, out = world / "recipe.yaml", world / "out"
    monkeypatch.setattr(plan, "SEMANTICS", plan.SEMANTICS + 1)
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "stage grpo" in errors
    assert "run --accept versions" in errors
    code, _, errors = posttrain("run", path, "--out", out, "--accept", "versions")
    assert code == 0, errors
    assert len(intervals(out, "sft")) == 2, "not trained again"


def test_adapters_of_another_shape_cannot_be_accepted(world, posttrain):
    path, out = write_recipe(world, recipe(sft(lora={"rank": 2}))), world / "out"
    assert run_recipe(path, out, Fault(before_row="checkpoint"))[0] < 0
    write_recipe(world, recipe(sft(lora={"rank": 3})))
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "lora.rank: 2 -> 3" in errors
    assert "--accept" not in errors
    assert "run --restart sft" in errors


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
