"""Extensions: a real package beside posttrain, proved, planned and run; and broken packages."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import EntryPoints, distributions
from pathlib import Path
from typing import get_args

import pytest

from posttrain.core.errors import ConfigError
from posttrain.parts import composition, registry, unions
from posttrain.tasks import base as tasks

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests/fixtures/plugin_pkg"
PAGE = ROOT / "docs/extending.md"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PARTS = ("terms", "signals", "methods")
MAX_LINES = 20
GROUP = "posttrain.parts"
ROLES = ("term", "signal", "source", "method", "task_set")


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
    text = PAGE.read_text("utf-8").replace("\\", "")
    for file in (*sources, PACKAGE / "posttrain_focal/__init__.py", PACKAGE / "pyproject.toml"):
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
from posttrain_focal.signals import MedianAdvantage
from posttrain_focal.terms import FocalLoss
from posttrain.testing import as_group, example_trajectory, fake_tools
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group

logprob = torch.tensor([math.log(0.9), math.log(0.2)], requires_grad=True)
loss = FocalLoss(gamma=2.0).values({Stat.LOGPROB: logprob}, None).loss
expected = [-(0.1**2) * math.log(0.9), -(0.8**2) * math.log(0.2)]
np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)
loss.sum().backward()
slope = [-((1 - p) ** 2) + 2 * (1 - p) * p * math.log(p) for p in (0.9, 0.2)]
np.testing.assert_allclose(logprob.grad, slope, rtol=1e-5)

members = as_group(*[example_trajectory(answer=(4, i)) for i in (5, 6, 7)]).members
rewarded = [m.with_columns({Column.REWARD: np.array(r)}) for m, r in zip(members, (9.0, 1.0, 0.0))]
groups = [Group(task="example/0", members=tuple(rewarded))]
(group,) = MedianAdvantage().score(groups, fake_tools())
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
ledger = Path("out/ledger.jsonl").read_text()
for about in map(json.loads, (p.read_text() for p in Path("out/stages").glob("*/stage.json"))):
    assert "posttrain-focal 0.1.0" in about["inputs"]["extensions"].values(), about
    assert about["identity"] in ledger
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


IMPORTS = {
    "nothing": "",
    "the package": "import posttrain_focal.methods",
    "ours, all of it": "from posttrain.parts.registry import known; known('term')",
    "some of ours": "import posttrain.parts.offline.presets, posttrain_focal.signals",
}


def test_the_order_of_imports_does_not_matter(tmp_path):
    install(tmp_path / "site")
    recipe_folder(tmp_path)
    listed = "from posttrain.parts.registry import known\n" + "".join(
        f"print(list(known({role!r})))\n" for role in ROLES
    )
    printed = {
        name: python(f"{first}\n{PLAN}\n{listed}", tmp_path / "site", cwd=tmp_path)
        for name, first in IMPORTS.items()
    }
    assert len(set(printed.values())) == 1
    terms = printed["nothing"].splitlines()[2]
    assert terms.endswith("'focal_loss']"), "ours come first"


def test_the_version_of_a_package_counts_in_the_identity(tmp_path):
    recipe_folder(tmp_path)
    identities = {}
    for version in ("0.1.0", "0.2.0"):
        install(tmp_path / version, version=version)
        extensions, identities[version] = python(
            PLAN, tmp_path / version, cwd=tmp_path
        ).splitlines()
        focal, median = (
            f"'{n}': 'posttrain-focal {version}'" for n in ("focal_loss", "median_advantage")
        )
        assert extensions == f"{{{focal}}} {{{median}, {focal}}}"
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


ASKING = '''
from posttrain.parts.base import Signal
from posttrain.parts.registry import part
from posttrain_focal.signals import MedianAdvantage

@part
class AskingMedian(Signal):
    """The median advantage, and a policy that is asked."""

    judge: str = "show"
    needs = MedianAdvantage.needs
    provides = MedianAdvantage.provides

    def references(self):
        return (self.judge,)

    def score(self, groups, tools):
        tools.policy(self.judge)
        return MedianAdvantage().score(groups, tools)
'''


def test_a_signal_gets_the_policies_that_it_names(tmp_path):
    """`references` are planned, so a policy that does not exist is refused."""
    install(tmp_path / "site")
    points = {GROUP: {"asking": "posttrain_asking"}}
    dist_info(tmp_path / "site", name="posttrain-asking", version="1", points=points)
    (tmp_path / "site/posttrain_asking.py").write_text(ASKING)
    path = recipe_folder(tmp_path)
    path.write_text(path.read_text().replace("type: median_advantage", "type: asking_median"))
    code = """
