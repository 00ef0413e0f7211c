"""The training loop. Every method uses it: only the parts differ.

    step ──▶ source.draw ──▶ groups ──▶ signals ──▶ columns ──▶ admit ──▶ pack ──▶ learner.step
              │ waits for:               │ waits for:            │                    │
              │ the policy's sampler     │ verifiers,            │ legality and       │ forward,
              │ (rollouts) or nothing    │ references, teachers  │ staleness          │ backward
              │ (data sets)              │                       │                    ▼
              └──────────── on one device the sampler *is* the learner ◀──────── new weights

All randomness is a pure function of (seed, step), so a checkpoint between two draws needs only the
state of the learner and of the ``stateful`` parts, and resumes bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from posttrain.core import clock
from posttrain.core.errors import Interrupted
from posttrain.core.events import AlarmRaised, Observer, StepDone
from posttrain.core.learner import Optimizer
from posttrain.core.monitors import Watch
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, End, Group
from posttrain.numerics.batch import PackedBatch, pack
from posttrain.parts.base import Term
from posttrain.parts.legality import Admission, admit, column_readers, readouts
from posttrain.parts.tools import Score
from posttrain.protocols import Learner, Objective, Stateful, Stream
from posttrain.recipe import Stage
from posttrain.training.authors import author_metrics
from posttrain.training.draw_metrics import mismatch_metrics, value_metrics

STRETCH = 2
"""A group is not split up to this multiple of the learner's default micro-batch: memory allows it,
and a split prompt is computed twice. A ``micro_batch_tokens`` in the recipe is never exceeded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """The live objects of a stage, built from its composition."""

    source: Stream
    signals: Sequence[Score]
    terms: Sequence[Term]
    objective: Objective
    learner: Learner
    stateful: Sequence[Stateful] = ()  # saved in checkpoints beside the learner


class StageLog(Protocol):
    """Where a stage records checkpoints, metrics and trajectories, consistently."""

    def resume(self, learner: Learner, *also: Stateful) -> int:
        """Load the last checkpoint, if there is one; returns the step to resume from."""
        ...

    def metrics(self) -> Sequence[Mapping[str, float]]:
        """The metrics of every committed step, in order."""
        ...

    def record(self, step: int, admission: Admission, metrics: Mapping[str, float]) -> None:
        """Record one step: trajectories trained on, those discarded and why, and its metrics."""
        ...

    def commit(self, step: int, learner: Learner, *also: Stateful) -> None:
        """Make everything up to ``step`` durable, atomically."""
        ...


def run_stage(
    stage: Stage,
    parts: Parts,
    *,
    steps: int,
    journal: StageLog,
    observe: Observer,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Take optimiser steps until the budget ends, starting from the journal's last checkpoint.

    Args:
        stage: the configuration.
        parts: the objects built from it.
        steps: the budget in optimiser steps.
        journal: checkpoints, trajectories and ledger rows of this stage.
        observe: called with every event.
        stop: called after every draw; True commits and raises ``Interrupted``.
    """
    run = _Run(stage, parts, steps, journal, observe, Watch(stage.monitors))
    updates = stage.updates_per_draw
    step = committed = journal.resume(parts.learner, *parts.stateful)
    for line in journal.metrics():
        run.watch.see(int(line["step"]), line)  # alarms of earlier processes were shown already
    clock.drain()  # time before the first step does not count to it
    clock.drain_counts()
    while step < steps:
        with clock.timed("draw"):
            groups = parts.source.draw(stage.groups_per_step, step=step // updates)
        with clock.timed("score"):
            for signal in parts.signals:
                groups = signal(groups)
        # A draw cannot be repeated after an update, so checkpoints are only between draws.
        for update in range(min(updates, steps - step)):
            run.update(groups[update::updates], step=step)
            step += 1
            parts.source.publish(step)
        halt = stop()
        if step - committed >= stage.checkpoint_every or step >= steps or halt:
            with clock.timed("journal"):
                journal.commit(step, parts.learner, *parts.stateful)
            committed = step
        if halt and step < steps:
            raise Interrupted(f"stage {stage.name} at step {step} of {steps}")


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The context of every update of a stage."""

    stage: Stage
    parts: Parts
    steps: int
    journal: StageLog
    observe: Observer
    watch: Watch

    def update(self, groups: Sequence[Group], *, step: int) -> None:
        """One optimiser step on its share of a draw."""
        stage, learner = self.stage, self.parts.learner
        objective = self.parts.objective.at(step=step, steps=self.steps, state=learner.state)
        with clock.timed("pack"):
            # Age is measured at consumption: a draw is one version old at its second update.
            admission = admit(
                groups,
                self.parts.terms,
                version=learner.policy.version,
                max_age=stage.max_age + stage.updates_per_draw - 1,
            )
            batches = micro_batches(stage, self.parts, admission.kept)
        scale = lr_scale(stage.optimizer, step=step, steps=self.steps)
        report = learner.step(batches, objective, lr_scale=scale)
        seconds = clock.drain()
        metrics = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": stage.optimizer.lr * scale,
            "tokens": float(report.num_tokens),
            **author_metrics(report.metrics),
            **objective.moving,
            **group_metrics(admission),
            **clock.drain_counts(),
            **{f"{clock.PREFIX}{name}": value for name, value in seconds.items()},
        }
        with clock.timed("journal"):
            self.journal.record(step, admission, metrics)
        for alarm in self.watch.see(step, metrics):
            self.observe(
                AlarmRaised(stage=stage.name, step=step, words=alarm.words, advice=alarm.advice)
            )
        self.observe(
            StepDone(
                stage=stage.name,
                step=step + 1,
                steps=self.steps,
                seconds=sum(seconds.values()),
                num_tokens=report.num_tokens,
                metrics=metrics,
            )
        )


