"""One file of a model folder, read so that it can neither hang nor fill the memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.core.guard import read_bytes, reading, regular_file

MAX_JSON = 1 << 29  # bytes
"""Largest JSON file that is read. The largest tokenizers have 40 MB."""

AGAIN = "copy or download the folder again"


def read_json(path: Path, *, most: int = MAX_JSON) -> Mapping[str, object]:
    """The object in a JSON file of a model folder. Infinity is allowed: some families have it.

    Raises:
        ModelError: not a plain file, too large, not JSON, too deep, a key twice, or no object.
    """
    kind = "a JSON object"
    content = read_bytes(plain_file(path), kind=kind, at_most=most, error=ModelError)
    with reading(path, kind=kind, error=ModelError, fix=AGAIN):
        read = json.loads(content, object_pairs_hook=once)
    if not isinstance(read, dict):
        raise ModelError(f"{path} holds a JSON {type(read).__name__}", expected=kind, fix=AGAIN)
    return read


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object whose keys occur once: of two values, which one counts?"""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r:.60} occurs twice")
    return found


def plain_file(path: Path) -> Path:
    """The path, if it is a plain file inside its folder; reading it cannot hang.

    Raises:
        ModelError: missing, a directory, pipe or device, or a link that leads out of the folder.
    """
    regular_file(path, error=ModelError)
    if path.is_symlink() and not _stays(path):
        raise ModelError(
            f"{path} is a link to {os.readlink(path)}",
            expected="a folder that holds all of its own content",
            fix="replace the link by a copy: cp -L",
        )
    return path


def check_entries(folder: Path) -> None:
    """Nothing in a model folder but files, folders and links to them: reading must not hang.

    Raises:
        ModelError: a pipe, a device or a socket.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            plain_file(path)


def _stays(link: Path) -> bool:
    """Whether a link stays in its folder, or leads from a hub cache's snapshot to its blob."""
    target = link.resolve()
    if target.is_relative_to(link.parent.resolve()):
        return True
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
