"""Every error that posttrain raises on purpose.

    PosttrainError
    ├── ConfigError        a recipe or an option is wrong
    ├── LegalityError      an objective needs columns or provenance that the stage does not provide
    ├── DataError          a data file is malformed, empty, or has nothing to train on
    ├── TaskError          a task set or a reward function misbehaves
    ├── ModelError         a model folder is not usable, or a model breaks an assumption
    └── RunError           the state of a run folder
        ├── RunLocked      another process uses this folder
        ├── ResumeRefused  the recipe or its data changed under a started stage
        ├── FileChanged    a file of a run folder is not what the ledger recorded
        ├── LedgerBroken   the hash chain of a ledger does not hold
        ├── Interrupted    ``stop`` returned True; what was committed stays
        └── DiskFull       the disk is full; earlier writes are intact

A message has up to three parts: what was found, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PosttrainError(Exception):
    """Base of the tree. Catch this to catch everything raised on purpose.

    Example:
        >>> str(PosttrainError("3 rows", expected="at least 4", fix="add one row"))
        '3 rows\\n  expected: at least 4\\n  to mend:  add one row'
    """

    def __init__(self, found: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.found, self.expected, self.fix = found, expected, fix
        lines = [found]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  to mend:  {fix}")
        super().__init__("\n".join(lines))


class ConfigError(PosttrainError):
    """A recipe, an option or a combination of options is wrong."""


class LegalityError(PosttrainError):
    """An objective needs columns or provenance that the stage does not provide."""


class DataError(PosttrainError):
    """A data file is malformed, empty, or has nothing to train on."""


class TaskError(PosttrainError):
    """A task set cannot be built, or a reward function misbehaves."""


class ModelError(PosttrainError):
    """A model cannot be loaded, or breaks an assumption that exact results need."""


class RunError(PosttrainError):
    """The state of a run folder does not allow the operation."""


class RunLocked(RunError):
    """Another process uses this run folder."""


class ResumeRefused(RunError):
    """The recipe or its data changed under a stage that had already started."""


class FileChanged(RunError):
    """A file of a run folder is not what the ledger recorded."""


class LedgerBroken(RunError):
    """The hash chain of a ledger does not hold."""


class Interrupted(RunError):
    """The caller asked to stop. Everything up to the last draw is committed; run again to go on."""


class DiskFull(RunError):
    """The disk is full. Everything committed before is intact."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint for a misspelt name: the closest known one, or all of them when none is close.

    Example:
        >>> nearest("setps", ["steps", "seed"])
        "did you mean 'steps'?"
        >>> nearest("zzz", ["steps", "seed"])
        'known: seed, steps'
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options) or '(none)'}"
