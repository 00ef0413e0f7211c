"""LLM post-training as structured intervention on model behaviour.

A Stage draws groups of Trajectories from a Source, lets Signals write columns beside them, packs
them, and lets a Learner take steps on an Objective until a Budget ends; Probes measure, Gates
decide, the Ledger remembers.

    >>> from posttrain import Recipe
    >>> Recipe(name="nothing", model="org/model").stages
    ()

Importing this package loads nothing: every name is looked up when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.core.errors import PosttrainError
    from posttrain.core.learner import Lora, Optimizer
    from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
    from posttrain.core.sampling import SamplingSpec
    from posttrain.core.task import Message, Task, TaskSet
    from posttrain.core.trajectory import Column, End, Group, Scored, Trajectory
    from posttrain.measure.gates import Gate
    from posttrain.measure.spec import Measure
    from posttrain.parts.composition import Compose, Composition, method
    from posttrain.parts.distillation.presets import Opd
    from posttrain.parts.policy.presets import Grpo
    from posttrain.parts.sources.dataset import Dataset
    from posttrain.parts.sources.rollouts import Rollouts
    from posttrain.parts.supervised.presets import Sft
    from posttrain.recipe import Budget, Recipe, Stage, load_recipe
    from posttrain.tasks.jsonl import JsonlTasks
    from posttrain.tasks.reasoning_gym import ReasoningGym

__all__ = [
    "Budget",
    "Column",
    "Compose",
    "Composition",
    "Dataset",
    "End",
    "Gate",
    "Group",
    "Grpo",
    "JsonlTasks",
    "Kind",
    "Lora",
    "Measure",
    "Message",
    "Opd",
    "Optimizer",
    "PosttrainError",
    "Producer",
    "ReasoningGym",
    "Recipe",
    "Role",
    "Rollouts",
    "Sampling",
    "SamplingSpec",
    "Scored",
    "Sft",
    "Span",
    "Stage",
    "Task",
    "TaskSet",
    "Trajectory",
    "load_recipe",
    "method",
]

_HOMES = {
    "Budget": "recipe",
    "Column": "core.trajectory",
    "Compose": "parts.composition",
    "Composition": "parts.composition",
    "Dataset": "parts.sources.dataset",
    "End": "core.trajectory",
    "Gate": "measure.gates",
    "Group": "core.trajectory",
    "Grpo": "parts.policy.presets",
    "JsonlTasks": "tasks.jsonl",
    "Kind": "core.provenance",
    "Lora": "core.learner",
    "Measure": "measure.spec",
    "Message": "core.task",
    "Opd": "parts.distillation.presets",
    "Optimizer": "core.learner",
    "PosttrainError": "core.errors",
    "Producer": "core.provenance",
    "ReasoningGym": "tasks.reasoning_gym",
    "Recipe": "recipe",
    "Role": "core.provenance",
    "Rollouts": "parts.sources.rollouts",
    "Sampling": "core.provenance",
    "SamplingSpec": "core.sampling",
    "Scored": "core.trajectory",
    "Sft": "parts.supervised.presets",
    "Span": "core.provenance",
    "Stage": "recipe",
    "Task": "core.task",
    "TaskSet": "core.task",
    "Trajectory": "core.trajectory",
    "load_recipe": "recipe",
    "method": "parts.composition",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(import_module(f"posttrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
