"""The rules of the house that a machine can check: layers, circles, sizes, names, light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import house
import pytest

import posttrain
from posttrain.parts.registry import known

ROOT = Path(posttrain.__file__).parent
LAYERS = [
    {"core"},
    {"numerics", "pages"},
    {"protocols", "chat", "models"},
    {"parts", "engines"},
    {"tasks"},
    {"measure"},
    {"recipe"},
    {"training"},
    {"run"},
    {"diagnosis", "report", "catalogue"},
    {"api", "testing"},
    {"cli", "lab", "__main__"},
]
LAYER = {unit: depth for depth, units in enumerate(LAYERS) for unit in units}
BLIND = [{"parts", "engines"}, {"diagnosis", "report", "catalogue"}]
"""Units of one layer that must not know each other."""

TORCH_FREE = {
    "posttrain.core",
    "posttrain.pages",
    "posttrain.protocols",
    "posttrain.chat",
    "posttrain.models",
    "posttrain.parts",
    "posttrain.tasks",
    "posttrain.measure",
    "posttrain.recipe",
    "posttrain.run.plan",
    "posttrain.run.folder",
    "posttrain.run.ledger",
    "posttrain.report",
    "posttrain.catalogue",
}
MAX_FUNCTION, MAX_MODULE = 80, 500
MAX_TERM, MAX_COMPOSE = 25, 12
MODULES = sorted(ROOT.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_units(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, unit) of every import of ours, also inside functions and type-checking blocks."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "posttrain" and len(parts) > 1 and parts[1] in LAYER:
                found.append((node.lineno, parts[1]))
    return found


def violations(here: str, source: str) -> list[str]:
    out = []
    tree = ast.parse(source)
    for line, there in imported_units(tree):
        blind = there != here and any({here, there} <= units for units in BLIND)
        if LAYER[there] > LAYER[here] or blind:
            out.append(f"line {line}: {here} imports {there}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION:
                out.append(f"line {node.lineno}: {node.name} has {length} lines")
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        ):
            reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            if not reraises:
                out.append(f"line {node.lineno}: broad except that swallows")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "setattr"):
            out.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    if source.count("\n") > MAX_MODULE:
        out.append(f"{source.count(chr(10))} lines")
    return out


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_keeps_the_rules(path):
    here = unit_of(path)
    if here == "__init__":
        return
    assert here in LAYER, f"{here} has no layer: add it to LAYERS"
    assert violations(here, path.read_text()) == []


def test_the_checker_catches_what_it_should():
    assert violations("core", "from posttrain.parts.base import Part\n")
    assert violations("parts", "from posttrain.engines.local.engine import LocalEngine\n")
    assert violations("report", "def f():\n    from posttrain.diagnosis.card import Diagnosis\n")
    assert violations("run", "def f():\n" + "    x = 1\n" * 90)
    assert violations("run", "try:\n    x = 1\nexcept Exception:\n    pass\n")
    assert not violations("run", "from posttrain.core.errors import PosttrainError\n")


# --- circles, and what generic code knows ----------------------------------------------------


def test_no_two_modules_reach_each_other():
    """Lazy and type-only imports counted, and imports of packages."""
    assert house.circles(house.import_graph()) == []


def test_circles_are_found():
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    lazy = ast.parse("def f():\n    from posttrain.core import errors\n")
    assert house.imports_of(lazy, {"posttrain.core.errors"}) == {"posttrain.core.errors"}


def test_generic_code_never_knows_a_part_by_name():
    assert house.all_known_by_name() == []


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(s, Verify | Gae)",
        "match s:\n    case Verify():\n        pass",
        "tag_of(s) == 'verify'",
        "s.__struct_config__.tag == 'verify'",
        "known = [p for p in parts if issubclass(p, (Dataset, Rollouts))]",
    ],
)
def test_asking_for_a_part_is_seen(tmp_path, monkeypatch, code):
    monkeypatch.setattr(house, "ROOT", tmp_path)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "x.py"
    path.write_text(code)
    classes = dict.fromkeys(("Verify", "Gae", "Dataset", "Rollouts"), "parts/rewards")
    assert list(house.known_by_name(path, classes))


def test_the_roles_have_parts():
    assert len(house.part_classes()) > 150


# --- names -----------------------------------------------------------------------------------


def test_no_private_speech_in_names():
    assert house.private_names() == []


def test_a_class_name_means_one_thing():
    assert house.doubled_classes() == {}


def test_nothing_is_called_utils():
    assert not [p for p in MODULES if p.stem in ("utils", "helpers", "common", "misc")]


# --- sizes -----------------------------------------------------------------------------------


def code_lines(source: str, function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, comments and blank lines."""
    first = function.body[0]
    described = ast.get_docstring(function) is not None
    doc = range(first.lineno, first.end_lineno + 1) if described else range(0)
    lines = source.splitlines()
    code = (i for i in range(function.lineno, function.end_lineno + 1) if i not in doc)
    return sum(lines[i - 1].strip() != "" and lines[i - 1].strip()[0] != "#" for i in code)


