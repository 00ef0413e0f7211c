"""Where commands write: checked before anything is loaded, and absolute from then on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from posttrain.core.errors import ConfigError
from posttrain.core.files import file_target


def out_folder(path: Path) -> Path:
    """The absolute path of a folder that a command may write, which need not exist yet.

    Raises:
        ConfigError: no path; a file, device or broken link; or a place inside a model folder.
    """
    if not str(path).strip() or path == Path():
        raise ConfigError(f"--out {str(path)!r}", expected="the path of a folder, such as out/mine")
    absolute = Path(os.path.abspath(path))
    for place in (absolute, *absolute.parents):
        if os.path.lexists(place) and not place.is_dir():
            raise ConfigError(
                f"--out {path}: {place} is not a folder", expected="a folder, or a new name"
            )
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            raise ConfigError(
                f"--out {path} is inside the model folder {place}",
                expected="a folder of its own: a model folder is its files",
            )
    return absolute


def out_file(path: Path) -> Path:
    """The absolute path of a file that a command may write, which need not exist yet.

    Raises:
        ConfigError: no path, a folder, a device, or a folder that cannot be written.
    """
    if not str(path).strip() or path == Path() or path.is_dir():
        raise ConfigError(
            f"--out {str(path)!r} is a folder", expected="the path of a file, such as base.json"
        )
    target = file_target(Path(os.path.abspath(path)))
    folder = next(p for p in target.parents if os.path.lexists(p))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {path}: {folder} cannot be written", fix="choose another path")
    return target


class _Target(click.ParamType[Path]):
    """A path that is checked while options are parsed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The absolute path; a mistake is one of this option."""
        if not str(value):
            raise ConfigError("--out ''", expected=f"the path of a {self.name.lower()}")
        return (out_folder if self is OUT_FOLDER else out_file)(Path(value))


OUT_FOLDER, OUT_FILE = _Target("DIRECTORY"), _Target("FILE")
