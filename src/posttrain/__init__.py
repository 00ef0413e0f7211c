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
    from posttrain.composition import Composition, Dataset, Rollouts, SamplingSpec
    from posttrain.core.errors import PosttrainError
    from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
    from posttrain.core.task import Message, Task, TaskSet
    from posttrain.core.trajectory import Column, End, Group, Scored, Trajectory
    from posttrain.measure.gates import Gate
    from posttrain.measure.spec import Measure
    from posttrain.methods import Compose, Dpo, Grpo, Opd, Sft
    from posttrain.recipe import (
        Budget,
        JsonlTasks,
        Lora,
        Optimizer,
        ReasoningGym,
        Recipe,
        Stage,
        load_recipe,
    )

__all__ = [
    "Budget",
    "Column",
    "Compose",
    "Composition",
    "Dataset",
    "Dpo",
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
]

_HOMES = {
    "Budget": "recipe",
    "Column": "core.trajectory",
    "Compose": "methods",
    "Composition": "composition",
    "Dataset": "composition",
    "Dpo": "methods",
    "End": "core.trajectory",
    "Gate": "measure.gates",
    "Group": "core.trajectory",
    "Grpo": "methods",
    "JsonlTasks": "recipe",
    "Kind": "core.provenance",
    "Lora": "recipe",
    "Measure": "measure.spec",
    "Message": "core.task",
    "Opd": "methods",
    "Optimizer": "recipe",
    "PosttrainError": "core.errors",
    "Producer": "core.provenance",
    "ReasoningGym": "recipe",
    "Recipe": "recipe",
    "Role": "core.provenance",
    "Rollouts": "composition",
    "Sampling": "core.provenance",
    "SamplingSpec": "composition",
    "Scored": "core.trajectory",
    "Sft": "methods",
    "Span": "core.provenance",
    "Stage": "recipe",
    "Task": "core.task",
    "TaskSet": "core.task",
    "Trajectory": "core.trajectory",
    "load_recipe": "recipe",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(import_module(f"posttrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
