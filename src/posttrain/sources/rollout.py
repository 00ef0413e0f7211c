"""Rollouts: groups of completions that a policy samples on the training prompts of task sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition import Rollouts
from posttrain.errors import TaskError
from posttrain.protocols import Completion, Policy, Prompt, Request
from posttrain.provenance import Role, Sampling, Span
from posttrain.task import Task, TaskSet
from posttrain.trajectory import Column, Group, Scored, Trajectory


@final
@dataclass(frozen=True, slots=True, eq=False)
class RolloutSource:
    """Draws prompts and samples a group of completions for each.

    Task sets take turns, so draws hold them in equal shares, up to one prompt. Prompts and seeds
    are pure functions of (seed, step): a resumed run draws what the interrupted one would have
    drawn.

    Raises:
        TaskError: a prompt leaves no room for a completion in the model's context.
    """

    spec: Rollouts
    tasksets: Mapping[str, TaskSet]
    policy: Policy
    seed: int

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """``num_groups`` groups of ``group_size`` rollouts."""
        first = step * num_groups
        # Set by set: a stage that splits a draw into several updates takes every n-th group, and
        # in alternating order each update would see some task sets only.
        places = sorted(range(num_groups), key=lambda i: (first + i) % len(self.spec.tasks))
        tasks = [self._task(first + i) for i in places]
        prompts = [self.policy.renderer.prompt(t) for t in tasks]
        for task, prompt in zip(tasks, prompts, strict=True):
            if len(prompt.tokens) >= self.policy.context:
                raise TaskError(
                    f"the prompt of {task.key} has {len(prompt.tokens)} tokens",
                    expected=f"fewer than the model's context of {self.policy.context}",
                    fix="shorten the task's prompts, or use a model with a longer context",
                )
        size = self.spec.group_size
        seeds = np.random.SeedSequence((self.seed, step)).generate_state(
            num_groups * size, np.uint64
        )
        requests = [
            Request(
                prompt=prompts[i // size].tokens,
                sampling=self.spec.sampling.with_seed(int(seed >> np.uint64(1))),
                max_new_tokens=self.spec.max_new_tokens,
            )
            for i, seed in enumerate(seeds)
        ]
        completions = self.policy.generate(requests)
        return [
            Group(
                task=task.key,
                members=tuple(
                    self._scored(task, prompt, requests[j].sampling, completions[j])
                    for j in range(i * size, (i + 1) * size)
                ),
            )
            for i, (task, prompt) in enumerate(zip(tasks, prompts, strict=True))
        ]

    def _task(self, index: int) -> Task:
        """The index-th prompt of this stage: task sets in turn, each in its own shuffled order."""
        names = self.spec.tasks
        train = self.tasksets[names[index % len(names)]].train
        epoch, at = divmod(index // len(names), len(train))
        order = np.random.default_rng((self.seed, epoch, index % len(names))).permutation(
            len(train)
        )
        return train[int(order[at])]

    def _scored(
        self, task: Task, prompt: Prompt, sampling: Sampling, completion: Completion
    ) -> Scored:
        version = self.policy.version
        span = Span(
            length=len(completion.tokens),
            role=Role.ASSISTANT,
            producer=self.policy.producer,
            versions=None if version is None else (version, version),
            sampling=sampling,
            logprobs=completion.logprobs,
        )
        trajectory = Trajectory(
            task=task.key,
            tokens=np.concatenate([prompt.tokens, completion.tokens]).astype(np.int32),
            prompt_length=len(prompt.tokens),
            spans=(*prompt.spans, span),
            end=completion.end,
        )
        behaviour = {Column.BEHAVIOUR_LOGPROB: trajectory.behaviour_logprobs}
        return Scored(trajectory=trajectory, columns=behaviour)