from pathlib import Path
from posttrain.core.errors import ConfigError
from posttrain.run.plan import make_plan
from posttrain.recipe import load_recipe

plan = make_plan(load_recipe(Path("recipe.yaml")), root=Path(), base="b")
assert plan.stages[1].inputs["references"]["show"] == plan.stages[0].identity
print(plan.stages[1].inputs["extensions"]["asking_median"])
text = Path("recipe.yaml").read_text()
Path("recipe.yaml").write_text(text.replace("asking_median", "asking_median, judge: shwo"))
try:
    make_plan(load_recipe(Path("recipe.yaml")), root=Path(), base="b")
except ConfigError as error:
    print(error.fix)
"""
    printed = python(code, tmp_path / "site", cwd=tmp_path)
    assert printed == "posttrain-asking 1\ndid you mean 'show'?\n"


TASKS = '''
from posttrain.parts.registry import part
from posttrain.tasks.base import TaskSetSpec
from posttrain.testing import FakeTaskSet

@part
class Letters(TaskSetSpec):
    """Some letters."""

    size: int = 4

    def identity(self, root):
        return {"size": self.size}

    def build(self, name, *, root, chat):
        return FakeTaskSet(name=name, size=self.size)
'''


def test_a_task_set_of_a_package(tmp_path):
    """A recipe can name it, and the version of its package counts where it is drawn from."""
    (tmp_path / "posttrain_letters.py").write_text(TASKS)
    identities = []
    for version in ("1", "2"):
        points = {GROUP: {"letters": "posttrain_letters"}}
        dist_info(tmp_path / version, name="letters", version=version, points=points)
        code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from posttrain import Budget, Grpo, Recipe, Stage
from posttrain.core.config import convert
from posttrain.run.plan import make_plan
stage = {{"name": "s", "method": {{"name": "grpo", "tasks": ["l"]}}, "budget": {{"steps": 1}}}}
row = {{"name": "r", "model": "m", "tasks": {{"l": {{"type": "letters", "size": 3}}}}}}
recipe = convert({{**row, "stages": [stage]}}, Recipe, origin="test")
assert len(recipe.tasks["l"].build("l", root=Path(), chat=False).train) == 3
(planned,) = make_plan(recipe, root=Path(), base="b").stages
assert planned.inputs["extensions"] == {{"letters": "letters {version}"}}
print(planned.identity)
"""
        identities.append(python(code, tmp_path / version, cwd=tmp_path))
    assert len(set(identities)) == 2


def test_the_methods_of_a_package_are_listed(tmp_path):
    install(tmp_path / "site")
    arguments = [sys.executable, "-m", "posttrain", "methods"]
    ran = subprocess.run(
        arguments, env=with_path(tmp_path / "site", PACKAGE), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    _, _, theirs = ran.stdout.partition("From posttrain-focal 0.1.0\n")
    assert "focal_sft" in theirs
    assert "-(1 - p)^gamma log p" in theirs
    page = subprocess.run(
        [*arguments, "focal_loss"],
        env=with_path(tmp_path / "site", PACKAGE),
        capture_output=True,
        text=True,
    )
    assert page.stdout.startswith("focal_loss: "), page.stderr


# --- laziness, and broken packages -----------------------------------------------------------


def test_importing_posttrain_looks_for_no_package(tmp_path):
    install(tmp_path / "site")
    code = """
import sys
import posttrain, posttrain.recipe, posttrain.parts.legality, posttrain.run.plan
from posttrain.parts import registry
assert registry.load.cache_info().misses == 0
assert "posttrain_focal" not in sys.modules
posttrain.recipe.convert({"name": "x", "model": "y"}, posttrain.Recipe, origin="test")
assert registry.load.cache_info().misses == 1
assert "posttrain_focal" in sys.modules
"""
    python(code, tmp_path / "site", cwd=tmp_path)


@pytest.fixture
def packages(monkeypatch):
    """Lets these entry points be all that is installed, and our parts all that is registered."""
    ours = {role: dict(registry.known(role)) for role in ROLES}

    def install(points: EntryPoints) -> None:
        registered = {role: dict(found) for role, found in ours.items()}
        monkeypatch.setattr(registry, "_parts", registered)
        monkeypatch.setattr(registry, "_loaded", [])
        monkeypatch.setattr(registry, "load", cache(registry.load.__wrapped__))
        monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))

    return install


