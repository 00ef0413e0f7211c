"""Documents cannot drift: links, commands, named tests, recipes and examples are checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_house_rules import LAYERS

from posttrain.cli.main import cli
from posttrain.core.config import convert
from posttrain.parts.legality import check_composition
from posttrain.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DECISIONS = sorted(ROOT.glob("docs/decisions/*.md"))
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TO_WRITE = re.compile(r"^`[\w/.-]+\.py`:\n+(?=```python\n)", re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
MAX_DECISION_LINES, MAX_ENTRY_WORDS = 40, 25


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings make."""
    plain = [re.sub(r"[^\w\- ]", "", h.lower()) for h in HEADING.findall(prose(text))]
    return {h.strip().replace(" ", "-") for h in plain}


def broken_links(page: Path, text: str) -> list[str]:
    out = []
    for link in LINK.findall(prose(text)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = page.parent / path if path else page
        if not target.exists():
            out.append(link)
            continue
        there = target.read_text(encoding="utf-8") if path and anchor else text
        if anchor and anchor not in anchors(there):
            out.append(f"{link}: no such heading")
    return out


def commands(text: str) -> set[tuple[str, str]]:
    """(program, first argument) of every command named in code: ``make X`` and ``posttrain X``."""
    code = "\n".join([*CODE_SPAN.findall(prose(text)), *(b for _, _, b in FENCE.findall(text))])
    return set(re.findall(r"^(?:\.venv/bin/)?(make|posttrain) +(\w+)", code, re.MULTILINE))


def unknown_commands(text: str) -> set[tuple[str, str]]:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    known = {("make", t) for t in targets} | {("posttrain", c) for c in cli.commands}
    return commands(text) - known


def missing_files(text: str) -> list[str]:
    """Python files and tests named in code spans that are not there.

    A file whose whole code follows is one that the reader writes.
    """
    places = (ROOT, ROOT / "src/posttrain", ROOT / "tests/unit", ROOT / "tests/torch")
    out = []
    for span in CODE_SPAN.findall(prose(TO_WRITE.sub("", text))):
        named = re.fullmatch(r"((?:[\w-]+/)*\w+\.py)(?:::(\w+))?", span)
        if named is None:
            continue
        found = [p / named[1] for p in places if (p / named[1]).is_file()]
        sought = f"def {named[2]}(" if named[2] else ""
        if not found or sought not in found[0].read_text(encoding="utf-8"):
            out.append(span)
    return out


def blocks(kind: str) -> list:
    """Fenced blocks whose info string is ``kind``, as test parameters."""
    return [
        pytest.param(body, id=f"{page.name}-{i}")
        for page in PAGES
        for i, (_, info, body) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
        if info.strip() == kind
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_commands_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert unknown_commands(text) == set()
    assert missing_files(text) == []


def test_the_readme_names_the_two_commands():
    named = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {("make", "tour"), ("make", "test"), ("posttrain", "run")} <= named


@pytest.mark.parametrize("code", blocks("python runnable"))
def test_runnable_example(code, tmp_path):
    watched = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'not a light example'\n"
    ran = subprocess.run(
        [sys.executable, "-c", watched], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("text", blocks("yaml recipe"))
def test_recipe_example_is_valid_and_legal(text):
    recipe = convert(yaml.safe_load(text), Recipe, origin="example")
    assert recipe.stages
    for stage in recipe.stages:
        check_composition(stage.method.compose(), stage=stage.name)


def test_there_are_examples_to_check():
    assert blocks("python runnable")
    assert blocks("yaml recipe")


def test_the_layers_of_the_contributing_page_are_those_that_are_checked():
    rows = re.findall(
        r"^\| (\d+) \| ([`\w, ]+?) \|",
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    shown: dict[int, set[str]] = {}
    for depth, modules in rows:
        shown.setdefault(int(depth), set()).update(modules.replace("`", "").split(", "))
    assert shown == dict(enumerate(LAYERS))


@pytest.mark.parametrize("page", DECISIONS, ids=lambda p: p.stem)
def test_a_decision_has_its_four_parts_and_is_short(page):
    text = page.read_text(encoding="utf-8")
    parts = re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE)
    assert parts == ["Problem", "Choice", "Invariant", "Cost"]
    assert text.count("\n") <= MAX_DECISION_LINES


def test_decisions_are_numbered_without_gaps():
    numbers = [int(p.name[:4]) for p in DECISIONS]
    assert numbers == list(range(1, len(numbers) + 1))
    for number, page in zip(numbers, DECISIONS, strict=True):
        assert page.read_text(encoding="utf-8").startswith(f"# {number}. ")


def test_changelog_entries_are_short():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- (.+)$", text, re.MULTILINE)
    assert entries
    assert [e for e in entries if len(e.split()) > MAX_ENTRY_WORDS] == []


def test_the_checks_catch_what_they_should():
    page = ROOT / "README.md"
    assert broken_links(page, "[a](nowhere.md)") == ["nowhere.md"]
    assert broken_links(page, "# One two\n[a](#one-two) [b](https://x.y)") == []
    assert broken_links(page, "[a](#absent)") == ["#absent: no such heading"]
    assert unknown_commands("`make coffee` and `posttrain tour`") == {("make", "coffee")}
    assert unknown_commands("```sh\nposttrain dance\n```\n") == {("posttrain", "dance")}
    assert missing_files("`new.py`:\n\n```python\nx = 1\n```\n") == []
    assert missing_files("`core/task.py`, `gone.py`, `tests/unit/test_docs.py::test_absent`") == [
        "gone.py",
        "tests/unit/test_docs.py::test_absent",
    ]
