"""A run folder whose files were edited: found by `ledger verify`, and before the file is used."""

import shutil

import pytest
from world import (
    Fault,
    grpo,
    make_world,
    recipe,
    rows,
    run_recipe,
    sft,
    stage_folder,
    trace,
    write_recipe,
)

from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder

LORA = grpo(lora={"rank": 2, "alpha": 4}, budget={"steps": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and what it is without clocks."""
    world = make_world(tmp_path_factory.mktemp("finished") / "world")
    code, words = run_recipe(write_recipe(world, recipe(sft(), LORA)), world / "out")
    assert code == 0, words
    return world, trace(world / "out")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was killed in its second stage, between two commits."""
    world = make_world(tmp_path_factory.mktemp("interrupted") / "world")
    path = write_recipe(world, recipe(sft(), grpo(checkpoint_every=1)))
    code, _ = run_recipe(path, world / "out", Fault(before_file="000003.uses.parquet"))
    assert code < 0
    assert audit(RunFolder(world / "out")) == [], "what a kill leaves is no edit"
    return world


def edit(path, way, older):
    """One byte, a cut, no file at all, or another version of it."""
    raw = path.read_bytes()
    if way == "a byte":
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    elif way == "a cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif way == "deleted":
        path.unlink()
    else:
        path.write_bytes(older.get(path.name, raw[::-1]))


def files_of(out):
    """Every file that is read again, by its place: no page, and nothing of an unfinished write."""
    free = {"report.html", "lock", "ledger.jsonl.head", "000003.trajectories.parquet"}
    found = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in free)
    return [str(p.relative_to(out)) for p in found if not p.name.startswith(".")]


WAYS = ("a byte", "a cut", "deleted", "another version")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_every_edit_of_every_file_is_found(request, tmp_path, posttrain, state, way):
    world = request.getfixturevalue(state)
    world = world[0] if isinstance(world, tuple) else world
    out = tmp_path / "out"
    older = {p.name: p.read_bytes()[::-1] for p in world.glob("out/stages/*/*.json")}
    files = files_of(world / "out")
    assert len(files) > 25
    for name in files:
        shutil.copytree(world / "out", out)
        edit(out / name, way, older)
        code, said, errors = posttrain("ledger", "verify", out)
        assert code == 2, f"{name}: {said}"
        assert name.split("/")[-1] in said + errors, (name, said, errors)
        shutil.rmtree(out)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_does_not_go_on_from_an_edited_file(interrupted, tmp_path, posttrain, way):
    """All that a resumed stage reads: its checkpoint, its record, the model it starts from."""
    recipe_file = interrupted / "recipe.yaml"
    at = {name: stage_folder(interrupted / "out", name).name for name in ("sft", "grpo")}
    used = [
        *("ledger.jsonl", "recipe.json", "measurements/base.json", "measurements/sft.json"),
        *(f"stages/{at['grpo']}/{n}" for n in ("stage.json", "metrics.jsonl")),
        *(f"stages/{at['grpo']}/checkpoint/{n}" for n in ("learner.pt", "progress.json")),
        *(f"stages/{at['sft']}/{n}" for n in ("stage.json", "done.json", "metrics.jsonl")),
        *(f"stages/{at['sft']}/model/{n}" for n in ("model.safetensors", "config.json")),
    ]
    world = tmp_path / "world"
    for name in used:
        shutil.copytree(interrupted, world)
        edit(world / "out" / name, way, {})
        code, _, errors = posttrain("run", world / recipe_file.name, "--out", world / "out")
        assert code == 2, name
        kind = "LedgerBroken" if name == "ledger.jsonl" else "FileChanged"
        assert kind in errors, (name, errors)
        assert name.split("/")[-1] in errors, (name, errors)
        assert "rm -r" not in errors
        shutil.rmtree(world)


def test_an_older_checkpoint_is_not_gone_on_from(tmp_path, posttrain):
    world = make_world(tmp_path / "world")
    path = write_recipe(world, recipe(sft(checkpoint_every=1)))
    out = world / "out"
    assert run_recipe(path, out, Fault(before_file="000002.uses.parquet"))[0] < 0
    stage = stage_folder(out, "sft")
    shutil.copytree(stage / "checkpoint", tmp_path / "older")
    assert run_recipe(path, out, Fault(before_file="000004.uses.parquet"))[0] < 0
    shutil.rmtree(stage / "checkpoint")
    shutil.copytree(tmp_path / "older", stage / "checkpoint")
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "FileChanged" in errors
    assert "checkpoint/" in errors


@pytest.mark.parametrize("name", ["measurements/sft.json", "measurements/base.json", "recipe.json"])
@pytest.mark.parametrize("way", ["a byte", "a cut", "another version"])
def test_a_comparison_reads_nothing_that_was_edited(finished, tmp_path, posttrain, name, way):
    world, _ = finished
    out = tmp_path / "out"
    shutil.copytree(world / "out", out)
    edit(out / name, way, {})
    for arguments in (["compare", out], ["compare", f"{out}:base", f"{out}:sft"]):
        code, said, errors = posttrain(*arguments)
        assert (code, said) == (2, "")
        assert f"FileChanged: {out}: {name}" in errors
    if name.startswith("measurements"):
        code, _, errors = posttrain("compare", out / name, out / "measurements" / "grpo.json")
        assert code == 2
        assert "FileChanged" in errors


@pytest.mark.parametrize("way", WAYS)
def test_a_report_is_written_and_says_first_what_was_edited(finished, tmp_path, posttrain, way):
    world, _ = finished
    at = stage_folder(world / "out", "sft").name
    for name in (
        "ledger.jsonl",
        "measurements/sft.json",
        *(f"stages/{at}/{n}" for n in ("metrics.jsonl", "stage.json", "done.json")),
        f"stages/{at}/shards/000004.uses.parquet",
        f"stages/{at}/shards/000004.trajectories.parquet",
    ):
        out = tmp_path / "out"
        shutil.copytree(world / "out", out)
        edit(out / name, way, {})
        code, _, errors = posttrain("report", out)
        assert code == 0, (name, errors)
        assert name in errors
        page = (out / "report.html").read_text()
        assert "The ledger does not verify." in page
        assert name in page
        assert page.index("The ledger does not verify.") < page.index("</dl>")
        shutil.rmtree(out)


def test_a_ledger_that_is_gone_or_cut_stops_a_run(finished, tmp_path, posttrain):
    world, _ = finished
    for number, spoil in enumerate((_delete, _cut_rows, _delete_with_its_head)):
        copy = tmp_path / str(number)
        shutil.copytree(world, copy)
        spoil(copy / "out" / "ledger.jsonl")
        for arguments in (["run", copy / "recipe.yaml", "--out", copy / "out"],
                          ["ledger", "verify", copy / "out"]):  # fmt: skip
            code, _, errors = posttrain(*arguments)
            assert code == 2, arguments
            assert "LedgerBroken" in errors or "is not in the ledger" in errors


def _delete(ledger):
    ledger.unlink()


def _cut_rows(ledger):
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]))


