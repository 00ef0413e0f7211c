"""How livable the house is: one number per line, each with its bar.

    python benchmarks/house.py

Files touched by a new part, what a reader of GRPO walks through, circles, part types that generic
code knows by name, private names, size and repetition. The tests hold the same functions against
their bars.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import posttrain

ROOT = Path(posttrain.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


# --- new parts -------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
NEW_PARTS = {
    "A loss on preferences": 1,
    "An advantage": 1,
    "A signal that asks a model": 1,
    "A metric with raw data of its own": 2,
}
"""Source files that a new part of each kind may touch. A test adds one of each."""


def new_parts() -> Mapping[str, list[tuple[str, str]]]:
    """(path, code) of every file that the page on adding parts writes or changes, by kind."""
    text = PAGE.read_text(encoding="utf-8")
    shown = {}
    for kind, section in re.findall(r"^### (.+?)\n(.*?)(?=^###? |\Z)", text, re.M | re.S):
        named = r"^`src/(posttrain/[\w/.]+)`:\n+```python\n(.*?)^```"
        if blocks := re.findall(named, section, re.M | re.S):
            shown[kind] = blocks
    return shown


ROLES = ("method", "source", "signal", "term", "task_set")


def unknown_accepted() -> list[str]:
    """Roles in which a name that no part has is not an error."""
    from posttrain.core.errors import ConfigError
    from posttrain.parts.registry import find

    wrong = []
    for role in ROLES:
        with contextlib.suppress(ConfigError):
            wrong.append(f"{role}: {find(role, 'no_such_part').__name__}")
    return wrong


# --- circles ---------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """``posttrain.core.errors`` of its file."""
    parts = ["posttrain", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, known: set[str]) -> set[str]:
    """Our modules that a module imports anywhere: at its top, in functions, for types only."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            if name in known:
                found.add(name)
    return found


def import_graph() -> Mapping[str, set[str]]:
    """Every module of ours, packages too, and those it imports anywhere."""
    known = {module_name(p) for p in MODULES}
    return {
        name: imports_of(ast.parse(path.read_text("utf-8")), known) - {name}
        for path in MODULES
        for name in [module_name(path)]
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components).

    Example:
        >>> circles({"a": {"b"}, "b": {"a"}, "c": {"a"}})
        [['a', 'b']]
    """
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for there in sorted(graph.get(node, ())):
            if there not in order:
                visit(there)
                low[node] = min(low[node], low[there])
            elif there in stack:
                low[node] = min(low[node], order[there])
        if low[node] == order[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


# --- parts that generic code knows -----------------------------------------------------------

BASES = {"Part", "Source", "Signal", "Term", "TokenTerm", "Method", "TermMethod", "TaskSetSpec"}
"""What generic code may speak of: the roles."""


def part_classes() -> Mapping[str, str]:
    """Every class below a role, with the family (folder) that it stands in."""
    bases: dict[str, list[str]] = {}
    family: dict[str, str] = {}
    for path in (ROOT / "parts").rglob("*.py"), (ROOT / "tasks").rglob("*.py"):
        for file in path:
            for node in ast.parse(file.read_text("utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = [b.id for b in node.bases if isinstance(b, ast.Name)]
                    family[node.name] = str(file.parent.relative_to(ROOT))
    found: dict[str, str] = {}

    def is_part(name: str) -> bool:
        return name in BASES or any(is_part(b) for b in bases.get(name, ()))

    for name in bases:
        if name not in BASES and is_part(name):
            found[name] = family[name]
    return found


def names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def known_by_name(path: Path, classes: Mapping[str, str]) -> Iterator[str]:
    """Places of a module that ask which part something is, outside of the part's family.

    ``isinstance`` and ``match`` on a part's class, and comparing a tag with a text.
    """
    here = str(path.parent.relative_to(ROOT))
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        asked: set[str] = set()
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = names_in(node.args[1]) if len(node.args) > 1 else set()
        elif isinstance(node, ast.MatchClass):
            asked = names_in(node.cls)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = [s for s in sides if isinstance(s, ast.Constant) and isinstance(s.value, str)]
            tags = [
                s for s in sides if re.search(r"tag_of\(|__struct_config__\.tag$", ast.unparse(s))
            ]
            if texts and tags:
                yield f"{path.relative_to(ROOT)}:{node.lineno} compares a tag"
        for name in sorted(asked & classes.keys()):
            if classes[name] != here:
                yield f"{path.relative_to(ROOT)}:{node.lineno} asks for {name}"


def all_known_by_name() -> list[str]:
    """Of the whole package."""
    classes = part_classes()
    return [place for path in MODULES for place in known_by_name(path, classes)]


# --- names -----------------------------------------------------------------------------------

PRIVATE = (
    *("clinic", "company", "leftovers", "gather", "shadow", "masters", "products", "judges"),
    *("sitting", "told", "tell", "tells", "begun", "kept"),
)
"""Words that only we would understand, as names of modules, classes, functions or parameters."""

STANDARD = {"judges": "signal roles and reward models are judges in the field (LLM-as-a-judge)"}


def defined_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that a module gives: classes, functions, parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.lineno, node.name
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg


def private_names() -> list[str]:
    """Modules, classes, functions and parameters with a private word in their name."""
    words = {w for w in PRIVATE if w not in STANDARD}
    found = []
    for path in MODULES:
        place = str(path.relative_to(ROOT))
        names = [(0, path.stem), *defined_names(ast.parse(path.read_text("utf-8")))]
        for line, name in names:
            spoken = set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))
            if spoken & words:
                found.append(f"{place}:{line} {name}")
    return found


def doubled_classes() -> dict[str, list[str]]:
    """Public classes of one name in two modules."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT)))
    return {name: places for name, places in sorted(homes.items()) if len(places) > 1}


