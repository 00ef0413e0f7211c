"""LLM post-training as structured intervention on model behaviour.

A Stage draws groups of Trajectories from a Source, lets Signals write columns beside them, packs
them, and lets a Learner take steps on an Objective until a Budget ends; Probes measure, Gates
decide, the Ledger remembers.

    >>> from posttrain import Recipe
    >>> Recipe(name="nothing", model="org/model").stages
    ()

Importing this package loads no heavy library.
"""

from posttrain.composition import Composition, Dataset, Rollouts, SamplingSpec
from posttrain.errors import PosttrainError
from posttrain.methods import Compose, Dpo, Grpo, Opd, Sft
from posttrain.provenance import Kind, Producer, Role, Sampling, Span
from posttrain.recipe import (
    Budget,
    Gate,
    JsonlTasks,
    Lora,
    Measure,
    Optimizer,
    ReasoningGym,
    Recipe,
    Stage,
    load_recipe,
)
from posttrain.task import Message, Task, TaskSet
from posttrain.trajectory import Column, End, Group, Scored, Trajectory

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
