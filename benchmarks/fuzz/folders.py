"""Model folders: loaded and proved, or refused by what is wrong with them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from fuzz.frame import Trial
from fuzz.mutate import damaged, mutated
from posttrain.engines.local.engine import LocalEngine
from posttrain.models.folder import read_folder

JSON = (".json",)


def trials(folder: Path, *, num: int, seed: int) -> Iterator[Trial]:
    """Changed copies of the tiny model's folder."""
    for number in range(num):
        rng = random.Random(f"folder/{seed}/{number}")
        copy = folder / f"model-{number}"
        shutil.copytree(folder / "base", copy)
        words = "; ".join(_change(copy, rng) for _ in range(rng.choice((1, 1, 1, 2))))
        tasks = ("--tasks", "probe.yaml", "--samples", "2")
        yield Trial(number, words, _Load(copy), ("probe", copy.name, *tasks))
        shutil.rmtree(copy, ignore_errors=True)


def _change(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    kind = rng.choice(("tree", "tree", "tree", "tree", "bytes", "delete", "strange"))
    if kind == "tree" and path.suffix in JSON:
        tree, words = mutated(json.loads(path.read_bytes()), rng, times=rng.choice((1, 2)))
        path.write_text(json.dumps(tree))
    elif kind == "delete":
        path.unlink()
        words = "deleted"
    elif kind == "strange":
        path.unlink()
        words = rng.choice(("pipe", "folder", "/dev/zero", "itself", "nowhere"))
        if words == "pipe":
            os.mkfifo(path)
        elif words == "folder":
            path.mkdir()
        else:
            path.symlink_to(path if words == "itself" else words)
    else:
        content, words = damaged(path.read_bytes(), rng)
        path.write_bytes(content)
    return f"{path.name}: {words}"


class _Load:
    """Read the folder, and load it as a run does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self) -> bool:
        read_folder(self._folder)
        policy = LocalEngine(device="cpu", dtype="float32").policy(str(self._folder))
        return bool(policy.proofs)