def test_without_packages_the_unions_are_ours(packages):
    packages(EntryPoints())
    for role, union in (
        ("term", unions.AnyTerm),
        ("signal", unions.AnySignal),
        ("source", unions.AnySource),
        ("method", composition.AnyMethod),
        ("task_set", tasks.AnyTaskSet),
    ):
        known = registry.known(role).values()
        assert set(get_args(union)) == set(known)
        assert all(kind.__module__.startswith("posttrain.") for kind in known)


GOOD = '''
from typing import ClassVar
from posttrain.core.config import Config
from posttrain.parts.base import Signal, Term
from posttrain.parts.composition import Method
from posttrain.parts.registry import part

@part
class Mine(Term):
    """Something."""

    def values(self, stats, batch):
        return None
'''
BARE = GOOD.partition("@part\n")[0]


def signal(body: str, bases: str = "Signal") -> str:
    return f'{BARE}@part\nclass Mine({bases}):\n    """Something."""\n{body}'


BROKEN = {
    "no module": (None, "", "No module named"),
    "no such name": (GOOD, ":TERMS", "AttributeError"),
    "raises on import": ("1 / 0", "", "ZeroDivisionError"),
    "syntax": ("def", "", "SyntaxError"),
    "nothing": ("TERM = 3", "", "registers no part"),
    "a class that is not registered": (GOOD.replace("@part\n", ""), "", "registers no part"),
    "no tag": (GOOD.replace("(Term)", "(Term, tag=3)"), "", "has tag 3 under 'type'"),
    "other tag field": (
        GOOD.replace("(Term)", '(Term, tag_field="name")'),
        "",
        "has tag 'mine' under 'name'",
    ),
    "no values": (GOOD.replace("def values", "def value"), "", "lacks values"),
    "no score": (signal("    provides: ClassVar = frozenset()"), "", "lacks score"),
    "no compose": (
        signal("", "Method"),
        "",
        "lacks provenance, interface, tendency, form",
    ),
    "no docstring": (GOOD.replace('    """Something."""\n', ""), "", "no docstring"),
    "unknown options": (
        GOOD.replace("(Term)", "(Term, forbid_unknown_fields=False)"),
        "",
        "allows unknown options",
    ),
    "not frozen": (GOOD.replace("(Term)", "(Term, frozen=False)"), "", "frozen"),
    "an unknown unit": (
        GOOD.replace("    def", '    unit: ClassVar = "toekn"\n\n    def'),
        "",
        "unit has 'toekn'",
    ),
    "an unknown statistic": (
        GOOD.replace("    def", '    reads: ClassVar = frozenset({"lgprob"})\n\n    def'),
        "",
        "reads has 'lgprob'",
    ),
    "an unknown column": (
        GOOD.replace("    def", '    needs: ClassVar = {"rewrd"}\n\n    def'),
        "",
        "needs has 'rewrd'",
    ),
    "a text for columns": (
        GOOD.replace("    def", '    needs: ClassVar = "reward"\n\n    def'),
        "",
        "needs is the text 'reward'",
    ),
    "a type that does not exist": (
        GOOD.replace("    def", '    gamma: "Flot" = 1.0\n\n    def'),
        "",
        "NameError: name 'Flot' is not defined",
    ),
    "a method without a formula": (
        GOOD.replace("@part\n", "@part(method=OnPairs)\n").replace(
            "from posttrain.parts.registry",
            "from posttrain.parts.preference.shapes import OnPairs\nfrom posttrain.parts.registry",
        ),
        "",
        "Mine cannot be a method by itself",
    ),
    "no role": (GOOD.replace("(Term)", "(Config)"), "", "Mine has no role"),
    "our name": (GOOD.replace("Mine", "CrossEntropy"), "", "takes a name that posttrain.parts"),
}


