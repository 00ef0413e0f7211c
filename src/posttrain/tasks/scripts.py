"""A Python file of the user's, with the modules beside it that it imports.

    file ──ast──▶ imports ──found beside it?──▶ more files ──▶ closure: identity, trust
      └──executed with the same files importable, and no others of the folder──▶ namespace

The closure is known before anything runs. What is loaded later and is not in it is refused, so the
identity covers all code of the folder that takes part.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import TypeVar, final

from posttrain.core.config import digest
from posttrain.core.contained import Contained, Failed
from posttrain.core.errors import TaskError, nearest

T = TypeVar("T")

_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)
# With these a file may define names that its syntax tree does not show.
_HIDES_NAMES = frozenset({"exec", "globals", "setattr", "vars", "eval"})


@dataclass(frozen=True, slots=True)
class _Source:
    """One parsed file."""

    path: Path
    content: bytes
    tree: ast.Module


@final
@dataclass(eq=False)
class Script:
    """A Python file with everything of its folder that it imports.

    Modules are looked for beside the file, as for any script, before installed packages.

    Args:
        path: the file.
        seconds: time limit of loading it, and default limit of a call.

    Raises:
        TaskError: no such file, or it or a module that it imports is not Python.
    """

    path: Path
    seconds: float = 60.0
    _modules: dict[str, ModuleType] = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        """Where its modules may be."""
        return self.path.resolve().parent

    @cached_property
    def main(self) -> Path:
        """The file itself, where it really is."""
        return self.path.resolve()

    @cached_property
    def sources(self) -> dict[Path, _Source]:
        """The file and the modules beside it that it imports, directly or not, by path."""
        found: dict[Path, _Source] = {}
        waiting = [self.main]
        if self.path.suffix != ".py":
            raise TaskError(f"{self.path} is not a Python file", expected="file.py:function")
        while waiting:
            path = waiting.pop()
            if path not in found:
                found[path] = _parsed(path)
                waiting += self._imported_by(found[path])
        return found

    @cached_property
    def identity(self) -> str:
        """Digest of the contents: of the file alone, when it imports nothing beside it."""
        hashes = {p: hashlib.sha256(s.content).hexdigest() for p, s in self.sources.items()}
        if len(hashes) == 1:
            return next(iter(hashes.values()))
        return digest({p.relative_to(self.folder).as_posix(): h for p, h in hashes.items()})

    @cached_property
    def contained(self) -> Contained:
        """Runs its code."""
        return Contained(files={str(p) for p in self.sources}, seconds=self.seconds)

    def check(self, function: str) -> None:
        """Refuse, without running the file, a function that it cannot have.

        Raises:
            TaskError: no function of this name, or it is async or a generator.
        """
        tree = self.sources[self.main].tree
        names, complete = _defined(tree)
        place = f"{self.path}:{getattr(names.get(function), 'lineno', 1)}"
        if function not in names:
            if complete:
                raise TaskError(
                    f"{self.path} has no function {function!r}",
                    fix=nearest(function, (n for n in names if not n.startswith("_"))),
                )
            return
        made = names[function]
        if isinstance(made, ast.AsyncFunctionDef):
            raise TaskError(
                f"{place}: {function} is async",
                expected="a plain function",
                fix="call asyncio.run inside of it",
            )
        if isinstance(made, ast.FunctionDef) and _yields(made):
            raise TaskError(
                f"{place}: {function} is a generator", expected="a function that returns a list"
            )

    def load(self, function: str) -> Callable[..., object]:
        """Run the file and find the function. Every call gives a namespace of its own.

        Raises:
            TaskError: it raised, has no such function, or loaded code that the identity misses.
        """
        self.check(function)
        name = f"posttrain_script_{self.identity[:16]}"
        module = ModuleType(name)
        module.__file__ = str(self.path)
        self._modules.clear()
        self._modules[name] = module
        source = self.sources[self.main]
        try:
            self.call(lambda: _execute(module, source))
        except Failed as error:
            raise TaskError(
                f"{self.path}, while it was loaded, {error.words}",
                fix="mend the file, or install what it imports",
            ) from error
        found = vars(module).get(function)
        if not callable(found):
            known = (k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
            raise TaskError(
                f"{self.path} has no function {function!r}", fix=nearest(function, known)
            )
        made: Callable[..., object] = found
        return made

    def call(self, code: Callable[[], T], *, seconds: float | None = None) -> T:
        """Call code of the file, with its modules importable.

        Raises:
            Failed: it raised, tried to end the process, or took too long.
            TaskError: it imported code that the identity does not cover.
        """
        with self._importable():
            return self.contained.run(lambda: self._watched(code), seconds=seconds)

    def _watched(self, code: Callable[[], T]) -> T:
        paths, before = list(sys.path), set(sys.modules)
        result = code()
        if added := [p for p in sys.path if p not in paths]:
            self._refuse_loaded_from(added, sorted(set(sys.modules) - before))
        return result

    def _refuse_loaded_from(self, folders: Sequence[str], names: Sequence[str]) -> None:
        places = [Path(folder).resolve() for folder in folders]
        for name in names:
            file = getattr(sys.modules.get(name), "__file__", None)
            if not isinstance(file, str) or Path(file) in self.sources:
                continue
            if any(Path(file).resolve().is_relative_to(place) for place in places):
                raise TaskError(
                    f"{self.path} changed sys.path and imported {name} from {file}",
                    expected="modules beside the file, which are part of the stage's identity",
                    fix="put the module there, or install it as a package",
                )

    # --- imports ---------------------------------------------------------------------------------

    def _imported_by(self, source: _Source) -> Iterator[Path]:
        package = source.path.relative_to(self.folder).parts[:-1]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = _absolute(node, package)
                if start is None:
                    continue
                names = [f"{start}.{a.name}" if start else a.name for a in node.names]
                names.append(start)
            else:
                continue
            for name in names:
                yield from self._files_of(name)

    def _files_of(self, name: str) -> Iterator[Path]:
        """The files that importing a dotted name runs: its packages, then itself."""
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            found = self.find(".".join(parts[:length]))
            if found is None:
                return
            if found.is_file():
                yield found

    def find(self, name: str) -> Path | None:
        """The file of a dotted module name beside the script; the folder of a package without
        ``__init__.py``; None when it is not one of ours."""
        parts = name.split(".")
        if not all(parts) or parts[0] in sys.stdlib_module_names or parts[0] == "posttrain":
            return None
        place = self.folder.joinpath(*parts)
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                return file
        bare = place.is_dir() and any(place.glob("*.py")) and not self.is_elsewhere(parts[0])
        return place if bare else None

    def is_elsewhere(self, name: str) -> bool:
        """Whether Python finds a module of this name in another place."""
        try:
            spec = importlib.machinery.PathFinder.find_spec(name)
        except (ImportError, ValueError):
            return False
        if spec is None or spec.origin is None:
            return False
        return not Path(spec.origin).resolve().is_relative_to(self.folder)

    @contextmanager
    def _importable(self) -> Iterator[None]:
        """Make the modules importable under their plain names, and nobody else's of that name."""
        tops = {n.partition(".")[0] for n in self._modules} | set(self._top_names())
        hidden = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in tops}
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(self._modules)
        finder = _Finder(self)
        sys.meta_path.insert(0, finder)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)
            for name in [n for n in sys.modules if n.partition(".")[0] in tops]:
                self._modules[name] = sys.modules.pop(name)
            sys.modules.update(hidden)

    def _top_names(self) -> Iterator[str]:
        for path in self.sources:
            name = path.relative_to(self.folder).parts[0].removesuffix(".py")
            if self.find(name) is not None:  # never one of ours or of the standard library
                yield name


