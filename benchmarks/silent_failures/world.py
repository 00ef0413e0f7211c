"""The tiny world in which every fault is planted: one trained model, its tasks, and a recipe.

world() ──copy──▶ Setup of one run ──planter changes files and recipe──▶ posttrain, or TRL

Both sides read the same folder. The recipe is posttrain's; ``theirs.py`` translates it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from silent_failures.faults import Base

ROOT = Path(__file__).parents[2]
LAB = ROOT / "src/posttrain/lab/base"
DATA = ROOT / "recipes/data"
STEPS = 20
HELD_OUT = 16
ANSWER = 8  # tokens
REWARD = """
def score(prompts, completions, answer, **columns):
    rights = [str(a) for a in answer]
    return [1.0 if c.strip() == a else 0.1 if c.strip().isdigit() else 0.0
            for c, a in zip(completions, rights)]
"""


@dataclass
class Setup:
    """The inputs of one run, for a planter to change."""

    folder: Path
    recipe: dict[str, Any]
    edits: list[Callable[[str], str]] = field(default_factory=list)  # of the recipe's text

    @property
    def model(self) -> Path:
        """The base model's folder."""
        return self.folder / "model"

    @property
    def stage(self) -> dict[str, Any]:
        """The first stage."""
        stage: dict[str, Any] = self.recipe["stages"][0]
        return stage

    @property
    def method(self) -> dict[str, Any]:
        """Options of the first stage's method."""
        method: dict[str, Any] = self.stage["method"]
        return method

    def text(self) -> str:
        """The recipe as YAML, with the edits."""
        return self.edited(yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True))

    def edited(self, text: str) -> str:
        """A configuration's text with the edits."""
        for edit in self.edits:
            text = edit(text)
        return text

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file."""
        lines = (self.folder / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSONL file."""
        write_rows(self.folder / name, rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_world(folder: Path) -> Path:
    """Models and data that all runs start from."""
    from silent_failures.shapes import teacher_of

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(LAB, folder / "model")
    teacher_of(folder / "model", folder / "teacher")
    tasks = _read(DATA / "products_tasks.jsonl")
    for task in tasks:
        task.pop("level", None)
    train = tasks[:-HELD_OUT]
    write_rows(folder / "tasks.jsonl", tasks)
    write_rows(folder / "demos.jsonl", [demonstration(t) for t in train[:32]])
    shutil.copy(DATA / "products_pairs.jsonl", folder / "pairs.jsonl")
    (folder / "reward.py").write_text(REWARD)
    return folder


def demonstration(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task with its answer, as a conversation."""
    return {"messages": [turn("user", task["prompt"]), turn("assistant", str(task["answer"]))]}


def turn(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


def setup(world: Path, folder: Path, base: Base, *, seed: int = 0) -> Setup:
    """A copy of the world, and the recipe of a base."""
    shutil.copytree(world, folder)
    return Setup(folder, recipe(base, seed=seed))


def recipe(base: Base, *, seed: int = 0) -> dict[str, Any]:
    """One stage, measured before and after."""
    rate = {Base.SFT: 1e-3, Base.DPO: 1e-4, Base.GRPO: 3e-4, Base.OPD: 3e-4}[base]
    return {
        "name": str(base),
        "model": "model",
        "seed": seed,
        "threads": 1,
        "tasks": {
            "products": {
                "type": "jsonl",
                "path": "tasks.jsonl",
                "reward": "reward.py:score",
                "held_out": HELD_OUT,
                "success": 1.0,
            }
        },
        "measure": {"samples": 4, "max_new_tokens": ANSWER},
        "stages": [
            {
                "name": "train",
                "method": {"name": str(base), **_method(base)},
                "budget": {"steps": STEPS},
                "groups_per_step": 8 if base in (Base.SFT, Base.DPO) else 4,
                "checkpoint_every": 5,
                "optimizer": {"lr": rate},
            }
        ],
    }


def _method(base: Base) -> dict[str, Any]:
    if base is Base.SFT:
        return {"data": {"path": "demos.jsonl"}}
    if base is Base.DPO:
        return {"data": {"path": "pairs.jsonl"}}
    rollouts = {"tasks": ["products"], "max_new_tokens": ANSWER}
    if base is Base.GRPO:
        return {**rollouts, "group_size": 8}
    return {**rollouts, "teachers": {"*": "path:teacher"}, "group_size": 4}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
