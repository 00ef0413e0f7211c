"""A reward file with the modules beside it: what runs is what is known, no more and no less."""

from __future__ import annotations

import hashlib
import sys

import pytest

from posttrain.core.errors import TaskError
from posttrain.tasks.rewards import find_reward

CALL = "def f(prompts, completions, **columns):\n    return [{} for c in completions]\n"


@pytest.fixture
def folder(tmp_path):
    files = {
        "helper.py": "import other\ndef grade(x):\n    return other.FACTOR * len(x)\n",
        "other.py": "FACTOR = 2\n",
        "unused.py": "raise RuntimeError\n",
        "pkg/__init__.py": "from . import a\n",
        "pkg/a.py": "from .deep.b import VALUE\n",
        "pkg/deep/__init__.py": "",
        "pkg/deep/b.py": "VALUE = 5\n",
        "bare/m.py": "ONE = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def reward(folder, body):
    (folder / "rw.py").write_text(body)
    return find_reward("rw.py:f", folder, seconds=5.0)


def scores(made):
    return made.score(["p"] * 2, ["ab", "c"], {})


@pytest.mark.parametrize(
    ("body", "expected", "files"),
    [
        (CALL.format("1"), [1, 1], {"rw.py"}),
        ("from helper import grade\n" + CALL.format("grade(c)"), [4, 2], {"helper.py", "other.py"}),
        ("from helper import *\n" + CALL.format("grade(c)"), [4, 2], {"helper.py", "other.py"}),
        (
            CALL.format("__import__('math').pi > 3").replace("return", "import helper; return"),
            [1, 1],
            {"helper.py", "other.py"},
        ),
        (
            "import pkg.deep.b as b\n" + CALL.format("b.VALUE"),
            [5, 5],
            {"pkg/__init__.py", "pkg/a.py", "pkg/deep/__init__.py", "pkg/deep/b.py"},
        ),
        ("from bare.m import ONE\n" + CALL.format("ONE"), [1, 1], {"bare/m.py"}),
        (
            "from multiprocessing.pool import Pool\nfrom helper import grade\n"
            "def f(prompts, completions, **columns):\n"
            "    with Pool(1) as pool: return pool.map(grade, completions)\n",
            [4, 2],
            {"helper.py", "other.py"},
        ),
    ],
)
def test_modules_beside_the_file_are_imported_and_known(folder, body, expected, files):
    before = set(sys.modules)
    made = reward(folder, body)
    known = {path.relative_to(folder).as_posix() for path in made.files}
    assert known == files | {"rw.py"}
    assert not set(sys.modules) & {"helper", "other", "pkg", "bare"}
    assert scores(made) == expected
    assert scores(made) == expected
    left = {m.partition(".")[0] for m in set(sys.modules) - before}
    assert not left & {"helper", "other", "pkg", "bare", "rw"}
    assert not list(folder.rglob("__pycache__"))


def test_the_identity_is_the_content_of_all_files_that_take_part(folder):
    body = "from helper import grade\n" + CALL.format("grade(c)")
    first = reward(folder, body).identity
    assert reward(folder, body).identity == first
    (folder / "unused.py").write_text("x = 1\n")
    assert reward(folder, body).identity == first
    (folder / "other.py").write_text("FACTOR = 3\n")
    second = reward(folder, body).identity
    assert second != first
    (folder / "helper.py").rename(folder / "helper2.py")
    assert reward(folder, body.replace("helper", "helper2")).identity not in (first, second)


def test_a_file_alone_has_the_digest_of_its_bytes(folder):
    body = "import numpy as np\n" + CALL.format("1")
    made = reward(folder, body)
    assert made.identity == f"{hashlib.sha256(body.encode()).hexdigest()}:f"


def test_two_folders_may_have_modules_of_one_name(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "helper.py").write_text("def grade(x):\n    return 100\n")
    body = "from helper import grade\n" + CALL.format("grade(c)")
    one, two = reward(folder, body), reward(other, body)
    assert [scores(one), scores(two), scores(one)] == [[4, 2], [100, 100], [4, 2]]


def test_a_module_of_this_process_is_not_taken_for_theirs(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "helper", "ours")
    assert scores(reward(folder, "import helper\n" + CALL.format("helper.grade(c)"))) == [4, 2]
    assert sys.modules["helper"] == "ours"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import importlib\nm = importlib.import_module('unused')\n", "no import statement says"),
        ("import sys\nsys.path.insert(0, '{elsewhere}')\nimport faraway\n", "changed sys.path"),
        ("import nosuch\n", r"raised ModuleNotFoundError.*rw\.py:1"),
        ("import unused\n", r"raised RuntimeError, at .*unused\.py:1"),
        ("import bad\n", r"bad\.py:2 is not Python: SyntaxError"),
        ("import null\n", r"null\.py is not Python"),
        ("def g(:\n", r"rw\.py:1 is not Python"),
        ("(" * 5000 + "\n", "is not Python"),
        ("import sys\nsys.exit(0)\n", "tried to end the process with exit code 0"),
        ("import os\nos._exit(0)\n", "tried to end the process with exit code 0"),
    ],
)
def test_code_that_cannot_be_loaded_or_known_is_refused(folder, tmp_path_factory, body, says):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "faraway.py").write_text("x = 1\n")
    (folder / "bad.py").write_text("x = 1\ndef g(:\n")
    (folder / "null.py").write_bytes(b"x = 1\0")
    with pytest.raises(TaskError, match=says):
        scores(reward(folder, body.replace("{elsewhere}", str(elsewhere)) + CALL.format("1")))
    assert str(elsewhere) not in sys.path


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("async " + CALL.format("1"), "f is async"),
        ("def f(prompts, completions, **c):\n    yield 1\n", "f is a generator"),
        ("def g(): ...\n", "no function 'f'"),
        ("f2 = 1\n", "did you mean 'f2'"),
    ],
)
def test_what_can_be_seen_is_refused_before_anything_runs(folder, body, says):
    with pytest.raises(TaskError, match=says):
        reward(folder, "raise RuntimeError\n" + body)


@pytest.mark.parametrize(
    "body",
    [
        "f = lambda prompts, completions, **c: [1.0] * len(completions)\n",
        "if True:\n    " + CALL.format("1").replace("\n    ", "\n        "),
        "try:\n    from helper import absent as f\nexcept ImportError:\n    from functools import "
        "partial as f\n    f = lambda prompts, completions, **c: [1.0] * len(completions)\n",
        "globals()['f'] = lambda prompts, completions, **c: [1.0] * len(completions)\n",
        "exec('f = lambda prompts, completions, **c: [1.0] * len(completions)')\n",
        "class f:\n    def __new__(cls, prompts, completions, **c):\n        return [1, 1]\n",
    ],
)
def test_a_function_may_be_made_in_any_way(folder, body):
    assert scores(reward(folder, body)) == [1.0, 1.0]
