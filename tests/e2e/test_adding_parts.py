"""A new part touches one file: those that CONTRIBUTING shows, in a copy of the package, at work."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import house
import pytest

import posttrain
from posttrain.testing import tiny_model


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the page's files in it; (folder, files that were touched by heading)."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(
        Path(posttrain.__file__).parent,
        folder / "posttrain",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for blocks in house.new_parts().values():
        for path, code in blocks:
            assert not (folder / path).exists(), f"{path} exists: the page would replace it"
            (folder / path).write_text(code, encoding="utf-8")
    return folder


def python(folder, *arguments, **options):
    """Python with the copied package in front."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env={"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        **options,
    )


def test_every_kind_of_part_is_shown_and_touches_few_files():
    touched = {kind: len({path for path, _ in files}) for kind, files in house.new_parts().items()}
    assert touched.keys() == house.NEW_PARTS.keys()
    assert all(touched[kind] <= most for kind, most in house.NEW_PARTS.items()), touched


PROVE = """
from posttrain.testing import check_method, check_signal, check_term, fake_tools, FakePolicy
from posttrain.testing import FakeTaskSet, check_source
from posttrain import method, Dataset, Rollouts
from posttrain.parts.registry import find, load, package_of
load()
loss = find("term", "chi_po")
check_term(loss())
check_method(method("chi_po", data=Dataset(path="pairs.jsonl"), beta=0.3))
assert package_of(loss) is None
live, sets = FakePolicy({"a": 0.3, "b": 0.7}, version=0), {"letters": FakeTaskSet()}
tools = fake_tools(live, tasksets=sets, policies={"base": FakePolicy({"a": 0.5, "b": 0.5})})
stream = check_source(Rollouts(tasks=("letters",), group_size=4), tools)
judged = check_signal(find("signal", "fluency_reward")(), stream.draw(3, step=0), tools)
check_signal(find("signal", "median_advantage")(), judged, tools)
print("proved")
"""


def test_the_contracts_hold(copy):
    done = python(copy, "-c", PROVE)
    assert done.stdout.endswith("proved\n"), done.stderr


RECIPE = """
name: added
model: model
threads: 1
device: cpu
tasks: {letters: {type: jsonl, path: letters.jsonl, held_out: 2}}
measure: {samples: 2, max_new_tokens: 2}
stages:
  - name: prefer
    gates: [{task: letters, metric: vowels, at_least: 0.0}]
    method: {name: chi_po, data: {path: pairs.jsonl}}
    budget: {steps: 2}
    groups_per_step: 2
  - name: practise
    method:
      name: compose
      source: {type: rollouts, tasks: [letters], group_size: 3, max_new_tokens: 2}
      signals: [{type: fluency_reward}, {type: median_advantage}]
      terms: [{type: clipped_policy_gradient}]
    budget: {steps: 2}
    groups_per_step: 2
"""


def test_a_recipe_trains_with_them(copy, tmp_path):
    tiny_model(tmp_path / "model")
    tasks = [{"prompt": f"say {c}", "answer": c} for c in "abcdef"]
    pairs = [{"prompt": f"say {c}", "chosen": c, "rejected": "z"} for c in "abcdef"]
    for name, rows in (("letters", tasks), ("pairs", pairs)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    planned = python(copy, "-m", "posttrain", "plan", "recipe.yaml", cwd=tmp_path)
    assert "fluency_reward → median_advantage" in planned.stdout, planned.stderr
    done = python(copy, "-m", "posttrain", "run", "recipe.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(
        line for line in done.stderr.splitlines() + done.stdout.splitlines() if "vowels" in line
    )
    assert "passed" in row or "at least 0" in row, row
    raw = json.loads((tmp_path / "out/measurements/prefer.json").read_text(encoding="utf-8"))
    assert "vowels" in json.dumps(raw)
    explained = python(copy, "-m", "posttrain", "methods", "chi_po")
    assert "2407.13399" in explained.stdout
