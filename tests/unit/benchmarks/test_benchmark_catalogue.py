"""The table of what every method did: discovery, resuming, intervals, failures and negatives."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import situations
from measurements import measured, policy

from posttrain.core.errors import ConfigError, ModelError
from posttrain.parts.registry import known
from posttrain.run.folder import RunFolder

ROOT = Path(__file__).parents[3]
FAMILY = """
from pathlib import Path
from posttrain import Budget, Dataset, JsonlTasks, Recipe, Sft, Stage

def stage(name, **more):
    method = Sft(data=Dataset(path="d.jsonl"))
    return Stage(name=name, method=method, budget=Budget(steps=1), **more)

def recipe(name, seed, *stages):
    return Recipe(name=name, model="org/model", seed=seed, stages=stages,
                  tasks={"sums": JsonlTasks(path="t.jsonl")})

def single(inputs: Path, seed: int) -> Recipe:
    (inputs / "d.jsonl").write_text("{}")
    return recipe("single", seed, stage("only"))

def chained(inputs: Path, seed: int) -> Recipe:
    return recipe("chained", seed, stage("teacher"), stage("student"))

def sideways(inputs: Path, seed: int) -> Recipe:
    return recipe("sideways", seed, stage("teacher"), stage("student", init="base"))

SITUATIONS = {"single": single, "chained": chained, "sideways": sideways}
"""


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks/catalogue.py")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench", loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def families(tmp_path, monkeypatch):
    """The folder of situations, with one family, which is made up."""
    folder = tmp_path / "situations"
    folder.mkdir()
    (folder / "fake.py").write_text(FAMILY)
    monkeypatch.setattr(situations, "__path__", [str(folder)])
    yield folder
    for name in ("situations.fake", "situations.other"):
        sys.modules.pop(name, None)


class FakeRunner:
    """Writes measurements in which every stage has a pass@1 of our choice."""

    def __init__(self, **rates):
        self.rates, self.calls = rates, []

    def __call__(self, recipe, out, root):
        self.calls.append((recipe.name, recipe.seed))
        with RunFolder(out).lock() as folder:
            for name in ("base", *(s.name for s in recipe.stages)):
                right = np.arange(100) < 100 * self.rates.get(name, lambda seed: 0.1)(recipe.seed)
                found = policy(measured(right.reshape(10, 10)), name=name)
                folder.write_measurement(name, found)


def go(bench, tmp_path, runner, *arguments):
    page = tmp_path / "page.md"
    places = ["--out", str(tmp_path / "out"), "--page", str(page)]
    places += ["--results", str(tmp_path / "results.jsonl")]
    bench.main([*places, *arguments], runner=runner)
    return page.read_text()


def row(text: str, name: str) -> list[str]:
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_before_is_where_the_last_stage_starts(bench, families, tmp_path):
    rates = {"teacher": lambda s: 0.6, "student": lambda s: 0.4}
    text = go(bench, tmp_path, FakeRunner(**rates), "--seeds", "0", "1")
    assert row(text, "chained")[3:5] == ["0.60 (from teacher) → 0.40", "-0.20 [-0.20, -0.20]"]
    assert row(text, "chained")[5] == "down", "what got worse is shown like what got better"
    assert row(text, "sideways")[3:] == ["0.10 → 0.40", "+0.30 [+0.30, +0.30]", "up"]
    assert row(text, "single")[3:] == ["0.10 → 0.10", "+0.00 [+0.00, +0.00]", "undetermined"]


def test_the_interval_is_students_over_seeds(bench):
    values = [0.1, 0.2, 0.4, 0.3]
    mean, low, high = bench.interval(values)
    half = 3.182446 * np.std(values, ddof=1) / 2  # the 97.5 % quantile with 3 degrees
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half), rel=1e-6)
    assert bench.interval([0.3]) is None
    assert bench.reading(None) == "one seed"
    assert bench.reading((0.2, -0.01, 0.41)) == "undetermined"


def test_finished_runs_are_not_run_again(bench, families, tmp_path):
    runner = FakeRunner(only=lambda s: 0.5)
    first = go(bench, tmp_path, runner, "--seeds", "0", "1", "--only", "single")
    assert runner.calls == [("single", 0), ("single", 1)]
    assert go(bench, tmp_path, runner, "--seeds", "0", "1", "--only", "single") == first
    assert len(runner.calls) == 2
    go(bench, tmp_path, runner, "--seeds", "2", "--only", "single")
    assert runner.calls[2:] == [("single", 2)]
    assert row((tmp_path / "page.md").read_text(), "single")[2] == "3"
    # Nothing to run: the page is written from what is there.
    text = go(bench, tmp_path, runner, "--only")
    assert row(text, "single")[2] == "3"
    assert "Not run yet: chained, sideways." in text
    assert len(runner.calls) == 3


def test_changed_data_is_another_run(bench, families, tmp_path):
    runner = FakeRunner()
    go(bench, tmp_path, runner, "--seeds", "0", "--only", "single")
    family = families / "fake.py"
    family.write_text(FAMILY.replace('write_text("{}")', 'write_text("{\\"a\\": 1}")'))
    del sys.modules["situations.fake"]
    importlib.invalidate_caches()
    go(bench, tmp_path, runner, "--seeds", "0", "--only", "single")
    assert len(runner.calls) == 2
    runs = [p for p in (tmp_path / "out/fake/single/0").iterdir() if p.name.startswith("run-")]
    assert len(runs) == 2, "the first run's folder is left alone"


def test_a_failure_is_a_row_and_is_tried_again(bench, families, tmp_path):
    def failing(recipe, out, root):
        if recipe.name == "single":
            raise ModelError("no such model", fix="none")
        FakeRunner()(recipe, out, root)

    text = go(bench, tmp_path, failing, "--seeds", "0")
    assert row(text, "single") == [
        *("single", "–", "seed 0", "–", "–"),
        "failed: no such model",
    ]
    assert row(text, "chained")[5] == "one seed"
    text = go(bench, tmp_path, FakeRunner(only=lambda s: 0.5), "--seeds", "0")
    assert row(text, "single")[3] == "0.10 → 0.50"


def test_unknown_and_doubled_names(bench, families, tmp_path):
    with pytest.raises(ConfigError, match="no situation 'singel'") as caught:
        go(bench, tmp_path, FakeRunner(), "--only", "singel")
    assert caught.value.fix == "did you mean 'single'?"
    (families / "other.py").write_text(FAMILY)
    with pytest.raises(ConfigError, match="single in families fake and other"):
        bench.known_situations()


def test_every_method_has_a_situation(bench):
    """The situations are looked up, and none is run."""
    found = bench.known_situations()
    methods = {name for name, method in known("method").items() if not method.spelt_out}
    assert len(methods) == len(known("method")) - 1
    assert methods <= set(found), "a situation bears its method's name"
