"""Extensions: a real package beside posttrain, proved, planned and run; and broken packages."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoints, distributions
from pathlib import Path
from typing import get_args

import pytest

from posttrain import extensions
from posttrain.core.errors import ConfigError
from posttrain.parts.base import Signal, Term
from posttrain.parts.composition import Method

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests/fixtures/plugin_pkg"
PAGE = ROOT / "docs/extending.md"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PARTS = ("terms", "signals", "methods")
MAX_LINES = 20
UNCACHED = extensions.installed.__wrapped__


def dist_info(site: Path, *, name: str, version: str, points: dict[str, dict[str, str]]) -> None:
    """What pip leaves of an installed package: its metadata and its entry points."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, members in points.items():
        lines += [f"[{group}]", *(f"{k} = {v}" for k, v in members.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install(site: Path, *, version: str | None = None) -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    dist_info(
        site,
        name=project["name"],
        version=version or project["version"],
        points=project["entry-points"],
    )


def with_path(*folders: Path) -> dict[str, str]:
    """An environment in which Python finds these folders before anything else."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def python(code: str, site: Path, *, cwd: Path) -> str:
    """Run code in a process that has the package on its path."""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=with_path(site, PACKAGE),
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def blocks(info: str) -> list[str]:
    return [body for kind, body in FENCE.findall(PAGE.read_text("utf-8")) if kind == info]


# --- the package -----------------------------------------------------------------------------


def test_the_page_shows_the_very_code_that_is_tested():
    sources = [PACKAGE / f"posttrain_focal/{part}.py" for part in PARTS]
    shown = [f.read_text("utf-8") for f in (*sources, PACKAGE / "prove.py")]
    assert blocks("python") == shown
    assert blocks("toml") == [(PACKAGE / "pyproject.toml").read_text("utf-8")]
    text = PAGE.read_text("utf-8")
    for file in (*sources, PACKAGE / "pyproject.toml"):
        assert f"[{file.relative_to(PACKAGE)}](" in text


@pytest.mark.parametrize("part", PARTS)
def test_a_part_takes_at_most_twenty_lines(part):
    text = (PACKAGE / f"posttrain_focal/{part}.py").read_text("utf-8")
    body = [n for n in ast.parse(text).body[1:] if not isinstance(n, ast.Import | ast.ImportFrom)]
    lines = text.splitlines()
    written = [line for n in body for line in lines[n.lineno - 1 : n.end_lineno] if line.strip()]
    assert 0 < len(written) <= MAX_LINES


def test_the_package_keeps_the_contracts(tmp_path):
    install(tmp_path / "site")
    code = (PACKAGE / "prove.py").read_text("utf-8")
    python(code, tmp_path / "site", cwd=tmp_path)


VALUES = """
import math, numpy as np, torch
from posttrain_focal.signals import MedianSignal
from posttrain_focal.terms import FocalLoss, focal_loss
from posttrain.testing import as_group, example_trajectory
from posttrain.core.trajectory import Column, Group

logprob = torch.tensor([math.log(0.9), math.log(0.2)], requires_grad=True)
loss = focal_loss(FocalLoss(gamma=2.0), {"logprob": logprob}, None)
expected = [-(0.1**2) * math.log(0.9), -(0.8**2) * math.log(0.2)]
np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)
loss.sum().backward()
slope = [-((1 - p) ** 2) + 2 * (1 - p) * p * math.log(p) for p in (0.9, 0.2)]
np.testing.assert_allclose(logprob.grad, slope, rtol=1e-5)

members = as_group(*[example_trajectory(answer=(4, i)) for i in (5, 6, 7)]).members
rewarded = [m.with_columns({Column.REWARD: np.array(r)}) for m, r in zip(members, (9.0, 1.0, 0.0))]
(group,) = MedianSignal().score([Group(task="example/0", members=tuple(rewarded))])
assert [m.columns[Column.ADVANTAGE].tolist() for m in group.members] == [[8.0]*5, [0.0]*5, [-1.0]*5]
"""


def test_the_values_of_the_package_by_hand(tmp_path):
    install(tmp_path / "site")
    python(VALUES, tmp_path / "site", cwd=tmp_path)


def recipe_folder(folder: Path) -> Path:
    """The page's recipe with the data that it names; the model is added by who needs one."""
    (recipe,) = blocks("yaml")
    (folder / "recipe.yaml").write_text(recipe)
    rows = [f'{{"prompt": "say {c}", "answer": "{c}", "completion": "{c}"}}' for c in "abcdef"]
    (folder / "letters.jsonl").write_text("\n".join(rows) + "\n")
    rows = [f'{{"prompt": "say {c}", "completion": "{c}"}}' for c in "abcdef"]
    (folder / "demonstrations.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "recipe.yaml"


RUN = """
import dataclasses, json
from pathlib import Path
from posttrain.api import run
from posttrain.core.events import StepDone
from posttrain.run.preview import preview
from posttrain.recipe import load_recipe
from posttrain.testing import tiny_model

tiny_model(Path("model"))
recipe = load_recipe(Path("recipe.yaml"))
page = preview(recipe, root=Path())
assert page.count("legality    ok") == 2, page
assert "focal_loss" in page
seen = []
outcome = run(recipe, out=Path("out"), observe=lambda e: seen.append(e))
assert outcome.finished == ("show", "practise")
steps = [e for e in seen if isinstance(e, StepDone)]
print(json.dumps([[e.stage, dict(e.metrics)] for e in steps]))
"""


def test_a_recipe_with_all_three_runs(tmp_path):
    import json

    install(tmp_path / "site")
    recipe_folder(tmp_path)
    steps = json.loads(python(RUN, tmp_path / "site", cwd=tmp_path).splitlines()[-1])
    assert [name for name, _ in steps] == ["show", "show", "practise", "practise"]
    for name, metrics in steps:
        assert metrics["grad_norm"] > 0 or name == "practise"
        assert metrics["focal_loss"] > 0
    practised = steps[-1][1]
    # One update per draw is on-policy: the ratio is 1, so the part is minus the mean advantage.
    assert practised["clipped_policy_gradient/ratio"] == pytest.approx(1, abs=1e-4)
    parts = practised["clipped_policy_gradient"] + 0.1 * practised["focal_loss"]
    assert practised["loss"] == pytest.approx(parts, rel=1e-5)


PLAN = """
import posttrain_focal.methods  # the package first: nobody may depend on the order
from pathlib import Path
from posttrain.run.plan import make_plan
from posttrain.recipe import load_recipe
import sys

plan = make_plan(load_recipe(Path("recipe.yaml")), root=Path(), base="b")
assert "torch" not in sys.modules
show, practise = plan.stages
print(show.inputs["extensions"], practise.inputs["extensions"])
print(show.identity)
"""


def test_the_version_of_a_package_counts_in_the_identity(tmp_path):
    recipe_folder(tmp_path)
    identities = {}
    for version in ("0.1.0", "0.2.0"):
        install(tmp_path / version, version=version)
        told, identities[version] = python(PLAN, tmp_path / version, cwd=tmp_path).splitlines()
        focal, median = (
            f"'{n}': 'posttrain-focal {version}'" for n in ("focal_loss", "median_advantage")
        )
        assert told == f"{{{focal}}} {{{median}, {focal}}}"
    assert len(set(identities.values())) == 2


def test_a_misspelt_name_of_a_package_is_hinted_at(tmp_path):
    install(tmp_path / "site")
    path = recipe_folder(tmp_path)
    path.write_text(path.read_text().replace("name: focal_sft", "name: focal_stf"))
    code = """
from pathlib import Path
from posttrain.core.errors import ConfigError
from posttrain.recipe import load_recipe
try:
    load_recipe(Path("recipe.yaml"))
except ConfigError as error:
    print(error.fix)
"""
    assert python(code, tmp_path / "site", cwd=tmp_path) == "did you mean 'focal_sft'?\n"


def test_a_signal_gets_the_policies_that_it_names(tmp_path):
    """`references` are planned, so a policy that does not exist is refused."""
    install(tmp_path / "site")
    recipe_folder(tmp_path)
    code = """
from dataclasses import replace
from pathlib import Path
from posttrain import extensions
from posttrain.core.errors import ConfigError
from posttrain.run.plan import make_plan
from posttrain.recipe import load_recipe
import posttrain_focal.signals as theirs

recipe = load_recipe(Path("recipe.yaml"))
asking = replace(theirs.SIGNAL, references=lambda spec: ["show"])
have = extensions.installed()
found = replace(have, signals={"median_advantage": asking})
extensions.installed = lambda: found
plan = make_plan(recipe, root=Path(), base="b")
assert plan.stages[1].inputs["references"]["show"] == plan.stages[0].identity
asking = replace(theirs.SIGNAL, references=lambda spec: ["shwo"])
found = replace(have, signals={"median_advantage": asking})
try:
    make_plan(recipe, root=Path(), base="b")
except ConfigError as error:
    print(error.fix)
"""
    assert python(code, tmp_path / "site", cwd=tmp_path) == "did you mean 'show'?\n"


# --- laziness, and broken packages -----------------------------------------------------------


def test_importing_posttrain_looks_for_no_package():
    code = """
import posttrain, posttrain.recipe, posttrain.legality, posttrain.run.plan
from posttrain import extensions
assert extensions.installed.cache_info().misses == 0
posttrain.recipe.convert({"name": "x", "model": "y"}, posttrain.Recipe, origin="test")
assert extensions.installed.cache_info().misses == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_packages_the_unions_are_ours(monkeypatch):
    packages(monkeypatch, EntryPoints())
    assert set(get_args(extensions.AnyTerm)) == set(get_args(Term))
    assert set(get_args(extensions.AnySignal)) == set(get_args(Signal))
    assert set(get_args(extensions.AnyMethod)) == set(get_args(Method))


def packages(monkeypatch, points: EntryPoints) -> None:
    """Let these entry points be all that is installed, for one test."""
    monkeypatch.setattr(extensions, "entry_points", lambda: points)
    monkeypatch.setattr(extensions, "installed", UNCACHED)


GOOD = '''
from typing import ClassVar
from posttrain.core.config import Config

class Mine(Term, tag="mine", tag_field="type"):
    """Something."""
    weight: float = 1.0
    where: tuple[str, ...] = ()
    aggregate: ClassVar[str] = "token_mean"
    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()
    accepts: ClassVar[frozenset[str]] = ANYONE

TERM = TermExtension(Mine, reads=frozenset(), values=lambda *_: None)
'''

BROKEN = {
    "no module": (None, "mine", "No module named"),
    "no such name": ("TERMS = 1", "mine", "AttributeError"),
    "raises on import": ("1 / 0", "mine", "ZeroDivisionError"),
    "syntax": ("def", "mine", "SyntaxError"),
    "wrong object": ("TERM = 3", "mine", "is a int"),
    "a class instead of the bundle": (GOOD + "TERM = Mine", "mine", "is a StructMeta"),
    "other tag": (GOOD, "yours", "has tag 'mine' under 'type'"),
    "other tag field": (GOOD.replace('"type"', '"name"'), "mine", "under 'name'"),
    "no unit": (GOOD.replace('    unit: ClassVar[str] = "token"\n', ""), "mine", "lacks unit"),
    "no docstring": (GOOD.replace('    """Something."""\n', ""), "mine", "no docstring"),
    "not a Term": (GOOD.replace("Mine(Term,", "Mine(Config,"), "mine", "lacks limit"),
    "our name": (GOOD.replace('"mine"', '"cross_entropy"'), "cross_entropy", "that posttrain has"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_named(case, tmp_path, monkeypatch):
    code, name, words = BROKEN[case]
    module = f"broken_{re.sub(r'[^a-z]', '_', case)}"
    if code is not None:
        (tmp_path / f"{module}.py").write_text(code)
    points = {"posttrain.terms": {name: f"{module}:TERM"}}
    dist_info(tmp_path, name="their-package", version="3.1", points=points)
    monkeypatch.syspath_prepend(tmp_path)
    found = [p for d in distributions(path=[str(tmp_path)]) for p in d.entry_points]
    packages(monkeypatch, EntryPoints(found))
    with pytest.raises(ConfigError, match=r"package their-package 3\.1: entry point") as caught:
        extensions.installed()
    assert words in caught.value.found
    assert caught.value.fix == "mend the package, or uninstall it"


def test_two_packages_with_one_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    points = []
    for package in ("first", "second"):
        (tmp_path / f"{package}_pkg.py").write_text(GOOD)
        site = tmp_path / package
        entry = {"posttrain.terms": {"mine": f"{package}_pkg:TERM"}}
        dist_info(site, name=package, version="1", points=entry)
        points += [p for d in distributions(path=[str(site)]) for p in d.entry_points]
    packages(monkeypatch, EntryPoints(points[:1]))
    assert list(extensions.installed().terms) == ["mine"]
    packages(monkeypatch, EntryPoints(points))
    with pytest.raises(ConfigError, match=r"second 1: .* takes a name that first 1 has"):
        extensions.installed()


def test_a_broken_package_stops_a_recipe_with_its_name(tmp_path):
    points = {"posttrain.methods": {"mine": "nowhere:Mine"}}
    dist_info(tmp_path / "site", name="their-package", version="3.1", points=points)
    (tmp_path / "recipe.yaml").write_text("{name: x, model: y}")
    code = "from posttrain.cli.main import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "plan", "recipe.yaml"],
        env=with_path(tmp_path / "site"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("ConfigError: package their-package 3.1: entry point mine")
    assert "Traceback" not in ran.stderr
