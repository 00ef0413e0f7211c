"""Data files and task files: read whole, or refused with the file and the row."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fuzz import world
from fuzz.frame import Caught, Trial
from fuzz.mutate import damaged, mutated
from posttrain.parts.shelf import Reader
from posttrain.parts.sources.dataset import Dataset
from posttrain.protocols import Renderer
from posttrain.tasks.jsonl import JsonlTasks

FORMS: Mapping[str, Mapping[str, object]] = {
    "prompt-completion": {"prompt": "ab", "completion": "b"},
    "numbers": {"prompt": "ab", "completion": "b", "reward": 0.5, "weight": 1},
    "messages": {
        "messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}]
    },
    "pairs": {"prompt": "ab", "chosen": "b", "rejected": "a"},
    "labels": {"prompt": "ab", "completion": "b", "label": True},
    "steps": {"prompt": "ab", "completions": ["a", "b"], "labels": [True, False]},
    "tasks": {"prompt": "ab", "answer": "b"},
}
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "numbers": {"reward": "reward", "weight": "weight"},
    "pairs": {"preference": True},
    "labels": {"unpaired": True},
    "steps": {"steps": {}},
}


def trials(folder: Path, *, num: int, seed: int, renderer: Renderer) -> Iterator[Trial]:
    """Changed files of every form, as JSONL and as Parquet."""
    for number in range(num):
        rng = random.Random(f"data/{seed}/{number}")
        form = rng.choice(sorted(FORMS))
        rows = [
            dict(FORMS[form], **({"prompt": f"{c}b"} if "prompt" in FORMS[form] else {}))
            for c in "abcdef"
        ]
        changed, words = mutated(rows, rng, times=rng.choice((1, 1, 2, 5)))
        path, written = _write(folder / f"data-{number}", changed, rng)
        command = _command(folder, path, form)
        call = _Read(path, form, renderer)
        yield Trial(number, f"{form} as {path.suffix}: {words}{written}", call, command)


def _write(stem: Path, rows: object, rng: random.Random) -> tuple[Path, str]:
    """The file, and what was done to its bytes."""
    path, content = stem.with_suffix(".jsonl"), b""
    if rng.random() < 0.25:
        parquet = stem.with_suffix(".parquet")
        with Caught() as caught:  # Arrow cannot hold every tree: those go into JSONL
            pq.write_table(pa.Table.from_pylist(rows), parquet)
        if caught.error is None:
            path, content = parquet, parquet.read_bytes()
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows] if isinstance(rows, list) else [json.dumps(rows)]
        content = "\n".join(lines).encode()
    words = ""
    if rng.random() < 0.3:
        content, words = damaged(content, rng)
        words = f"; {words}"
    path.write_bytes(content)
    return path, words


def _command(folder: Path, path: Path, form: str) -> tuple[str, ...]:
    """A plan of a recipe with the file."""
    recipe = folder / f"{path.stem}.yaml"
    tree = world.recipe({"name": "sft", "data": {"path": path.name}})
    if form == "tasks":
        tree["tasks"]["sums"]["path"] = path.name
        tree["stages"] = []
    recipe.write_text(json.dumps(tree))
    return ("plan", recipe.name)


class _Read:
    """Read a file as a run does before its first step."""

    def __init__(self, path: Path, form: str, renderer: Renderer) -> None:
        self._path, self._form, self._renderer = path, form, renderer

    def __call__(self) -> bool:
        root = self._path.parent
        if self._form == "tasks":
            spec = JsonlTasks(path=self._path.name, held_out=1)
            built = spec.build("tasks", root=root, chat=True)
            return bool(len(built.train) + len(built.held_out))
        data = Dataset(path=self._path.name, **OPTIONS.get(self._form, {}))
        reader = Reader(root=root, renderer=self._renderer, context=64)
        rows = data.rows(reader)
        return rows.num_groups > 0 and rows.num_trainable > 0