def functions_of_parts(name: str) -> list[tuple[str, int]]:
    found = []
    for path in sorted((ROOT / "parts").rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                found.append((f"{path.stem}:{node.lineno}", code_lines(source, node)))
    return found


def test_terms_and_named_methods_stay_readable():
    """A term is at most 25 lines of code, what a named method composes at most 12."""
    terms, composed = functions_of_parts("values"), functions_of_parts("compose")
    assert len(terms) > 45
    # A method that is one term is composed by its shape.
    single = known("term").keys() & known("method").keys()
    assert len(composed) >= len(known("method")) - len(single)
    assert [t for t in terms if t[1] > MAX_TERM] == []
    assert [c for c in composed if c[1] > MAX_COMPOSE] == []


def test_lines_of_code_are_counted_as_said():
    source = 'def f():\n    """Doc.\n\n    More.\n    """\n    # why\n\n    x = 1\n    return x\n'
    assert code_lines(source, ast.parse(source).body[0]) == 3


# --- light imports and public names ----------------------------------------------------------


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


HEAVY = {"torch", "transformers", "ray", "vllm", "peft", "reasoning_gym", "pyarrow", "jinja2"}


def test_import_is_light():
    assert not loaded_after("import posttrain") & HEAVY


def test_the_command_line_is_light():
    assert not loaded_after("import posttrain.cli.main") & (HEAVY | {"rich"})


@pytest.mark.parametrize("unit", sorted(TORCH_FREE))
def test_planning_is_torch_free(unit):
    """Every module of the unit, not only its package."""
    path = ROOT / "/".join(unit.split(".")[1:])
    modules = [unit] if not path.is_dir() else [house.module_name(p) for p in path.rglob("*.py")]
    assert not loaded_after(f"import {', '.join(sorted(modules))}") & {"torch", "transformers"}


def test_all_parts_are_known_without_torch():
    code = "from posttrain.parts.registry import load\nload()"
    assert not loaded_after(code) & {"torch", "transformers", "reasoning_gym"}


def test_public_names_are_exact():
    public = {n for n in dir(posttrain) if not n.startswith("_")}
    modules = {n for n in public if n in LAYER}
    assert set(posttrain.__all__) == public - modules - {"annotations"}
    assert posttrain.__all__ == sorted(posttrain.__all__)
    for name in posttrain.__all__:
        assert getattr(posttrain, name).__name__ == name


def test_tests_are_in_the_folders_of_what_they_test():
    tests = Path(__file__).parents[1]
    ours = {p.relative_to(ROOT) for p in (ROOT, *ROOT.rglob("*")) if p.is_dir()}
    folders = {
        p.parent.relative_to(tests / kind)
        for kind in ("unit", "torch")
        for p in (tests / kind).rglob("test_*.py")
    }
    assert len(folders) > 10
    assert folders - ours == {Path("benchmarks"), Path("recipes")}
