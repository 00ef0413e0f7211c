"""Mutants of our own code: which do the tests kill?

Each is applied in a copy of the repository, and the test files that should notice it are run there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from silent_failures.faults import Mutant
from silent_failures.mutants import MUTANTS
from silent_failures.world import ROOT

COPIED = ("src", "tests", "benchmarks", "recipes", "docs", "pyproject.toml", "CHANGELOG.md")
LIMIT = 1800.0  # seconds for the tests of one mutant, or of the control
FAILED = 1  # pytest's exit code when a test failed


class Mutated(msgspec.Struct, kw_only=True):
    """One mutant and its fate."""

    id: str
    killed: bool
    by: str = ""  # the first test that failed


def applied(mutant: Mutant, root: Path) -> str:
    """The module's text with the mutant in it.

    Raises:
        ValueError: the code to break does not stand in the module exactly once.
    """
    text = (root / "src/posttrain" / mutant.module).read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.id}: {mutant.before!r} in {mutant.module}, not exactly once")
    return text.replace(mutant.before, mutant.after)


def mutated(ids: Iterable[str] | None = None) -> Iterator[Mutated]:
    """The fate of every mutant, or of some.

    Raises:
        RuntimeError: the tests fail on the code as it is, so a failure would say nothing.
    """
    wanted = set(ids) if ids is not None else None
    home = Path(tempfile.mkdtemp(prefix="mutants-"))
    for name in COPIED:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, home / name)
    chosen = [m for m in MUTANTS if wanted is None or m.id in wanted]
    control = _pytest(sorted({test for m in chosen for test in m.tests}), home)
    if control.returncode:  # else a test that fails anyway would kill every mutant
        raise RuntimeError(f"tests fail on unbroken code:\n{control.stdout[-4000:]}")
    for mutant in chosen:
        yield _fate(mutant, home)
    shutil.rmtree(home)


def _pytest(tests: Iterable[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run test files in the copy, until the first failure."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"),
            *(f"tests/{test}" for test in tests),
        ],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(home / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def _fate(mutant: Mutant, home: Path) -> Mutated:
    path = home / "src/posttrain" / mutant.module
    plain = path.read_text(encoding="utf-8")
    path.write_text(applied(mutant, home), encoding="utf-8")
    for test in mutant.tests:
        done = _pytest([test], home)
        if done.returncode:
            break
    path.write_text(plain, encoding="utf-8")
    lines = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    by = lines[0].partition(" ")[2].partition(" - ")[0] if lines else ""
    return Mutated(id=mutant.id, killed=done.returncode == FAILED, by=by)