def points_in(*sites: Path) -> EntryPoints:
    return EntryPoints(
        p for site in sites for d in distributions(path=[str(site)]) for p in d.entry_points
    )


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_named(case, tmp_path, monkeypatch, packages):
    code, attribute, words = BROKEN[case]
    module = f"broken_{re.sub(r'[^a-z]', '_', case)}"
    if code is not None:
        (tmp_path / f"{module}.py").write_text(code)
    points = {GROUP: {"mine": f"{module}{attribute}"}}
    dist_info(tmp_path, name="their-package", version="3.1", points=points)
    monkeypatch.syspath_prepend(tmp_path)
    packages(points_in(tmp_path))
    for _ in range(2):  # a second attempt is no way around it
        with pytest.raises(ConfigError, match=r"package their-package 3\.1: entry point") as caught:
            registry.known("term")
        assert words in caught.value.found
        assert caught.value.expected
        assert caught.value.fix == "mend the package, or uninstall it"


def test_a_broken_script_is_named(tmp_path):
    """Nobody's package is at fault, and the class and its file are still named."""
    broken = GOOD.replace("    def", '    gamma: "Flot" = 1.0\n\n    def')
    script = tmp_path / "script.py"
    script.write_text(f"{broken}\nfrom posttrain.parts.registry import known\nknown('term')\n")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ConfigError: the options of Mine in __main__: NameError: name 'Flot'" in ran.stderr


def test_two_packages_with_one_name(tmp_path, monkeypatch, packages):
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("first", "second"):
        (tmp_path / f"{package}_pkg.py").write_text(GOOD)
        entry = {GROUP: {"mine": f"{package}_pkg"}}
        dist_info(tmp_path / package, name=package, version="1", points=entry)
    packages(points_in(tmp_path / "first"))
    assert registry.find("term", "mine").__module__ == "first_pkg"
    assert registry.package_of(registry.find("term", "mine")) == "first 1"
    for name in ("first_pkg", "second_pkg"):
        sys.modules.pop(name, None)
    packages(points_in(tmp_path / "first", tmp_path / "second"))
    with pytest.raises(ConfigError, match=r"second 1: .* takes a name that first_pkg has"):
        registry.known("term")


def test_a_part_that_comes_after_the_first_recipe_is_refused(tmp_path):
    code = GOOD.replace("Mine", "Late").partition("@part")
    late = f"""{code[0]}
from posttrain.parts.registry import known
known("term")
@part{code[2]}"""
    ran = subprocess.run(
        [sys.executable, "-c", late], env=with_path(), capture_output=True, text=True, cwd=tmp_path
    )
    assert "term late of __main__ is registered after the first recipe was read" in ran.stderr


def test_a_script_that_takes_our_name_is_blamed_for_it(tmp_path):
    """It may have registered before ours was looked for."""
    code = GOOD.replace("Mine", "CrossEntropy") + "\nfrom posttrain import Sft\n"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=with_path(), capture_output=True, text=True, cwd=tmp_path
    )
    assert "term cross_entropy of __main__ takes a name that posttrain.parts" in ran.stderr


def test_a_broken_package_stops_a_recipe_with_its_name(tmp_path):
    points = {GROUP: {"mine": "nowhere"}}
    dist_info(tmp_path / "site", name="their-package", version="3.1", points=points)
    (tmp_path / "recipe.yaml").write_text("{name: x, model: y}")
    ran = subprocess.run(
        [sys.executable, "-m", "posttrain", "plan", "recipe.yaml"],
        env=with_path(tmp_path / "site"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("ConfigError: package their-package 3.1: entry point mine")
    assert "Traceback" not in ran.stderr
