"""Rollouts: groups of completions that a policy samples on the training prompts of task sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.composition import Rollouts
from posttrain.core.errors import TaskError
from posttrain.core.protocols import Completion, Policy, Request
from posttrain.core.provenance import Role, Sampling, Span
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import Column, End, Group, Scored, Trajectory
from posttrain.sources.company import NOTHING, Opening, check_tasks, openings, spans_of


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
    rival: Policy | None = None

    def __post_init__(self) -> None:
        for name in self.spec.tasks if self.spec.company else ():
            check_tasks(self.spec.company, self.tasksets[name].train)

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """``num_groups`` groups of ``group_size`` rollouts."""
        first = step * num_groups
        # Set by set: a stage that splits a draw into several updates takes every n-th group, and
        # in alternating order each update would see some task sets only.
        places = sorted(range(num_groups), key=lambda i: (first + i) % len(self.spec.tasks))
        tasks = [self._task(first + i) for i in places]
        size = self.spec.group_size
        state = np.random.SeedSequence((self.seed, step))
        seeds = state.generate_state(num_groups * size, np.uint64)
        starts = [
            self._checked(task, opening)
            for i, task in enumerate(tasks)
            for opening in openings(
                self.spec.company,
                task,
                self.policy.renderer,
                size=size,
                draw=step,
                seed=int(seeds[i * size]),
            )
        ]
        samplings = [self.spec.sampling.with_seed(int(s >> np.uint64(1))) for s in seeds]
        completions = self._complete(starts, samplings)
        return [
            Group(
                task=task.key,
                members=tuple(
                    self._scored(task, starts[j], samplings[j], completions[j])
                    for j in range(i * size, (i + 1) * size)
                ),
            )
            for i, task in enumerate(tasks)
        ]

    def _checked(self, task: Task, opening: Opening) -> Opening:
        if len(opening.reads) >= self._author(opening).context and not opening.whole:
            raise TaskError(
                f"the prompt of {task.key} has {len(opening.reads)} tokens",
                expected=f"fewer than the model's context of {self._author(opening).context}",
                fix="shorten the task's prompts, or use a model with a longer context",
            )
        return opening

    def _author(self, opening: Opening) -> Policy:
        return self.rival if opening.by_rival and self.rival is not None else self.policy

    def _complete(
        self, starts: Sequence[Opening], samplings: Sequence[Sampling]
    ) -> list[Completion | None]:
        """What each policy writes, all of its members together; None where nothing is left."""
        out: list[Completion | None] = [None] * len(starts)
        for by_rival in (False, True):
            asked = [i for i, s in enumerate(starts) if s.by_rival == by_rival and not s.whole]
            if not asked:
                continue
            requests = [
                Request(
                    prompt=starts[i].reads,
                    sampling=samplings[i],
                    max_new_tokens=self.spec.max_new_tokens,
                )
                for i in asked
            ]
            answers = self._author(starts[asked[0]]).generate(requests)
            for i, answer in zip(asked, answers, strict=True):
                out[i] = answer
        return out

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
        self, task: Task, opening: Opening, sampling: Sampling, completion: Completion | None
    ) -> Scored:
        given = opening.given[0] if opening.given else NOTHING
        written = completion.tokens if completion else NOTHING
        span = self._span(opening, sampling, completion) if completion else None
        start = len(opening.prompt.tokens)
        trajectory = Trajectory(
            task=task.key,
            tokens=np.concatenate([opening.prompt.tokens, given, written]).astype(np.int32),
            prompt_length=start if opening.learn else start + len(given),
            spans=spans_of(opening, span),
            end=completion.end if completion else End.COMPLETED,
        )
        behaviour = {Column.BEHAVIOUR_LOGPROB: trajectory.behaviour_logprobs}
        return Scored(trajectory=trajectory, columns=behaviour)

    def _span(self, opening: Opening, sampling: Sampling, completion: Completion) -> Span:
        author = self._author(opening)
        version = author.version
        return Span(
            length=len(completion.tokens),
            role=Role.ASSISTANT,
            producer=author.producer,
            versions=None if version is None else (version, version),
            sampling=sampling,
            # After another prompt than the recorded one they are not those of this text.
            logprobs=None if opening.told else completion.logprobs,
        )
