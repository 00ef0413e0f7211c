"""The code that a model folder brings: which modules its configuration names, and from where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.core.files import hash_files
from posttrain.models.entries import plain_file, read_json

NAMING = ("config.json", "tokenizer_config.json", "processor_config.json")
"""Files that may name classes of the folder's own."""


def code_files(folder: Path) -> list[str]:
    """Names of the modules of a folder whose configuration names classes of its own, sorted."""
    if not any(True for _ in _named(folder)):
        return []
    inside = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return sorted(p.as_posix() for p in inside if not any(x.startswith(".") for x in p.parts))


def code_digest(folder: Path) -> str | None:
    """sha256 over the code that a model folder brings, 64 hex digits; None for a folder without."""
    names = code_files(folder)
    for name in names:
        plain_file(folder / name)
    return hash_files(folder, names) if names else None


def same_code(one: Path, other: Path) -> bool:
    """True for two folders that bring code, the same to the byte: who allows one, allows both."""
    found = code_digest(one)
    return found is not None and found == code_digest(other)


def check_code(folder: Path) -> None:
    """Code of the folder may run: none from elsewhere, which nobody looked at and no digest holds.

    Raises:
        ModelError: the configuration names a class of another folder or repository.
    """
    for file, name in _named(folder):
        if "--" in name:
            raise ModelError(
                f"{folder / file} runs code from elsewhere: {name}",
                expected="classes of modules in the folder",
                fix="copy the module into the folder, and leave out what stands before --",
            )


def _named(folder: Path) -> Iterator[tuple[str, str]]:
    """The classes that the folder's files name, with the file that does."""
    for file in NAMING:
        if (folder / file).is_file():
            content = read_json(folder / file)
            yield from ((file, name) for name in _classes(content, inside=False))


def _classes(content: object, *, inside: bool) -> Iterator[str]:
    """Texts under ``auto_map``, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _classes(value, inside=inside or key == "auto_map")
    elif isinstance(content, list):
        for value in content:
            yield from _classes(value, inside=inside)
    elif inside and isinstance(content, str):
        yield content
