"""`posttrain diagnose` on the lab's base, whose support is known, and what it prescribes."""

import contextlib
import io
import json
import sys

import pytest
import yaml

from posttrain.cli.main import main
from posttrain.core import config
from posttrain.diagnosis.card import Diagnosis
from posttrain.diagnosis.page import render_card
from posttrain.lab.corpus import demonstrations, write_rows
from posttrain.lab.settings import SETTINGS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.recipe import load_recipe


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three task sets, and demonstrations of `reverse`."""
    folder = tmp_path_factory.mktemp("lab")
    tasks = {
        name: {**config.plain(SETTINGS[name].tasks), "held_out": 32}
        for name in ("sums", "products", "reverse")
    }
    content = {"tasks": tasks, "measure": {"max_new_tokens": ANSWER}, "threads": 1}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    rows = (d.row for d in demonstrations(SETTINGS["reverse"], seed=0, count=200))
    write_rows(folder / "demos.jsonl", rows)
    return folder


def command(*arguments: str) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["posttrain", *arguments])
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def bare(lab):
    arguments = ["--tasks", str(lab / "tasks.yaml"), "--budget", "12000"]
    done = command("diagnose", str(BASE), *arguments, "--out", str(lab / "bare"))
    assert done[0] == 0, done[2]
    return lab / "bare", done[1]


def test_the_lab_is_diagnosed_as_it_was_built(bare):
    folder, shown = bare
    found = Diagnosis.from_json((folder / "diagnosis.json").read_text())
    assert (folder / "diagnosis.html").read_text() == render_card(found)
    named = {t.task: str(t.bottleneck) for t in found.tasks}
    assert named == {"sums": "saturation", "products": "choice", "reverse": "support"}
    for word in ("SATURATION", "CHOICE", "SUPPORT", "pass@64 is 0.00", "overturned by"):
        assert word in shown


def test_it_spends_no_more_than_its_budget_and_says_what_it_spent(bare):
    found = Diagnosis.from_json((bare[0] / "diagnosis.json").read_text())
    assert 3 * 32 * 64 <= found.cost.rollouts <= 12000
    assert found.cost.sampled_tokens >= found.cost.rollouts


def test_without_demonstrations_it_says_what_to_obtain(bare):
    folder, shown = bare
    assert "--demos" in shown
    assert "Nothing on-policy can help" in " ".join(shown.split())
    (stage,) = load_recipe(folder / "next.yaml").stages  # products can be treated all the same
    assert stage.method.tasks == ("products",)


def test_what_is_prescribed_is_planned_and_run_as_it_stands(lab):
    code, _, errors = command(
        *("diagnose", str(BASE), "--tasks", str(lab / "tasks.yaml"), "--budget", "12000"),
        *("--demos", f"reverse={lab / 'demos.jsonl'}", "--out", str(lab / "with")),
    )
    assert code == 0, errors
    path = lab / "with/next.yaml"
    recipe = load_recipe(path)
    assert recipe.stages[0].name == "rehearsed-import"
    code, shown, errors = command("plan", str(path))
    assert code == 0, errors
    assert "legality    ok" in shown
    # The same recipe, but for the length of its only stage.
    content = yaml.safe_load(path.read_text())
    content["stages"][0]["budget"] = {"steps": 2}
    content["stages"][0]["gates"] = [
        {**g, "otherwise": "warn"} for g in content["stages"][0]["gates"]
    ]
    path.write_text(yaml.safe_dump(content))
    code, _, errors = command("run", str(path), "--out", str(lab / "run"))
    assert code == 0, errors
    rows = [json.loads(r) for r in (lab / "run/ledger.jsonl").read_text().splitlines()]
    assert {"checkpoint", "gate", "eval"} <= {r["kind"] for r in rows}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--demos", "revers=x.jsonl"], "did you mean 'reverse'?"),
        (["--demos", "nowhere.jsonl"], "no such file"),
        (["--teacher", "a/b", "--teacher", "c/d"], "given twice"),
        (["--scaffold", "think"], "no place for the question"),
        (["--later-tasks", "sumz"], "did you mean 'sums'?"),
        (["--budget", "10"], "at least 6144"),
        (["--rules", "RULES"], "did you mean 'rules'?"),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(lab, arguments, says):
    (lab / "mine.yaml").write_text("rulez: []")
    arguments = [str(lab / "mine.yaml") if a == "RULES" else a for a in arguments]
    asked = ["diagnose", str(BASE), "--tasks", str(lab / "tasks.yaml"), *arguments]
    code, _, errors = command(*asked, "--out", str(lab / "none"))
    assert code == 2
    assert says in errors
    assert not (lab / "none").exists()


def test_too_few_prompts_are_refused(lab):
    content = yaml.safe_load((lab / "tasks.yaml").read_text())
    content["tasks"]["sums"]["held_out"] = 4
    (lab / "few.yaml").write_text(yaml.safe_dump(content))
    code, _, errors = command("diagnose", str(BASE), "--tasks", str(lab / "few.yaml"))
    assert code == 2
    assert "sums has 4 held-out prompts" in errors
