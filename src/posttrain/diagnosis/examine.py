"""Examination of a model: every probe that a rule may need, within a budget of rollouts.

held-out prompts ──measure──▶ success, variety, form ─┐
                 ──continue──▶ from part of an answer ┼──▶ Evidence per task set, and its cost
                 ──adaptive──▶ in reach or out        │
earlier policy, scaffold, teacher ──▶ what changed ───┘

Sampling comes first and decides which other probes are worth their rollouts: a solved prompt needs
no continuation, and labels are drawn only where they are undetermined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import msgspec

from posttrain.chat.renderer import ChatRenderer
from posttrain.core.errors import ConfigError, Interrupted, ModelError
from posttrain.core.events import Note, Observer, ignore
from posttrain.core.provenance import Kind, Producer, Role
from posttrain.core.task import Message, Task, TaskSet, with_context
from posttrain.diagnosis.adaptive import AdaptiveDesign, adaptive_support
from posttrain.diagnosis.card import Cost, Evidence
from posttrain.diagnosis.continuation import continuation
from posttrain.diagnosis.drawing import (
    Demonstration,
    demonstration_from,
    draw_answers,
    require_same_vocabulary,
)
from posttrain.diagnosis.drift import policy_distance
from posttrain.diagnosis.exposure import exposure_to_teacher
from posttrain.diagnosis.prescribe import Supplies
from posttrain.diagnosis.scaffold import amortisation_gap
from posttrain.measure.measure import measure_policy
from posttrain.measure.measurement import Measurement, TaskMeasurement
from posttrain.measure.reading import FEWEST, Reading
from posttrain.measure.readings import answer_room, not_taken, take, take_change
from posttrain.measure.registry import Estimation
from posttrain.measure.spec import Measure
from posttrain.protocols import Policy

SAMPLES = 64
"""Samples per prompt of the measurement: the rules need pass@64."""

SHARES = (0.0, 0.25, 0.5, 0.75)
FROM_A_PREFIX = 16
"""Samples per prompt and share of the answer given as a prefix."""

WITH_HELP = 16
"""Samples per prompt with a scaffold."""

UNSOLVED = 5
"""Fewest prompts without a success for which continuations are probed."""

TO_SCORE = 4
"""Answers of the earlier policy per prompt, from which its distance is estimated."""

COULD = 0.5
"""pass@1 of the earlier policy from which a task set counts as solved by it."""

MASTERED = 0.9
"""pass@1 from which the teacher is not consulted."""

REACH = 0.02
"""Success rate from which a prompt counts as in reach: a group of 64 then holds a success with
probability 3/4."""

_ANSWERER = Producer(kind=Kind.EXTERNAL, name="answers")


# --- reference answers and scaffolds -------------------------------------------------------------


@final
class _WithScaffold:
    """A task set whose questions are put into a scaffold; the scorer is unchanged."""

    def __init__(self, taskset: TaskSet, scaffold: str) -> None:
        self.name, self.success = taskset.name, taskset.success
        self.train: Sequence[Task] = ()
        self.held_out = [with_context(t, scaffold) for t in taskset.held_out]
        self._plain = {
            helped.key: t for helped, t in zip(self.held_out, taskset.held_out, strict=True)
        }
        self._score = taskset.score

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        """The scores of the underlying task set."""
        return self._score([self._plain[t.key] for t in tasks], completions)


def reference_answers(policy: Policy, taskset: TaskSet) -> tuple[Demonstration, ...]:
    """The task set's reference answers to its held-out prompts, in the policy's tokens.

    An answer that the scorer does not accept is left out, such as a bare number where reasoning
    is required.
    """
    renderer = policy.renderer
    known = [t for t in taskset.held_out if t.answer]
    if not known or not isinstance(renderer, ChatRenderer):
        return ()
    scores = taskset.score(known, [str(t.answer) for t in known])
    right = [t for t, s in zip(known, scores, strict=True) if s >= taskset.success]
    return tuple(_written_by(renderer, task) for task in right)


def _written_by(renderer: ChatRenderer, task: Task) -> Demonstration:
    if isinstance(task.prompt, str):
        text = renderer.completion(task.prompt, str(task.answer), producer=_ANSWERER, task=task.key)
    else:
        turns = (*task.prompt, Message(role=Role.ASSISTANT, content=str(task.answer)))
        text = renderer.conversation(
            turns,
            producer=_ANSWERER,
            task=task.key,
            assistant_mask="prefix",
            num_prompt=len(task.prompt),
        )
    return demonstration_from(task, text)


# --- the examination ---------------------------------------------------------------------------


@final
@dataclass(slots=True, eq=False)
class Examination:
    """One examination of one policy. Spends at most ``budget`` rollouts.

    Continuations are probed only on prompts without a success: on the others the policy can start
    right by itself.

    ``measured`` is an existing measurement (such as of the run that trained the policy) and costs
    nothing; likewise ``earlier`` of the earlier policy.
    """

    policy: Policy
    tasksets: Sequence[TaskSet]
    spec: Measure  # decoding, confidence and seed
    protocol: str
    supplies: Supplies
    budget: int = 0
    before: Policy | None = None
    teachers: Mapping[str, Policy] = field(default_factory=dict)  # by task set
    measured: Measurement | None = None
    earlier: Measurement | None = None
    labels: bool = True
    references: Callable[[Policy, TaskSet], Sequence[Demonstration]] = reference_answers
    observe: Observer = ignore
    stop: Callable[[], bool] = lambda: False
    rollouts: int = 0
    tokens: int = 0
    scored: int = 0
    began: float = field(default_factory=time.monotonic)

    def evidence(self) -> tuple[Evidence, ...]:
        """All readings, one entry per task set.

        Raises:
            ConfigError: too few prompts, or a budget too small for the measurement.
            Interrupted: ``stop`` returned True.
        """
        self._check()
        now = self._sampled(self.policy, self.measured)
        was = None
        if self.before is not None or self.earlier is not None:
            was = self._sampled(self.before, self.earlier)
        self._say("what a prefix, a scaffold or more samples change")
        found = [
            self._task(t, now.task(t.name), None if was is None else was.task(t.name))
            for t in self.tasksets
        ]
        if not self.labels:
            return tuple(found)
        return tuple(self._labelled(e, t) for e, t in zip(found, self.tasksets, strict=True))

    @property
    def cost(self) -> Cost:
        """The cost so far."""
        return Cost(
            rollouts=self.rollouts,
            sampled_tokens=self.tokens,
            scored_tokens=self.scored,
            seconds=round(time.monotonic() - self.began, 3),
        )

    # --- the measurement ---------------------------------------------------------------------

    def _check(self) -> None:
        for taskset in self.tasksets:
            if len(taskset.held_out) < FEWEST:
                raise ConfigError(
                    f"{taskset.name} has {len(taskset.held_out)} held-out prompts",
                    expected=f"at least {FEWEST}: fewer cannot show how much prompts differ",
                    fix="raise held_out of the task set; 30 or more give useful intervals",
                )
        prompts = sum(len(t.held_out) for t in self.tasksets)
        looks = (self.measured is None) + (self.before is not None and self.earlier is None)
        if self.budget < looks * prompts * SAMPLES:
            raise ConfigError(
                f"a budget of {self.budget} rollouts for {prompts} prompts",
                expected=f"at least {looks * prompts * SAMPLES}: {SAMPLES} samples of each, "
                + ("of two policies" if looks == 2 else "since the rules ask for pass@64"),
                fix="raise the budget, or lower held_out of the task sets",
            )

    def _sampled(self, policy: Policy | None, known: Measurement | None) -> Measurement:
        if known is not None:
            return known
        assert policy is not None
        self._say(f"sampling {policy.producer.name}")
        taken = measure_policy(
            policy.producer.name,
            policy,
            self.tasksets,
            spec=self.spec,
            protocol=self.protocol,
            observe=self.observe,
            stop=self.stop,
        )
        for task in taken.tasks:
            self._spent(task.scores.size, int(task.lengths.sum()))
        return taken

    # --- one task set ------------------------------------------------------------------------

    def _task(
        self, taskset: TaskSet, now: TaskMeasurement, was: TaskMeasurement | None
    ) -> Evidence:
        if self.stop():
            raise Interrupted(f"while {taskset.name} was examined")
        missing = list(not_taken(now))
        how = Estimation(confidence=self.spec.confidence, epsilon=self.spec.threshold)
        found = [*take(now, how)]
        if was is not None:
            found += take_change(was, now, how)
            found += self._drifted(taskset, was, missing)
        else:
            missing.append("retention: no earlier policy was given (--before)")
        known = self.references(self.policy, taskset)
        found += self._room(now, known)
        found += self._continued(taskset, now, known, missing)
        found += self._exposed(taskset, now, missing)
        if self.supplies.scaffold:
            found += self._scaffolded(taskset, now, self.supplies.scaffold, missing)
        else:
            missing.append("amortisation: no scaffold was given (--scaffold)")
        return Evidence(task=taskset.name, readings=tuple(found), missing=tuple(missing))

    def _drifted(
        self, taskset: TaskSet, was: TaskMeasurement, missing: list[str]
    ) -> tuple[Reading, ...]:
        """Distance from the earlier policy on a task set that the earlier one solved."""
        cost = len(taskset.held_out) * TO_SCORE
        if self.before is None or was.successes.mean() < COULD:
            return ()
        if self.rollouts + cost > self.budget:
            missing.append("movement on earlier tasks: the budget is spent")
            return ()
        tasks = list(taskset.held_out)
        try:
            require_same_vocabulary(self.before, self.policy, tasks)
        except ModelError as error:
            missing.append(f"movement on earlier tasks: {error.found}")
            return ()
        answers = draw_answers(
            self.before,
            taskset,
            tasks,
            samples=TO_SCORE,
            max_new_tokens=self.spec.max_new_tokens,
            seed=self.spec.seed,
        )
        tokens = sum(len(a.completion.tokens) for group in answers for a in group)
        self._spent(cost, tokens)
        self.scored += 2 * tokens
        moved = policy_distance(
            self.before,
            self.policy,
            answers,
            samples=TO_SCORE,
            confidence=self.spec.confidence,
            seed=self.spec.seed,
        )
        return (moved.reading("kl_prior"),)

    def _room(self, now: TaskMeasurement, known: Sequence[Demonstration]) -> tuple[Reading, ...]:
        """Whether right answers fit into the token budget: rambling or too small a budget."""
        lengths: dict[str, int] = {}
        for d in known:
            lengths[d.task.key] = max(lengths.get(d.task.key, 0), len(d.tokens))
        budget, confidence = self.spec.max_new_tokens, self.spec.confidence
        found = answer_room(now, lengths, budget=budget, confidence=confidence)
        return () if found is None else (found,)

    def _continued(
        self,
        taskset: TaskSet,
        now: TaskMeasurement,
        known: Sequence[Demonstration],
        missing: list[str],
    ) -> tuple[Reading, ...]:
        unsolved = {key for key, c in zip(now.prompts, now.counts, strict=True) if c == 0}
        if len(unsolved) < UNSOLVED:
            return ()
        demos = [d for d in known if d.task.key in unsolved]
        cost = len(demos) * len(SHARES) * FROM_A_PREFIX
        if not demos or self.rollouts + cost > self.budget:
            why = "the task set knows no right answers" if not demos else "the budget is spent"
            missing.append(f"success from part of a right answer: {why}")
            return ()
        seen = continuation(
            self.policy,
            taskset,
            demos,
            samples=FROM_A_PREFIX,
            max_new_tokens=self.spec.max_new_tokens,
            seed=self.spec.seed,
            shares=SHARES,
            sampling=self.spec.sampling,
            confidence=self.spec.confidence,
        )
        self._spent(cost, round(cost * float(now.lengths.mean())))
        return seen.readings

    def _exposed(
        self, taskset: TaskSet, now: TaskMeasurement, missing: list[str]
    ) -> tuple[Reading, ...]:
        teacher = self.teachers.get(taskset.name)
        if teacher is None:
            missing.append("errors on own against right paths: no teacher was given (--teacher)")
            return ()
        cost = 2 * len(taskset.held_out) * FROM_A_PREFIX  # half of them from the teacher
        if now.successes.mean() >= MASTERED or self.rollouts + cost > self.budget:
            missing.append("errors on own against right paths: solved anyway, or no budget left")
            return ()
        try:
            seen = exposure_to_teacher(
                self.policy,
                teacher,
                taskset,
                samples=FROM_A_PREFIX,
                max_new_tokens=self.spec.max_new_tokens,
                seed=self.spec.seed,
                confidence=self.spec.confidence,
            )
        except ModelError as error:  # another tokenizer: no comparison by token
            missing.append(f"errors on own against right paths: {error.found}")
            return ()
        tokens = round(cost * float(now.lengths.mean()))
        self._spent(cost, tokens)
        self.scored += 2 * tokens
        return seen.readings

    def _scaffolded(
        self, taskset: TaskSet, now: TaskMeasurement, scaffold: str, missing: list[str]
    ) -> tuple[Reading, ...]:
        if self.rollouts + len(taskset.held_out) * WITH_HELP > self.budget:
            missing.append("amortisation: the budget is spent")
            return ()
        asked = _WithScaffold(taskset, scaffold)
        (helped,) = measure_policy(
            self.policy.producer.name,
            self.policy,
            [asked],
            spec=msgspec.structs.replace(self.spec, samples=WITH_HELP, epsilon=None),
            protocol=self.protocol,
            observe=ignore,
            stop=self.stop,
        ).tasks
        self._spent(helped.scores.size, int(helped.lengths.sum()))
        same = replace(helped, prompts=now.prompts)  # the same questions, with the scaffold
        return (amortisation_gap(now, same, confidence=self.spec.confidence),)

    def _labelled(self, evidence: Evidence, taskset: TaskSet) -> Evidence:
        """In reach or out of reach, by sequential sampling with the rest of the budget."""
        left = (self.budget - self.rollouts) // len(self.tasksets)
        if left < len(taskset.held_out):
            spent = "support labels only from the first samples: the budget is spent"
            return replace(evidence, missing=(*evidence.missing, spent))
        seen = adaptive_support(
            self.policy,
            taskset,
            design=AdaptiveDesign(epsilon=REACH, budget=left, confidence=self.spec.confidence),
            max_new_tokens=self.spec.max_new_tokens,
            seed=self.spec.seed,
            sampling=self.spec.sampling,
            stop=self.stop,
        )
        length = evidence.get("tokens_per_answer")
        self._spent(seen.tally.spent, round(seen.tally.spent * (length.value if length else 1.0)))
        better = {r.name for r in seen.readings}
        kept = [r for r in evidence.readings if r.name not in better]
        return replace(evidence, readings=(*kept, *seen.readings))

    def _spent(self, rollouts: int, tokens: int) -> None:
        self.rollouts += rollouts
        self.tokens += tokens

    def _say(self, text: str) -> None:
        self.observe(Note(text=text))
