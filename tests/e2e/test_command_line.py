"""The command line, used without knowledge of the code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from world import grpo, listing, recipe, sft, stage_folder, task_set, write_recipe

COMMANDS = [
    "tour",
    "run",
    "plan",
    "probe",
    "diagnose",
    "treat",
    "compare",
    "report",
    "methods",
    "ledger",
]


@pytest.fixture(scope="module")
def finished(shared):
    """A finished run, made by the command itself in a process of its own."""
    path = write_recipe(shared, recipe(sft(), grpo(budget={"steps": 2}), name="cli"), "cli.yaml")
    command = [Path(sys.executable).with_name("posttrain"), "run", path.name, "--out", "cli-out"]
    done = subprocess.run(command, cwd=shared, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout
    assert "FutureWarning" not in done.stderr
    return path, shared / "cli-out"


# --- words that are not known ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu", "x"], ["no command 'rnu'; did you mean 'run'?"]),
        (["repotr"], ["no command 'repotr'; did you mean 'report'?"]),
        (["xyzzy"], ["no command 'xyzzy'; known: compare, diagnose"]),
        (["ledger", "verfy"], ["no command 'verfy'; did you mean 'verify'?"]),
        (["tour", "--sed", "1"], ["No such option", "--seed"]),
        (["run", "r.yaml", "--otu", "x"], ["No such option", "--out"]),
        (["probe", "m", "--task", "x"], ["--tasks"]),
        (["methods", "grppo"], ["no method 'grppo'", "did you mean 'grpo'?"]),
        (["run"], ["Missing argument 'RECIPE'"]),
        (["compare"], ["Missing argument 'BEFORE'"]),
        (["probe", "m"], ["Missing option '--tasks'"]),
        (["tour", "--seed", "one"], ["'one' is not a valid integer"]),
        (["run", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["plan", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["report", "nowhere"], ["nowhere is not a run folder", "recipe.json"]),
        (["compare", "nowhere"], ["nowhere is not a run folder"]),
        (["compare", "a.json", "b.json"], ["no measurement a.json", "RUN:POLICY"]),
        (["compare", "nowhere:base", "b.json"], ["nowhere is not a run folder"]),
        (["ledger", "verify", "nowhere"], ["nowhere", "does not exist"]),
    ],
)
def test_words_that_are_not_known(posttrain, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, errors = posttrain(*arguments)
    assert code == 2
    for word in words:
        assert word in errors, errors
    assert out == ""
    assert not list(tmp_path.iterdir()), "a mistake left something behind"


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS), ["ledger", "verify"]])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(posttrain, command, flag):
    code, out, errors = posttrain(*command, flag)
    assert (code, errors) == (0, "")
    assert out.startswith("Usage: posttrain")
    if command:
        assert len(out.splitlines()[2].strip()) > 20, "no sentence that says what it does"


def test_the_list_of_commands_is_in_the_order_of_use(posttrain):
    out = posttrain("--help")[1]
    at = [out.index(f"\n  {c} ") for c in COMMANDS]
    assert at == sorted(at)


def test_version(posttrain):
    from importlib.metadata import version

    assert version("posttrain") in posttrain("--version")[1]


def test_a_reader_who_has_seen_enough(tmp_path):
    """`posttrain methods | true` ends without a word."""
    program = Path(sys.executable).with_name("posttrain")
    done = subprocess.run(
        f"{program} methods grpo | true", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


# --- recipes ---------------------------------------------------------------------------------

RECIPES = {
    "unknown option": (
        {"stages": [{**sft(), "budgte": {}}]},
        ["unknown field `budgte`", "did you mean 'budget'?"],
    ),
    "unknown method": (
        {"stages": [{**sft(), "method": {"name": "grppo"}}]},
        ["grppo", "did you mean 'grpo'?"],
    ),
    "wrong type": (
        {"stages": [sft(optimizer={"lr": "fast"})]},
        ["Expected `float`, got `str`", "$.stages[0].optimizer.lr"],
    ),
    "two budgets": (
        {"stages": [sft(budget={"steps": 1, "epochs": 1})]},
        ["budget with steps=1, epochs=1.0", "exactly one of them"],
    ),
    "same name": ({"stages": [sft(), sft()]}, ["stages named twice: ['sft']"]),
    "no model": ({"model": None}, ["$.model"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_are_wrong(shared, tmp_path, posttrain, name):
    changes, words = RECIPES[name]
    path = write_recipe(shared, {**recipe(), **changes}, "wrong.yaml")
    for command in (["run", path, "--out", tmp_path / "out"], ["plan", path]):
        code, _, errors = posttrain(*command)
        assert code == 2
        assert errors.startswith("ConfigError: ")
        for word in words:
            assert word in errors, errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "is not YAML"),
        (b"- a\n- b\n", "holds list"),
        (b"", "holds NoneType"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan", "probe"])
def test_files_that_are_no_recipe(tmp_path, posttrain, command, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    arguments = ["m", "--tasks", path] if command == "probe" else [path]
    code, _, errors = posttrain(command, *arguments)
    assert code == 2
    assert words in errors, errors


def test_a_folder_that_cannot_be_written(shared, posttrain, tmp_path):
    path = write_recipe(shared, recipe(), "plain.yaml")
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for out in (taken, taken / "below"):
        code, _, errors = posttrain("run", path, "--out", out)
        assert code == 2
        assert str(taken) in errors


# --- plan ------------------------------------------------------------------------------------


def test_plan_shows_everything_and_touches_nothing(world, posttrain, monkeypatch):
    monkeypatch.chdir(world)
    spec = sft(budget={"epochs": 2}, lora={"rank": 2})
    path = write_recipe(world, recipe(spec, grpo(gates=[{"task": "say", "at_least": 0.5}])))
    before = listing(world), sorted(world.rglob("*"))
    code, out, errors = posttrain("plan", path)
    assert (code, errors) == (0, "")
    assert (listing(world), sorted(world.rglob("*"))) == before
    # 7 rows, 2 a step, twice: 7 steps. 4 steps of 2 groups of 3 answers of 4 tokens: 96.
    for words in (
        "identity ",
        "measured  say; 4 samples per prompt",
        "1. sft  sft  (sft-",
        "provenance  off-policy: demos.jsonl (external)",
        "2. grpo  grpo  (grpo-",
        "provenance  on-policy: the learner's own rollouts",
        "starts from sft",
        "signals     verify → group_advantage → reference_logprobs",
        "objective   1 clipped_policy_gradient + 0.01 reference_kl",
        "legality    ok",
        "steps       7  (2 groups each, 7 rows)",
        "steps       4  (2 groups each)",
        "at most 96 of answers",
        "adapters of rank 2",
        "AdamW",
        "gate        pass@1 on say: at least 0.5, else stop",
        "checkpoint_every: 2",
    ):
        assert words in out, words


def test_plan_names_the_folders_that_run_makes(shared, finished, posttrain):
    path, out = finished
    text = posttrain("plan", path)[1]
    for name in ("sft", "grpo"):
        assert f"({stage_folder(out, name).name})" in text


def test_plan_of_an_illegal_composition(shared, posttrain):
    method = {
        "name": "compose",
        "source": {"type": "dataset", "path": "demos.jsonl"},
        "terms": [{"type": "clipped_policy_gradient"}],
    }
    path = write_recipe(shared, recipe({**sft(), "method": method}), "illegal.yaml")
    code, _, errors = posttrain("plan", path)
    assert code == 2
    assert "LegalityError: stage sft: clipped_policy_gradient needs" in errors
    assert "to mend:" in errors


# --- probe, compare, report ------------------------------------------------------------------


def test_probe_writes_what_compare_reads(shared, finished, posttrain, tmp_path):
    path, out = finished
    file = tmp_path / "base.json"
    code, table, errors = posttrain("probe", shared / "model", "--tasks", path, "--out", file)
    assert code == 0, errors
    assert "4 samples per prompt" in table
    mine, theirs = (json.loads(p.read_text()) for p in (file, out / "measurements" / "base.json"))
    assert mine["tasks"][0]["scores"] == theirs["tasks"][0]["scores"]
    assert mine["protocol"] == theirs["protocol"]
    tables = []
    for pair in ([file, f"{out}:grpo"], [f"{out}:base", f"{out}:grpo"], [out]):
        code, table, errors = posttrain("compare", *pair)
        assert code == 0, errors
        tables.append([line for line in table.splitlines() if " → grpo: " not in line])
    assert tables[0] == tables[1] == tables[2][: len(tables[0])]
    rest = "\n".join(tables[2][len(tables[0]) :])  # a run has stages, so retention is shown as well
    assert "retention over the stages" in rest
    assert "say" in rest
    task_lines = [line for line in tables[0] if line.startswith("  say")]
    assert len(task_lines) == 4  # three tables and a note
    code, table, errors = posttrain("compare", out, "--tasks", "say")
    assert code == 0, errors
    assert posttrain("compare", out, "--tasks", "sai")[0] == 2
    code, table, errors = posttrain(
        "probe", shared / "model", "--tasks", path, "--out", file, "--details"
    )
    assert code == 0, errors
    assert "needed_group" in table


def test_too_few_prompts_are_measured_with_a_warning_and_not_compared(world, posttrain):
    few = recipe(tasks={"say": task_set(held_out=4)})
    path, file = write_recipe(world, few), world / "few.json"
    code, table, errors = posttrain("probe", world / "model", "--tasks", path, "--out", file)
    assert code == 0, errors
    assert "say: 4 prompts are too few to judge by" in table
    code, _, errors = posttrain("compare", file, file)
    assert code == 2
    assert "too few prompts to judge by: say (4)" in errors


def test_probe_with_other_samples_cannot_be_compared(shared, finished, posttrain, tmp_path):
    path, out = finished
    file = tmp_path / "base.json"
    options = ["--tasks", path, "--samples", 3, "--out", file]
    code, table, _ = posttrain("probe", shared / "model", *options)
    assert code == 0
    assert "3 samples per prompt" in table
    code, _, errors = posttrain("compare", file, f"{out}:grpo")
    assert code == 2
    assert "3 and 4 samples per prompt" in errors


def test_compare_names_the_nearest_policy(finished, posttrain):
    _, out = finished
    code, _, errors = posttrain("compare", f"{out}:bsae", f"{out}:grpo")
    assert code == 2
    assert "no measured policy 'bsae'" in errors
    assert "did you mean 'base'?" in errors
    code, _, errors = posttrain("compare", out, f"{out}:grpo")
    assert code == 2
    assert f"name a policy: {out}:base" in errors


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b"not json"])
def test_compare_of_something_else(posttrain, tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    code, _, errors = posttrain("compare", file, file)
    assert code == 2
    assert f"{file} is not a measurement" in errors


def test_probe_of_what_is_no_model(shared, finished, posttrain, tmp_path):
    path, _ = finished
    (tmp_path / "empty").mkdir()
    code, _, errors = posttrain("probe", tmp_path / "empty", "--tasks", path)
    assert code == 2
    assert "is not a model folder: no config.json" in errors
    bare = tmp_path / "bare.yaml"
    bare.write_text("seed: 1\n")
    code, _, errors = posttrain("probe", shared / "model", "--tasks", bare)
    assert code == 2
    assert "has no tasks, so there is nothing to measure on" in errors
    bare.write_text("tasks: {}\nmeasure: 5\n")
    assert posttrain("probe", shared / "model", "--tasks", bare)[0] == 2
    bare.write_text(path.read_text().replace("samples: 4", "sampels: 4"))
    code, _, errors = posttrain("probe", shared / "model", "--tasks", bare)
    assert code == 2
    assert "did you mean 'samples'?" in errors


def test_report_is_one_page(finished, posttrain):
    _, out = finished
    (out / "report.html").unlink()
    code, words, _ = posttrain("report", out)
    assert code == 0
    assert words.strip() == str(out / "report.html")
    assert "</html>" in (out / "report.html").read_text()


def test_methods(posttrain):
    out = posttrain("methods")[1]
    assert all(name in out for name in ("sft", "dpo", "grpo", "opd", "compose"))
    out = posttrain("methods", "grpo")[1]
    assert re.search(r"group_size\s+8\b", out)
    assert "2402.03300" in out


# --- ledger ----------------------------------------------------------------------------------


def test_ledger_verify(finished, posttrain, tmp_path):
    _, out = finished
    code, words, _ = posttrain("ledger", "verify", out)
    assert code == 0
    assert "the chain holds over" in words
    assert "1 run" in words
    head = words.partition("head ")[2].split()[0]
    assert posttrain("ledger", "verify", out / "ledger.jsonl", "--head", head)[0] == 0
    assert posttrain("ledger", "verify", out, "--head", "0123")[0] == 2

    lines = (out / "ledger.jsonl").read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"stage":"sft"' in line)
    copy = tmp_path / "ledger.jsonl"
    copy.write_text("".join([*lines[:at], lines[at].replace("sft", "tfs", 1), *lines[at + 1 :]]))
    code, words, errors = posttrain("ledger", "verify", tmp_path)
    assert (code, words) == (2, "")
    assert "LedgerBroken" in errors
    assert f"line {at + 1} was changed" in errors
    copy.unlink()
    code, _, errors = posttrain("ledger", "verify", tmp_path)
    assert code == 2
    assert "no ledger in" in errors


def test_a_run_does_not_go_on_over_a_broken_ledger(world, posttrain):
    path, out = write_recipe(world, recipe(sft(), tasks={})), world / "out"
    assert posttrain("run", path, "--out", out)[0] == 0
    file = out / "ledger.jsonl"
    file.write_text(file.read_text().replace('"steps":[0,2]', '"steps":[0,3]'))
    before = listing(out)
    write_recipe(world, recipe(sft(), sft("more"), tasks={}))
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "LedgerBroken" in errors
    after = listing(out)
    assert {k: v for k, v in before.items() if k != "lock"} == {
        k: v for k, v in after.items() if k != "lock"
    }


def test_threads_are_one():
    """The whole folder promises to run on one thread."""
    assert os.environ["OMP_NUM_THREADS"] == "1"