@final
class _Finder(MetaPathFinder):
    """Finds the modules beside a script, before those of installed packages."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module, if it is one of ours.

        Raises:
            TaskError: it is, and no import statement names it.
        """
        found = self._script.find(name)
        if found is None:
            return None
        if found.is_dir():
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(found)]
            return spec
        source = self._script.sources.get(found)
        if source is None and self._script.is_elsewhere(name.partition(".")[0]):
            return None  # what installed packages import is theirs
        if source is None:
            raise TaskError(
                f"{self._script.path} loads {found}, and no import statement says so",
                expected="modules named in import statements: their content is part of the "
                "stage's identity",
                fix=f"write `import {name}`",
            )
        inside = [str(found.parent)] if found.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, found, loader=_Runs(source), submodule_search_locations=inside
        )


@final
class _Runs(Loader):
    """Executes a file that was read before. No ``.pyc``: it would be left in the user's folder."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def exec_module(self, module: ModuleType) -> None:
        """Run the file in the module."""
        _execute(module, self._source)


def _execute(module: ModuleType, source: _Source) -> None:
    exec(compile(source.content, str(source.path), "exec", dont_inherit=True), module.__dict__)


def _parsed(path: Path) -> _Source:
    try:
        content = path.read_bytes()
        return _Source(path, content, ast.parse(content, str(path)))
    except _UNREADABLE as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        where = f"{path}:{line}" if line else f"{path}"
        raise TaskError(
            f"{where} is not Python: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    return (words.splitlines() or [""])[0]


def _absolute(node: ast.ImportFrom, package: Sequence[str]) -> str | None:
    """The dotted name that a from-import starts at; None above the folder."""
    if not node.level:
        return node.module or ""
    if node.level - 1 > len(package):
        return None
    kept = package[: len(package) - (node.level - 1)]
    return ".".join((*kept, node.module) if node.module else kept)


def _defined(tree: ast.Module) -> tuple[dict[str, ast.AST], bool]:
    """Names at the top of a file with what defines them, and whether these are surely all."""
    names: dict[str, ast.AST] = {}
    complete = True
    waiting: list[ast.AST] = list(tree.body)
    for node in waiting:  # it grows: blocks of if, try and with are at the top too
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                complete = complete and alias.name != "*"
                names[alias.asname or alias.name.partition(".")[0]] = node
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                names[node.id] = node
            complete = complete and node.id not in _HIDES_NAMES
        waiting += ast.iter_child_nodes(node)
    return names, complete


def _yields(function: ast.FunctionDef) -> bool:
    """Whether a function is a generator: a yield of its own, and not of a function in it."""
    waiting: list[ast.AST] = list(function.body)
    for node in waiting:
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return False
