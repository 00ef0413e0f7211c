"""From specifications to live objects: the one place where the kinds of parts meet."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.chat import ChatRenderer
from posttrain.composition import (
    MOVING,
    Dataset,
    Gae,
    Judge,
    Mix,
    Redraw,
    ReferenceLogprobs,
    RewardModel,
    Rollouts,
    SignalSpec,
    SourceSpec,
    StepLabels,
    TeacherLogprobs,
    parts_of,
)
from posttrain.composition.company import Rival
from posttrain.composition.credit import CreditSpec
from posttrain.composition.offline import OfflineSignal
from posttrain.composition.preference_signals import PreferenceSignal
from posttrain.composition.reward_models import RewardModelSignal
from posttrain.composition.teaching import TeachingSpec
from posttrain.core.protocols import Learner, Policy, Signal, Source
from posttrain.core.task import Task, TaskSet
from posttrain.extensions import SignalTools, signal_extension
from posttrain.legality import compared_in_the_loss, scopes
from posttrain.numerics.logits import Head
from posttrain.run.plan import PlannedStage
from posttrain.signals.gae import GaeSignal
from posttrain.signals.memory import Memory
from posttrain.signals.offline import offline_signal
from posttrain.signals.parts import credit_signal
from posttrain.signals.preference import preference_signal
from posttrain.signals.process import ProcessScores, StepLabelsByRollout
from posttrain.signals.reward_model import InTurn, RewardModelScores
from posttrain.signals.scope import ScopedSignal
from posttrain.signals.scoring import ReferenceSignal, check_same_tokens
from posttrain.signals.teaching import teaching_signal
from posttrain.signals.verifier import Verifier
from posttrain.sources.dataset import DatasetSource
from posttrain.sources.mix import MixSource
from posttrain.sources.redraw import RedrawSource
from posttrain.sources.rollout import RolloutSource
from posttrain.training.objective import Objective
from posttrain.training.stage import Parts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workshop:
    """What building a stage needs from its run."""

    root: Path
    seed: int
    tasksets: Mapping[str, TaskSet]
    policy: Callable[[str], Policy]  # frozen policy behind a reference
    memory: Memory | None = None  # of what frozen policies said, where trajectories come again
    heads: Mapping[str, Head] = field(default_factory=dict)  # of teachers, where states are enough

    def parts(self, planned: PlannedStage, learner: Learner) -> Parts:
        """Build a stage around its learner."""
        own = {MOVING: learner.moving, planned.init: learner.start}
        found = {ref: policy for ref, policy in own.items() if policy is not None}
        shop = replace(
            self,
            policy=lambda ref: found[ref] if ref in found else self.policy(ref),
            memory=Memory() if _comes_again(planned) else None,
        )
        heads = shop._teacher_heads(planned)
        return replace(shop, heads=heads)._parts(planned, learner)

    def _parts(self, planned: PlannedStage, learner: Learner) -> Parts:
        composition = planned.composition
        # The stage's own stream of randomness, the same in every process.
        seed = zlib.crc32(f"{self.seed}/{planned.spec.name}".encode())
        return Parts(
            source=self._source(composition.source, planned, learner.policy, seed=seed),
            signals=self._signals(planned, learner.policy),
            terms=composition.terms,
            objective=Objective(composition.terms, teachers=tuple(self.heads.values())),
            learner=learner,
            stateful=() if self.memory is None else (self.memory,),
        )

    def _source(
        self, spec: SourceSpec, planned: PlannedStage, live: Policy, *, seed: int
    ) -> Source:
        if isinstance(spec, Dataset):
            return self.dataset(spec, live, seed=seed)
        if isinstance(spec, Mix):
            seeds = (zlib.crc32(f"{seed}/{index}".encode()) for index in range(len(spec.parts)))
            parts = zip(spec.parts, seeds, strict=True)
            return MixSource(spec, [self._source(p, planned, live, seed=own) for p, own in parts])
        if isinstance(spec, Redraw):
            judges = [self._signal(s, planned, live) for s in spec.keep]
            return RedrawSource(spec, self._source(spec.source, planned, live, seed=seed), judges)
        own = spec.policy == "learner"
        policy = live if own else self._grader(_resolve(spec.policy, planned), live)
        rival = None
        if isinstance(spec.company, Rival):
            rival = self._grader(_resolve(spec.company.policy, planned), live)
        return RolloutSource(spec, self.tasksets, policy, seed, rival)

    def dataset(self, spec: Dataset, policy: Policy, *, seed: int = 0) -> DatasetSource:
        """A data set, rendered for a policy and checked row by row.

        Raises:
            DataError: a row that cannot be used; names the file and the row.
        """
        assert isinstance(policy.renderer, ChatRenderer)
        return DatasetSource(
            spec, root=self.root, renderer=policy.renderer, context=policy.context, seed=seed
        )

    def _signals(self, planned: PlannedStage, live: Policy) -> list[Signal]:
        composition = planned.composition
        signals = [self._signal(s, planned, live) for s in composition.signals]
        if not isinstance(composition.source, Mix):
            return signals
        kinds = scopes(composition)
        return [ScopedSignal(s, k) for s, k in zip(signals, kinds, strict=True)]

    def _signal(self, spec: SignalSpec, planned: PlannedStage, live: Policy) -> Signal:
        if (extension := signal_extension(spec)) is not None:
            asked = {
                ref: self._grader(_resolve(ref, planned), live)
                for ref in extension.references(spec)
            }
            tools = SignalTools(tasksets=self.tasksets, renderer=live.renderer, policies=asked)
            return extension.build(spec, tools)
        if isinstance(spec, CreditSpec):
            drawn = [p for p in parts_of(planned.composition.source) if isinstance(p, Rollouts)]
            longest = max((p.max_new_tokens for p in drawn), default=live.context)
            # A baseline's answer is judged as the group's are.
            specs = [s for s in planned.composition.signals if isinstance(s, Judge)]
            judge = InTurn([self._signal(s, planned, live) for s in specs])
            return credit_signal(spec, live=live, judge=judge, max_new_tokens=longest)
        if isinstance(spec, OfflineSignal):
            return offline_signal(spec, live=live)
        if isinstance(spec, PreferenceSignal):
            return preference_signal(
                spec, live=live, frozen=lambda ref: self._grader(_resolve(ref, planned), live)
            )
        if isinstance(spec, RewardModelSignal):
            return self._learnt(spec, planned, live)
        if isinstance(spec, Gae):
            return GaeSignal(spec, live)
        if isinstance(spec, ReferenceLogprobs):
            reference = self._grader(_resolve(spec.policy, planned), live)
            return ReferenceSignal(reference, self.memory)
        if isinstance(spec, TeachingSpec):
            return teaching_signal(
                spec,
                live=live,
                judge=lambda r: (
                    live if r == "learner" else self._grader(_resolve(r, planned), live)
                ),
                stranger=lambda r: self.policy(_resolve(r, planned)),
                tasks=self._tasks(planned),
                memory=self.memory,
                heads={ref: number for number, ref in enumerate(self.heads)},
            )
        return Verifier(self.tasksets, live.renderer)

    def _learnt(self, spec: RewardModelSignal, planned: PlannedStage, live: Policy) -> Signal:
        """Judges that are learnt, and what labels the steps that they learn from."""
        if isinstance(spec, StepLabels):
            own = spec.policy == "learner"
            return StepLabelsByRollout(
                spec,
                policy=live if own else self._grader(_resolve(spec.policy, planned), live),
                judge=Verifier(self.tasksets, live.renderer),
                success={name: tasks.success for name, tasks in self.tasksets.items()},
                renderer=live.renderer,
                seed=zlib.crc32(f"{self.seed}/{planned.spec.name}/step_labels".encode()),
            )
        model = self._grader(_resolve(spec.model, planned), live)
        if isinstance(spec, RewardModel):
            return RewardModelScores(spec, model)
        return ProcessScores(spec, model, live.renderer)

    def _teacher_heads(self, planned: PlannedStage) -> Mapping[str, Head]:
        """Heads of the teachers of whom hidden states are enough, by reference and in order."""
        heads = dict[str, Head]()
        for ref in compared_in_the_loss(planned.composition):
            hidden = self.policy(_resolve(ref, planned)).hidden
            if hidden is not None:
                heads[ref] = hidden.head
        return heads

    def _grader(self, ref: str, live: Policy) -> Policy:
        """A frozen policy whose token ids mean what the learner's mean."""
        policy = self.policy(ref)
        check_same_tokens(policy, live)
        return policy

    def _tasks(self, planned: PlannedStage) -> Mapping[str, Task]:
        """The training tasks that a stage may draw, by key."""
        parts = parts_of(planned.composition.source)
        names = [t for p in parts if isinstance(p, Rollouts) for t in p.tasks]
        return {task.key: task for name in names for task in self.tasksets[name].train}


def _comes_again(planned: PlannedStage) -> bool:
    """Whether frozen policies read trajectories of a data set, which has epochs."""
    composition = planned.composition
    reads = any(isinstance(s, ReferenceLogprobs | TeacherLogprobs) for s in composition.signals)
    return reads and any(isinstance(p, Dataset) for p in parts_of(composition.source))


def _resolve(ref: str, planned: PlannedStage) -> str:
    return planned.init if ref == "input" else ref
