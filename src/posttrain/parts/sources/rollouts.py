"""Rollouts: groups of completions that a policy samples on the training prompts of task sets.

(seed, step) ──▶ tasks ──openings──▶ prompts ──sampler, rival──▶ completions ──▶ groups
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np

from posttrain.core.bounds import Size, Tokens
from posttrain.core.config import plain
from posttrain.core.errors import ConfigError, TaskError
from posttrain.core.provenance import Kind, Role, Sampling, Span
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import Column, End, Group, Scored, Trajectory
from posttrain.parts.base import LEARNER, NONE, Columns, PlanFacts, PolicyRef, Source
from posttrain.parts.registry import part, tag_of
from posttrain.parts.sources.members import NO_TOKENS, AnyMember, Opening, openings, spans_of
from posttrain.parts.tools import Tools
from posttrain.protocols import Completion, PureStream, Request, Sampler


@part
class Rollouts(Source):
    """Groups of completions sampled from a policy on the training prompts of task sets.

    With ``policy: learner`` this is on-policy; any other policy is frozen, hence off-policy.
    ``members`` makes the last members of every group special: ``guided``, ``rival`` or ``hinted``.
    """

    tasks: tuple[str, ...]
    policy: PolicyRef = "learner"
    group_size: Size = 8
    max_new_tokens: Tokens = 64
    sampling: SamplingSpec = SamplingSpec()
    members: AnyMember | None = None

    may_ask_learner: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(
                f"rollouts over tasks={list(self.tasks)}",
                expected="at least one task set, and each once",
            )
        if self.members is not None:
            self._check_members(self.members)

    def _check_members(self, members: AnyMember) -> None:
        most = self.group_size - (1 if members.rival is not None else 0)
        if members.count is not None and not 1 <= members.count <= most:
            raise ConfigError(
                f"{tag_of(members)} with count={members.count} of group_size={self.group_size}",
                expected=f"from 1 to {most}",
            )
        if members.rival == self.policy or (
            members.rival is None and members.writer is self._sampled
        ):
            raise ConfigError(
                f"rollouts of {self.policy} with members {members}",
                expected="another author: terms tell members apart by who wrote them",
            )

    @property
    def _sampled(self) -> Kind:
        return Kind.LEARNER if self.policy == LEARNER else Kind.TEACHER

    @property
    def writes(self) -> frozenset[Kind]:
        """The live learner or a frozen policy, and other authors of trained tokens."""
        other = None if self.members is None else self.members.writer
        return frozenset({self._sampled} if other is None else {self._sampled, other})

    def provides_for(self, kind: Kind) -> Columns:
        """Log-probs of the sampling distribution, for authors whose tokens were sampled."""
        known = self.members is None or self.members.sampled_from_prompt(
            kind, sampled=self._sampled
        )
        return frozenset({Column.BEHAVIOUR_LOGPROB}) if known else NONE

    @property
    def draws_from(self) -> tuple[str, ...]:
        """The task sets."""
        return self.tasks

    @property
    def sampled(self) -> SamplingSpec | None:
        """How the policy is sampled."""
        return self.sampling

    @property
    def longest(self) -> int | None:
        """The token budget of an answer."""
        return self.max_new_tokens

    @property
    def origin(self) -> str:
        """The policy of the rollouts."""
        others = "" if self.members is None else f", {tag_of(self.members)}"
        if self.policy == LEARNER:
            return f"the learner's own rollouts{others}"
        return f"rollouts of {self.policy}{others}"

    def references(self) -> tuple[PolicyRef, ...]:
        """The sampled policy, and the rival if any."""
        rival = None if self.members is None else self.members.rival
        return (self.policy,) if rival is None else (self.policy, rival)

    def identity(self, root: Path) -> dict[str, object]:
        """Its options; task sets have their own identity."""
        return plain(self)

    def tokens(self, groups: float, facts: PlanFacts) -> tuple[float, float]:
        """Upper bounds: every answer of the maximum length."""
        lengths = [n for name in self.tasks for n in facts.prompt_lengths(name)]
        prompts = groups * sum(lengths) / len(lengths)
        return prompts, groups * self.group_size * self.max_new_tokens

    def check_task(self, task: Task) -> None:
        """Whether its members can begin: a demonstration or a hint is there."""
        if self.members is not None:
            self.members.check_task(task)

    def open(self, tools: Tools, *, seed: int) -> RolloutStream:
        """A stream of the sampled policy's rollouts."""
        rival = None if self.members is None else self.members.rival
        return RolloutStream(
            self,
            tools.tasksets,
            tools.sampler(self.policy),
            seed,
            None if rival is None else tools.sampler(rival),
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class RolloutStream(PureStream):
    """Draws prompts and samples a group of completions for each.

    Task sets alternate, so draws hold them in equal shares, up to one prompt. Prompts and seeds
    are pure functions of (seed, step): a resumed run draws the same as an uninterrupted one.

    Raises:
        TaskError: a prompt leaves no room for a completion in the model's context.
    """

    spec: Rollouts
    tasksets: Mapping[str, TaskSet]
    policy: Sampler
    seed: int
    rival: Sampler | None = None

    def __post_init__(self) -> None:
        for name in self.spec.tasks:
            for task in self.tasksets[name].train:
                self.spec.check_task(task)

    def draw(self, num_groups: int, *, step: int) -> Sequence[Group]:
        """``num_groups`` groups of ``group_size`` rollouts."""
        first = step * num_groups
        # Set by set: a stage that splits a draw into several updates takes every n-th group; in
        # alternating order an update could miss some task sets.
        places = sorted(range(num_groups), key=lambda i: (first + i) % len(self.spec.tasks))
        tasks = [self._task(first + i) for i in places]
        size = self.spec.group_size
        state = np.random.SeedSequence((self.seed, step))
        seeds = state.generate_state(num_groups * size, np.uint64)
        starts = [
            self._checked(task, opening)
            for i, task in enumerate(tasks)
            for opening in openings(
                self.spec.members,
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

    def _author(self, opening: Opening) -> Sampler:
        return self.rival if opening.by_rival and self.rival is not None else self.policy

    def _complete(
        self, starts: Sequence[Opening], samplings: Sequence[Sampling]
    ) -> list[Completion | None]:
        """Completions, batched per policy; None where the given prefix is the whole answer."""
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
        """The index-th prompt of this stage: task sets alternate, each shuffled by itself."""
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
        given = opening.given[0] if opening.given else NO_TOKENS
        written = completion.tokens if completion else NO_TOKENS
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
            # After another prompt than the recorded one, these log-probs do not apply.
            logprobs=None if opening.hinted else completion.logprobs,
        )
