"""From specifications to live objects: the one place where the kinds of parts meet."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.chat import ChatRenderer
from posttrain.composition import (
    Dataset,
    GroupAdvantage,
    ReferenceLogprobs,
    SignalSpec,
    SourceSpec,
    TeacherDistribution,
)
from posttrain.errors import ModelError
from posttrain.objectives.objective import Objective
from posttrain.plan import PlannedStage
from posttrain.protocols import Learner, Policy, Signal, Source
from posttrain.signals.credit import GroupAdvantageSignal
from posttrain.signals.scoring import ReferenceSignal, TeacherSignal
from posttrain.signals.verifier import Verifier
from posttrain.sources.dataset import DatasetSource
from posttrain.sources.rollout import RolloutSource
from posttrain.stage import Parts
from posttrain.task import TaskSet


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workshop:
    """What building a stage needs from its run."""

    root: Path
    seed: int
    tasksets: Mapping[str, TaskSet]
    policy: Callable[[str], Policy]  # frozen policy behind a reference

    def parts(self, planned: PlannedStage, learner: Learner) -> Parts:
        """Build a stage around its learner."""
        composition = planned.composition
        # The stage's own stream of randomness, the same in every sitting.
        seed = zlib.crc32(f"{self.seed}/{planned.spec.name}".encode())
        return Parts(
            source=self._source(composition.source, planned, learner.policy, seed=seed),
            signals=[self._signal(s, planned, learner.policy) for s in composition.signals],
            terms=composition.terms,
            objective=Objective(composition.terms),
            learner=learner,
        )

    def _source(
        self, spec: SourceSpec, planned: PlannedStage, live: Policy, *, seed: int
    ) -> Source:
        if isinstance(spec, Dataset):
            return self.dataset(spec, live, seed=seed)
        own = spec.policy == "learner"
        policy = live if own else self._grader(_resolve(spec.policy, planned), live)
        return RolloutSource(spec, self.tasksets, policy, seed)

    def dataset(self, spec: Dataset, policy: Policy, *, seed: int = 0) -> DatasetSource:
        """A data set, rendered for a policy and checked row by row.

        Raises:
            DataError: a row that cannot be used; names the file and the row.
        """
        assert isinstance(policy.renderer, ChatRenderer)
        return DatasetSource(
            spec, root=self.root, renderer=policy.renderer, context=policy.context, seed=seed
        )

    def _signal(self, spec: SignalSpec, planned: PlannedStage, live: Policy) -> Signal:
        if isinstance(spec, GroupAdvantage):
            return GroupAdvantageSignal(spec)
        if isinstance(spec, ReferenceLogprobs):
            return ReferenceSignal(self._grader(_resolve(spec.policy, planned), live))
        if isinstance(spec, TeacherDistribution):
            teachers = {
                ref: self._grader(_resolve(ref, planned), live) for ref in spec.routes.values()
            }
            return TeacherSignal(spec, teachers)
        return Verifier(self.tasksets, live.renderer)

    def _grader(self, ref: str, live: Policy) -> Policy:
        """A frozen policy whose token ids mean what the learner's mean."""
        policy = self.policy(ref)
        if policy.vocabulary != live.vocabulary:
            raise ModelError(
                f"{policy.producer.name} and the learner have different vocabularies",
                expected="the same tokenizer and the same number of output rows",
                fix="use a teacher or reference of the same family",
            )
        return policy


def _resolve(ref: str, planned: PlannedStage) -> str:
    return planned.init if ref == "input" else ref
