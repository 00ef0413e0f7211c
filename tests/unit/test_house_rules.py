"""The rules of the house that a machine can check: layers, sizes, light imports, public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain

ROOT = Path(posttrain.__file__).parent
LAYERS = [
    {"errors"},
    {"config", "provenance", "trajectory", "task", "clock"},
    {"files", "ledger", "store", "events"},
    {
        "composition",
        "methods",
        "recipe",
        "legality",
        "protocols",
        "chat",
        "steps",
        "batch",
        "head",
        "fused",
        "logits",
        "products",
        "divergence",
        "extensions",
    },
    {"sources", "signals", "objectives", "probes", "engines", "tasks"},
    {"journal", "gates", "judges", "stage", "plan", "monitors"},
    {
        "build",
        "records",
        "measuring",
        "pipeline",
        "diagnosis",
        "preview",
        "tables",
        "report",
        "testing",
        "catalogue",
        "contracts",
        "tiny",
    },
    {"console", "lab", "api", "cli"},
]
LAYER = {unit: depth for depth, units in enumerate(LAYERS) for unit in units}
SIBLINGS = LAYERS[4]
TORCH_FREE_UNITS = {unit for layer in LAYERS[:4] for unit in layer} - {
    "batch",
    "head",
    "fused",
    "logits",
    "products",
    "divergence",
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
        if LAYER[there] > LAYER[here] or (there != here and {here, there} <= SIBLINGS):
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
    assert violations("errors", "from posttrain.core.config import Config\n")
    assert violations("signals", "from posttrain.engines.local.engine import LocalPolicy\n")
    assert violations("stage", "def f():\n" + "    x = 1\n" * 90)
    assert violations("stage", "try:\n    x = 1\nexcept Exception:\n    pass\n")
    assert not violations("stage", "from posttrain.core.errors import PosttrainError\n")


def code_lines(source: str, function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, comments and blank lines."""
    first = function.body[0]
    told = ast.get_docstring(function) is not None
    doc = range(first.lineno, first.end_lineno + 1) if told else range(0)
    lines = source.splitlines()
    code = (i for i in range(function.lineno, function.end_lineno + 1) if i not in doc)
    return sum(lines[i - 1].strip() != "" and lines[i - 1].strip()[0] != "#" for i in code)


def functions_of(folder: str, wanted) -> list[tuple[str, int]]:
    found = []
    for path in sorted((ROOT / folder).glob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and wanted(node):
                name = f"{path.stem}:{node.lineno} {node.name}"
                found.append((name, code_lines(source, node)))
    return found


def test_terms_and_named_methods_stay_readable():
    """A term is at most 25 lines of code, what a named method composes at most 12."""
    terms = functions_of(
        "objectives", lambda f: [a.arg for a in f.args.args] == ["term", "stats", "batch"]
    )
    composed = functions_of("methods", lambda f: f.name == "compose")
    assert len(terms) > 45
    assert len(composed) >= len(METHODS)
    assert [t for t in terms if t[1] > MAX_TERM] == []
    assert [c for c in composed if c[1] > MAX_COMPOSE] == []


def test_lines_of_code_are_counted_as_said():
    source = 'def f():\n    """Doc.\n\n    More.\n    """\n    # why\n\n    x = 1\n    return x\n'
    assert code_lines(source, ast.parse(source).body[0]) == 3


def test_no_import_cycles():
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        top = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
        edges[name] = {
            n.module.removeprefix("posttrain.")
            for n in top
            if n.module and n.module.startswith("posttrain.")
        }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail, name])
        if name not in done:
            for there in edges.get(name, ()):
                visit(there, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


HEAVY = {"torch", "transformers", "ray", "vllm", "peft", "reasoning_gym", "pyarrow", "jinja2"}


def test_import_is_light():
    assert not loaded_after("import posttrain") & HEAVY


def test_the_command_line_is_light():
    assert not loaded_after("import posttrain.cli.main") & (HEAVY | {"rich"})


@pytest.mark.parametrize("unit", sorted(TORCH_FREE_UNITS))
def test_core_is_torch_free(unit):
    assert not loaded_after(f"import posttrain.{unit}") & {"torch", "transformers"}


def test_public_names_are_exact():
    public = {n for n in dir(posttrain) if not n.startswith("_")}
    modules = {n for n in public if n in LAYER}
    assert set(posttrain.__all__) == public - modules - {"annotations"}
    assert posttrain.__all__ == sorted(posttrain.__all__)
    for name in posttrain.__all__:
        assert getattr(posttrain, name).__name__ == name


def test_nothing_is_called_utils():
    assert not [p for p in MODULES if p.stem in ("utils", "helpers", "common", "misc")]