def micro_batches(stage: Stage, parts: Parts, groups: Sequence[Group]) -> list[PackedBatch]:
    """Groups packed for the learner, with the columns that the terms read."""
    named, own = stage.micro_batch_tokens, parts.learner.micro_batch_tokens
    return pack(
        groups,
        needs=column_readers(parts.terms),
        max_tokens=named or own,
        group_tokens=named or STRETCH * own,
        whole=Stat.SCORE in readouts(parts.terms),
    )


def group_metrics(admission: Admission) -> Mapping[str, float]:
    """Rewards, lengths and staleness of a draw, independent of the loss.

    ``zero_variance`` is the share of groups whose rewards are all equal, split into
    ``all_wrong`` (no reward above 0) and ``all_right``. ``age`` is how many updates ago a group
    was drawn, on average.
    """
    drawn = len(admission.fresh) + len(admission.stale)
    metrics = {"groups": float(drawn), "age": admission.age}
    if admission.stale:
        metrics["stale_groups"] = float(len(admission.stale))
        metrics["stale_share"] = len(admission.stale) / drawn
    for reason, groups in admission.discarded.items():
        metrics[f"discarded/{reason}"] = float(sum(len(g.members) for g in groups))
    rewards = [
        np.array([float(m.columns[Column.REWARD]) for m in g.members])
        for g in admission.fresh
        if all(Column.REWARD in m.columns for m in g.members)
    ]
    lengths = [int(m.trajectory.trainable.sum()) for g in admission.fresh for m in g.members]
    if lengths:
        metrics["completion_tokens"] = float(np.mean(lengths))
        ends = [m.trajectory.end for g in admission.fresh for m in g.members]
        metrics["truncated_share"] = sum(e is not End.COMPLETED for e in ends) / len(ends)
    if rewards:
        flat = [r for r in rewards if (r == r[0]).all()]
        metrics["reward"] = float(np.mean([r.mean() for r in rewards]))
        metrics["zero_variance"] = len(flat) / len(rewards)
        metrics["all_wrong"] = sum(r[0] <= 0 for r in flat) / len(rewards)
        metrics["all_right"] = metrics["zero_variance"] - metrics["all_wrong"]
    metrics.update(mismatch_metrics(admission.kept))
    metrics.update(value_metrics(admission.kept))
    return metrics


def lr_scale(optimizer: Optimizer, *, step: int, steps: int) -> float:
    """Factor of the learning rate at a step: linear warm-up, then the schedule down to 0.

    Example:
        >>> [lr_scale(Optimizer(warmup_steps=2), step=s, steps=4) for s in range(4)]
        [0.5, 1.0, 1.0, 1.0]
        >>> [lr_scale(Optimizer(schedule="linear"), step=s, steps=4) for s in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    if step < optimizer.warmup_steps:
        return (step + 1) / optimizer.warmup_steps
    left = 1 - (step - optimizer.warmup_steps) / max(steps - optimizer.warmup_steps, 1)
    if optimizer.schedule == "linear":
        return left
    if optimizer.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return 1.0
