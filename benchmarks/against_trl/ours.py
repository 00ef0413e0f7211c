"""posttrain's side: the real stage loop and journal, on a plan, without checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from against_trl import reward
from against_trl.plan import Job, Steps
from posttrain.core import clock
from posttrain.core.events import Event, StepDone
from posttrain.core.learner import Optimizer
from posttrain.core.trajectory import Column, Group
from posttrain.engines.local.engine import LocalEngine
from posttrain.parts.composition import method
from posttrain.parts.distillation.presets import Opd
from posttrain.parts.legality import admit
from posttrain.parts.policy.presets import Grpo
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Sft
from posttrain.protocols import Learner, Policy
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.build import StageBuilder
from posttrain.run.folder import RunFolder
from posttrain.run.journal import Journal
from posttrain.run.plan import PlannedStage, make_plan
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.training.stage import micro_batches, run_stage

STALE = 0.3
"""Standard deviation of the noise on the old log-probs of the case that clips."""

CLIP = (0.8, 1.2)
"""Where both libraries clip a ratio."""

STEPS = 10**6  # more than anybody waits for: the gate ends the run


def recipe(job: Job) -> Recipe:
    """The recipe of one stage that a user would write for this work."""
    load = job.load
    rollouts = {"tasks": ("words",), "group_size": load.group_size}
    length = {"max_new_tokens": load.completion_tokens}
    if job.work == "sft":
        chosen = Sft(data=Dataset(path="documents.jsonl"))
    elif job.work == "dpo":
        chosen = method("dpo", data=Dataset(path="pairs.jsonl"))
    elif job.work == "grpo":
        chosen = Grpo(**rollouts, **length)
    else:
        chosen = Opd(**rollouts, **length, teachers={"*": "path:teacher"})
    size = job.ours.micro_batch_tokens
    micro = {} if size is None else {"micro_batch_tokens": size}
    stage = Stage(
        name=job.work.replace("_", "-"),
        method=chosen,
        budget=Budget(steps=STEPS),
        optimizer=Optimizer(
            lr=job.learning_rate, betas=(0.9, 0.999), max_grad_norm=job.max_grad_norm
        ),
        groups_per_step=load.groups,
        **micro,
        checkpoint_every=STEPS,
    )
    given = job.work in ("sft", "dpo")
    words = JsonlTasks(
        path="prompts.jsonl", reward=f"{Path(reward.__file__)}:even_words", held_out=1
    )
    return Recipe(
        name="bench",
        model="model" if given else "endless",
        tasks={} if given else {"words": words},
        stages=(stage,),
        threads=job.threads,
    )


def build(job: Job) -> tuple[PlannedStage, StageBuilder, Learner]:
    """The planned stage, what builds its parts, and its learner."""
    wanted, root = recipe(job), Path(job.folder)
    engine = LocalEngine(device=torch.device(job.device), dtype=job.dtype)
    plan = make_plan(wanted, root=root, base="bench")
    (planned,) = plan.stages
    student = str(root / wanted.model)

    def policy(ref: str) -> Policy:
        return engine.policy(student if ref == "base" else str(root / ref.removeprefix("path:")))

    tasksets = {
        name: spec.build(name, root=root, chat=False) for name, spec in wanted.tasks.items()
    }
    learner = engine.learner(
        student, name="bench", optimizer=planned.spec.optimizer, lora=None, seed=0
    )
    builder = StageBuilder(root=root, seed=wanted.seed, tasksets=tasksets, policy=policy)
    return planned, builder, learner


def one_step(job: Job, *, stale: bool) -> tuple[Sequence[Group], float, Mapping[str, Tensor]]:
    """A draw, the loss of one step on it, and the gradients; no weight moves."""
    planned, builder, learner = build(job)
    parts = builder.parts(planned, learner)
    groups = parts.source.draw(job.load.groups, step=0)
    for signal in parts.signals:
        groups = signal(groups)
    if stale:
        groups = _aged(groups)
    admission = admit(groups, parts.terms, version=learner.policy.version, max_age=0)
    batches = micro_batches(planned.spec, parts, admission.kept)
    report = learner.step(batches, parts.objective.at(step=0, steps=1), lr_scale=0.0)
    return groups, report.loss, gradients(learner.policy.model.causal)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """By name of the weight, in double precision."""
    found = {n: p.grad.detach().double() for n, p in model.named_parameters() if p.grad is not None}
    if not found:
        raise ValueError("no weight kept its gradient after the step")
    return found


def _aged(groups: Sequence[Group]) -> list[Group]:
    """The same groups as if an older policy had written them.

    No ratio lies within rounding of a clip bound, where one library clips and the other does not:
    that would be a difference of one token's whole gradient.
    """
    rng = np.random.default_rng(0)
    aged = []
    for group in groups:
        members = []
        for member in group.members:
            old = member.columns[Column.BEHAVIOUR_LOGPROB]
            noise = rng.normal(0, STALE, old.shape).astype(np.float32)
            for bound in CLIP:
                noise[np.abs(np.exp(-noise) - bound) < 1e-3] = 0.0
            members.append(member.with_columns({Column.BEHAVIOUR_LOGPROB: old + noise}))
        aged.append(Group(task=group.task, members=tuple(members)))
    return aged


def train(job: Job, gate: Steps) -> None:
    """Run the stage until the gate stops it."""
    planned, builder, learner = build(job)
    parts = builder.parts(planned, learner)

    def observe(event: Event) -> None:
        if isinstance(event, StepDone):
            # What a data set holds: the last token of a text is a target and never computed.
            texts = job.load.groups if job.work == "sft" else 0
            tokens = event.metrics["tokens"] + texts
            gate.step_done({**clock.seconds_in(event.metrics), "tokens": tokens})
            clock.drain()  # waiting at the gate is no part of the next step

    folder = Path(job.folder) / "journal" / job.work
    shutil.rmtree(folder, ignore_errors=True)
    with RunFolder(folder).lock() as writer:
        journal = Journal(
            writer.stage_writer(planned.spec.name, planned.identity),
            stage=planned.spec.name,
            identity=planned.identity,
            facts={},
        )
        gate.open()
        run_stage(planned.spec, parts, steps=STEPS, journal=journal, observe=observe)