def _delete_with_its_head(ledger):
    ledger.unlink()
    ledger.with_name("ledger.jsonl.head").unlink()


def test_files_are_gone_on_with_as_they_are_only_by_name(finished, tmp_path, posttrain):
    world = tmp_path / "world"
    shutil.copytree(finished[0], world)
    out, path = world / "out", world / "recipe.yaml"
    metrics = stage_folder(out, "sft") / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": ', '"loss":  '))
    (out / "measurements" / "notes.json").write_text("{}")
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "metrics.jsonl holds" in errors
    assert "measurements/notes.json is not in the ledger" in errors
    assert posttrain("run", path, "--out", out, "--accept", "files")[0] == 0
    (body,) = (b for kind, b in rows(out) if kind == "accept")
    assert "measurements/notes.json" in body["files"]
    assert posttrain("ledger", "verify", out)[0] == 0
    assert posttrain("run", path, "--out", out)[0] == 0, "once is enough"


def test_a_stray_file_of_a_file_manager_is_no_edit(finished, tmp_path, posttrain):
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "out", out)
    for folder in (out, out / "measurements", stage_folder(out, "sft") / "model"):
        (folder / ".DS_Store").write_bytes(b"\0")
    assert posttrain("ledger", "verify", out)[0] == 0


def test_a_stage_is_set_aside_and_started_again(finished, tmp_path, posttrain):
    world, expected = finished
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    out, path = copy / "out", copy / "recipe.yaml"
    model = stage_folder(out, "sft") / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-9])
    assert "run --restart STAGE" in posttrain("run", path, "--out", out)[2]
    code, _, errors = posttrain("run", path, "--out", out, "--restart", "sft")
    assert code == 0, errors
    kept = sorted(p.name.partition("-")[0] for p in (out / "aside").iterdir())
    assert kept == ["grpo", "sft"], "and what builds on it"
    again = trace(out)
    assert {k: v for k, v in again.items() if k != "rows"} == {
        k: v for k, v in expected.items() if k != "rows"
    }
    assert posttrain("ledger", "verify", out)[0] == 0
    code, _, errors = posttrain("run", path, "--out", out, "--restart", "sfd")
    assert code == 2
    assert "did you mean 'sft'?" in errors


@pytest.mark.parametrize("name", ["demos.jsonl", "tasks.jsonl", "reward.py", "model/config.json"])
def test_what_the_recipe_names_is_compared_on_request(finished, tmp_path, posttrain, name):
    world = tmp_path / "world"
    shutil.copytree(finished[0], world)
    command = ["ledger", "verify", world / "out", "--recipe", world / "recipe.yaml"]
    assert "what" in posttrain(*command)[1].splitlines()[-1]
    text = (world / name).read_text()
    changed = {"model/config.json": text.replace("{", '{"note": 1,', 1)}
    (world / name).write_text(changed.get(name, text.replace("a", "b", 1)))
    code, _, errors = posttrain(*command)
    assert code == 2
    assert "(the content changed)" in errors


def test_a_model_of_another_run_is_compared_with_its_ledger(finished, tmp_path, posttrain):
    """As the base of a recipe, as a teacher, and where two models are compared."""
    world = tmp_path / "world"
    shutil.copytree(finished[0], world)
    model = stage_folder(world / "out", "sft") / "model"
    path = write_recipe(world, recipe(sft(), model=str(model)), "next.yaml")
    weights = model / "model.safetensors"
    raw = weights.read_bytes()
    assert posttrain("plan", path)[0] == 0
    weights.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    for arguments in (["plan", path], ["run", path, "--out", world / "next"],
                      ["compare", world / "model", model, "--tasks", path],
                      ["compare", f"{world / 'out'}:base", f"{world / 'out'}:sft", "--tasks", path],
                      ["probe", model, "--tasks", path]):  # fmt: skip
        code, _, errors = posttrain(*arguments)
        assert code == 2, arguments
        assert "model.safetensors was changed" in errors, (arguments, errors)