# --- what a reader of GRPO walks through -----------------------------------------------------

LEFT_OUT = ("report", "measure", "cli")


@dataclass(frozen=True, slots=True)
class Walk:
    """Files, functions and lines of functions that ran."""

    files: Mapping[str, int]  # lines of executed functions by file

    @property
    def lines(self) -> int:
        return sum(self.files.values())


def executed(code: Any) -> Walk:
    """Run ``code`` and record our functions that ran, until it raises ``StopIteration``."""
    seen: set[CodeType] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            seen.add(frame.f_code)

    sys.setprofile(profile)
    try:
        code()
    except StopIteration:
        pass
    finally:
        sys.setprofile(None)
    lines: dict[str, int] = defaultdict(int)
    for function in seen:
        name = str(Path(function.co_filename).relative_to(ROOT))
        inner = function.co_name.startswith("<") or "<locals>" in function.co_qualname
        body_of_class = not function.co_flags & inspect.CO_OPTIMIZED
        if inner or body_of_class or name.split("/")[0] in LEFT_OUT:
            continue
        numbers = [n for *_, n in function.co_lines() if n]
        lines[name] += max(numbers) - function.co_firstlineno + 1 if numbers else 0
    return Walk(dict(sorted(lines.items())))


def grpo_walk() -> Walk:
    """From ``load_recipe`` to ``backward`` of the first step of GRPO on a tiny model."""
    import torch

    from posttrain.testing import tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder / "model")
        (folder / "tasks.jsonl").write_text(
            "".join(f'{{"prompt": "say {c}", "answer": "{c}"}}\n' for c in "abcdefgh")
        )
        (folder / "recipe.yaml").write_text(GRPO)
        backward = torch.Tensor.backward

        def stop(*_: object, **__: object) -> None:
            raise StopIteration

        torch.Tensor.backward = stop
        try:
            return executed(lambda: _until_backward(folder))
        finally:
            torch.Tensor.backward = backward


GRPO = """
name: walk
model: model
device: cpu
tasks: {letters: {type: jsonl, path: tasks.jsonl, held_out: 2}}
measure: {samples: 2, max_new_tokens: 2}
stages:
  - name: practise
    method: {name: grpo, tasks: [letters], group_size: 2, max_new_tokens: 2}
    budget: {steps: 1}
    groups_per_step: 2
"""


