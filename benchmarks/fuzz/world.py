"""Valid inputs to start from: a tiny model, data of every form, a recipe per method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from posttrain.catalogue.example import FILES, TASKS, TEACHER, legal_example
from posttrain.core.documents import read_yaml
from posttrain.core.errors import PosttrainError
from posttrain.parts.registry import known
from posttrain.testing import tiny_model

Tree = dict[str, Any]
RECIPES = Path(__file__).parents[2] / "recipes"

_ROWS: Mapping[tuple[str, ...], Mapping[str, object]] = {
    ("prompt", "completion"): {"prompt": "ab", "completion": "b"},
    ("prompt", "chosen", "rejected"): {"prompt": "ab", "chosen": "b", "rejected": "a"},
    ("prompt", "completion", "label"): {"prompt": "ab", "completion": "b", "label": True},
    ("prompt", "completions", "labels"): {
        "prompt": "ab",
        "completions": ["a", "b"],
        "labels": [True, False],
    },
}


def build(folder: Path) -> None:
    """Write the model, the data and the task sets."""
    with as_file(files("posttrain.lab") / "base") as base:
        shutil.copytree(base, folder / "base")
        shutil.copytree(base, folder / "other")
    tiny_model(folder / "clean")
    shutil.copytree(RECIPES / "data", folder / "data")
    for columns, row in _ROWS.items():
        _write(folder / FILES[columns], columns, row)
    numbers = {**_ROWS["prompt", "completion"], "reward": 1.0, "weight": 1.0}
    _write(folder / FILES[("other",)], ("prompt",), numbers)
    (folder / "reward.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [float(len(text) % 2) for text in completions]\n"
    )


def _write(path: Path, columns: Sequence[str], row: Mapping[str, object]) -> None:
    rows = [dict(row, prompt=f"{'abcdef'[i]}{row['prompt']}") for i in range(6)]
    if "label" in columns:
        rows = [dict(r, label=i % 2 == 0) for i, r in enumerate(rows)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def recipe(method: Mapping[str, object], **stage: object) -> Tree:
    """A recipe of one small stage."""
    return {
        "name": "fuzz",
        "model": "base",
        "threads": 1,
        "tasks": {
            TASKS: {
                "type": "jsonl",
                "path": "data/products_tasks.jsonl",
                "reward": "reward.py:score",
                "held_out": 3,
            }
        },
        "measure": {"samples": 2, "max_new_tokens": 2},
        "stages": [
            {
                "name": "stage",
                "method": dict(method),
                "budget": {"steps": 1},
                "groups_per_step": 2,
                **stage,
            }
        ],
    }


def small(options: Mapping[str, object], kind: type[Any]) -> Tree:
    """Options of a method with the names of this folder, and few tokens."""
    made: Tree = _named(json.loads(json.dumps(options)))
    fields = kind.__struct_fields__
    if "max_new_tokens" in fields:
        made.setdefault("max_new_tokens", 2)
    if "group_size" in fields:
        made.setdefault("group_size", 2)
    for option, value in (("length_cache", 1), ("best", 1)):
        if option in fields:
            made[option] = value
    return made


def _named(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _named(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_named(value) for value in tree]
    if isinstance(tree, str) and tree.startswith("path:org/"):
        return "path:base" if tree == TEACHER else "path:other"
    return tree


def methods() -> dict[str, Tree]:
    """A small recipe per method that has a legal example."""
    found: dict[str, Tree] = {}
    for name, kind in known("method").items():
        try:
            given, _ = legal_example(name, kind)
        except PosttrainError:
            continue
        found[name] = recipe({"name": name, **small(given, kind)})
    return found


def shipped() -> dict[str, Tree]:
    """The recipes of this repository, made small."""
    found: dict[str, Tree] = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        tree: Tree = json.loads(json.dumps(read_yaml(path)))
        tree |= {"model": "base", "threads": 1, "measure": {"samples": 2, "max_new_tokens": 2}}
        found[path.name] = tree
    return found
