"""Task sets: prompts with a scorer, split into what may be trained on and what only measures.

TaskSetSpec ──build_taskset──▶ TaskSet: train, held_out, success, score()
"""

from __future__ import annotations

from pathlib import Path

from posttrain.core.task import TaskSet
from posttrain.recipe import ReasoningGym, TaskSetSpec
from posttrain.tasks.jsonl import JsonlTaskSet
from posttrain.tasks.reasoning_gym import ReasoningGymTaskSet

__all__ = ["JsonlTaskSet", "ReasoningGymTaskSet", "build_taskset"]


def build_taskset(name: str, spec: TaskSetSpec, *, root: Path, chat: bool) -> TaskSet:
    """The task set that a recipe describes.

    Args:
        name: what the recipe calls it; the first half of every task key.
        spec: the recipe's description.
        root: the recipe's folder; paths in the description are relative to it.
        chat: make each text prompt one user message. False keeps plain text, for models
            without a chat template.

    Raises:
        TaskError: the set cannot be built, or is too small for the split.
        DataError: a row of a file is malformed.
    """
    if isinstance(spec, ReasoningGym):
        return ReasoningGymTaskSet(name, spec, chat=chat)
    return JsonlTaskSet(name, spec, root=root, chat=chat)