def _until_backward(folder: Path) -> None:
    from posttrain.api import run
    from posttrain.recipe import load_recipe

    run(load_recipe(folder / "recipe.yaml"), out=folder / "out", root=folder)


# --- size and repetition ---------------------------------------------------------------------


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Lines that do something, without blank lines, comments, docstrings and imports."""
    source = path.read_text("utf-8")
    skip: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            skip |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return [
        (n, text.strip())
        for n, text in lines
        if n not in skip and text.strip() and not text.strip().startswith("#")
    ]


def repeated(paths: Sequence[Path], *, least: int = 6) -> list[str]:
    """Pairs of places that share ``least`` or more lines of code, longest runs only."""
    files = {p: code_lines(p) for p in paths}
    windows: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, lines in files.items():
        for start in range(len(lines) - least + 1):
            windows[tuple(t for _, t in lines[start : start + least])].append((path, start))
    found: dict[tuple[Path, Path, int], tuple[int, int]] = {}
    for places in windows.values():
        for (a, i), (b, j) in itertools.combinations(places, 2):
            if a == b and abs(i - j) < least:
                continue
            key = (a, b, j - i)
            start, _ = found.get(key, (i, i))
            if key in found and i > found[key][1] + 1:
                key = (a, b, (j - i) * 10_000 + i)  # another run at the same distance
                start = i
            found[key] = (min(start, i), i)
    return [
        f"{a.relative_to(ROOT)}:{files[a][i][0]} and {b.relative_to(ROOT)}"
        for (a, b, _), (i, _) in sorted(found.items(), key=lambda e: (str(e[0][0]), e[1]))
    ]


def lines_of(folders: Sequence[str]) -> int:
    """Lines of the modules below these folders of ours."""
    files = [f for name in folders for f in (ROOT / name).rglob("*.py")]
    return sum(len(f.read_text("utf-8").splitlines()) for f in files)


# --- the table -------------------------------------------------------------------------------


def main() -> None:
    """Print the table."""
    walk = grpo_walk()
    rings = circles(import_graph())
    touched = {kind: len({path for path, _ in files}) for kind, files in new_parts().items()}
    rows = [
        *((f"files touched: {k.lower()}", touched[k], str(bar)) for k, bar in NEW_PARTS.items()),
        ("files of ours from load_recipe to backward, GRPO", len(walk.files), "20"),
        ("lines of their executed functions", walk.lines, ""),
        ("circles of files, lazy and type-only imports counted", len(rings), "0"),
        ("tests of a part's type outside its family", len(all_known_by_name()), "0"),
        ("roles that take a name that no part has", len(unknown_accepted()), "0"),
        ("private names", len(private_names()), "0"),
        ("public classes of one name in two modules", len(doubled_classes()), "0"),
        ("modules", len(MODULES), ""),
        ("of them with code: not an __init__", sum(m.stem != "__init__" for m in MODULES), ""),
        ("lines in all", sum(len(m.read_text("utf-8").splitlines()) for m in MODULES), ""),
        ("lines of parts and methods", lines_of(["parts"]), ""),
        ("pairs of places that share six or more lines of code", len(repeated(MODULES)), ""),
    ]
    for words, number, bar in rows:
        print(f"{words:<56} {number:>8,} {f'(bar {bar})' if bar else ''}".rstrip())
    if "--details" in sys.argv:
        print("\nGRPO:", *(f"  {n:>5} {f}" for f, n in walk.files.items()), sep="\n")
        by_folder = Counter(f.partition("/")[0] for f in walk.files)
        print(
            "\nGRPO, files by folder:", *(f"  {n:>5} {f}" for f, n in by_folder.items()), sep="\n"
        )
        print("\ncircles:", *map(str, rings), sep="\n  ")
        print("\nknown by name:", *all_known_by_name(), sep="\n  ")
        print("\nprivate:", *private_names(), sep="\n  ")
        print("\ndoubled:", *map(str, doubled_classes().items()), sep="\n  ")
        print("\nrepeated:", *repeated(MODULES), sep="\n  ")


if __name__ == "__main__":
    main()
