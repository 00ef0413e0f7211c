"""Exposure bias: errors of a policy on its own prefixes against correct prefixes.

with a teacher      own draws ──────┐
                    teacher's draws ┴─ both score every position ──▶ KL(teacher ‖ policy) by depth
with demonstrations right answers ──policy scores──▶ right tokens by depth ──▶ what they predict
                    own draws ─────────scorer──────▶ success, and success after leaving the path

With a teacher, exposure bias is its disagreement with the policy on states that the policy reached,
against states that the teacher reached. Without one it is undefined: the right next token after a
wrong prefix is not known. Demonstrations measure something else: how much of the success survives
a deviation from them.

Shape legend: ``P`` prompts, ``L`` depths (tokens of the answer before the position), ``V``
vocabulary, ``T`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import TaskSet
from posttrain.core.trajectory import Trajectory
from posttrain.diagnosis.drawing import (
    Demonstration,
    as_trajectory,
    check_prompts,
    draw_answers,
    require_plain,
    require_same_vocabulary,
    token_logprobs,
)
from posttrain.measure.bootstrap import Interval, mean_interval, ratio_interval, student_quantile
from posttrain.measure.reading import Reading, reading
from posttrain.protocols import Policy, over_shared_rows

Floats = npt.NDArray[np.float64]
WHY_PLAIN = "prefixes are those of the policies' own distributions"
FEWEST_PROMPTS = 5
"""Prompts (or all, if fewer) that must reach a depth on both kinds of path for it to count."""
ELEMENTS = 1 << 25
"""Log-probs over the whole vocabulary held at a time, per policy."""


# --- with a teacher --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paths:
    """KL and agreement of a teacher and a policy at every position of answers, summed by prompt."""

    errors: Floats  # [P, L] sums of KL(teacher ‖ policy), in nats
    agreed: Floats  # [P, L] positions with the same argmax token
    counts: Floats  # [P, L] positions

    def upto(self, depth: int) -> Paths:
        """The first ``depth`` depths."""
        return Paths(
            errors=self.errors[:, :depth],
            agreed=self.agreed[:, :depth],
            counts=self.counts[:, :depth],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherExposure:
    """Errors of a policy on its ``own`` paths and on the ``right`` ones of its teacher, [P, L].

    The error at a state is KL(teacher ‖ policy) of the next token. ``excess`` is
    Σ_t own(t) / Σ_t right(t) − 1, own(t) and right(t) being the means over all prefixes of t
    tokens: the excess accumulated error of arXiv 2204.01171 up to the deepest depth that counts,
    as a ratio, not in percent. Comparing depth by depth avoids mixing answers of different lengths.
    """

    task: str
    own: Paths
    right: Paths
    samples: int
    confidence: float
    seed: int

    @property
    def depth(self) -> int:
        """Depths that enough prompts reach on both kinds of path."""
        return int(self.own.counts.shape[1])

    @property
    def by_depth(self) -> tuple[tuple[float, float], ...]:
        """(own, right) mean error at each depth, in nats."""
        own = self.own.errors.sum(0) / self.own.counts.sum(0)
        right = self.right.errors.sum(0) / self.right.counts.sum(0)
        return tuple(zip(own.tolist(), right.tolist(), strict=True))

    @property
    def excess(self) -> Interval | None:
        """The excess with its interval over prompts; None when the policy makes no error at all.

        Jackknife over prompts of log(1 + excess) with Student's quantile. In a simulation with a
        known value its coverage is nominal from 8 prompts on (tests).
        """
        everyone = np.ones(len(self.own.counts), np.bool_)
        whole = self._log_ratio(everyone)
        if whole is None:
            return None
        num = len(everyone)
        parts = [self._log_ratio(np.arange(num) != i) for i in range(num)]
        kept = np.array([p for p in parts if p is not None])
        if len(kept) < num or num < 2 or not np.isfinite([whole, *kept]).all():
            reach = math.inf
        else:
            reach = math.sqrt((num - 1) / num * float(((kept - kept.mean()) ** 2).sum()))
            reach *= student_quantile((1 + self.confidence) / 2, degrees=num - 1)
        return Interval(
            value=_expm1(whole),
            low=_expm1(whole - reach) if math.isfinite(whole) else -1.0,
            high=_expm1(whole + reach),
            num_prompts=num,
            seed=self.seed,
            confidence=self.confidence,
        )

    def _log_ratio(self, chosen: npt.NDArray[np.bool_]) -> float | None:
        totals = []
        for paths in (self.own, self.right):
            counts = paths.counts[chosen].sum(0)
            if not (counts > 0).all():
                return None
            totals.append(float((paths.errors[chosen].sum(0) / counts).sum()))
        own, right = totals
        if own <= 0 and right <= 0:
            return None
        return math.inf if right <= 0 else -math.inf if own <= 0 else math.log(own / right)

    def accuracy(self, paths: Paths) -> Interval:
        """Share of positions where policy and teacher have the same argmax token."""
        return ratio_interval(
            paths.agreed.sum(1),
            paths.counts.sum(1),
            confidence=self.confidence,
            seed=self.seed,
        )

    @property
    def readings(self) -> tuple[Reading, ...]:
        """``teacher_forced_accuracy``, ``own_rollout_accuracy`` and ``exposure_excess``."""
        out = []
        for name, paths, where in (
            ("teacher_forced_accuracy", self.right, "the teacher's paths"),
            ("own_rollout_accuracy", self.own, "its own paths"),
        ):
            interval = _within(self.accuracy(paths))
            words = f"on {where} it foresees {interval.value:.0%} of the teacher's likeliest tokens"
            out.append(reading(name, self.task, interval, samples=self.samples, words=words))
        if excess := self.excess:
            words = (
                f"errors on its own paths are {1 + excess.value:.3g} times those on the teacher's, "
                f"over the first {self.depth} tokens"
            )
            out.append(
                reading("exposure_excess", self.task, excess, samples=self.samples, words=words)
            )
        return tuple(out)


def exposure_to_teacher(
    policy: Policy,
    teacher: Policy,
    taskset: TaskSet,
    *,
    samples: int = 16,
    max_new_tokens: int,
    seed: int,
    sampling: SamplingSpec = SamplingSpec(),
    confidence: float = 0.95,
) -> TeacherExposure:
    """Compare a policy with its teacher on the paths of either, on held-out prompts.

    Raises:
        ConfigError: sampling with another temperature or truncation.
        ModelError: different tokenizers, templates, or too short a context.
        TaskError: a prompt that does not fit; nothing was drawn.
    """
    require_plain(sampling, why=WHY_PLAIN)
    tasks = list(taskset.held_out)
    require_same_vocabulary(policy, teacher, tasks)
    for who in (policy, teacher):
        check_prompts(who, tasks)
    drawn = [
        draw_answers(who, taskset, tasks, samples=samples, max_new_tokens=max_new_tokens, seed=seed)
        for who in (policy, teacher)
    ]
    own, right = (
        _judged(policy, teacher, [[a.trajectory for a in group] for group in groups])
        for groups in drawn
    )
    enough = min(FEWEST_PROMPTS, len(tasks))
    deep = min(own.counts.shape[1], right.counts.shape[1])
    reached = [
        t for t in range(deep) if min((p.counts[:, t] > 0).sum() for p in (own, right)) >= enough
    ]
    return TeacherExposure(
        task=taskset.name,
        own=own.upto(len(reached)),
        right=right.upto(len(reached)),
        samples=samples,
        confidence=confidence,
        seed=seed,
    )


def _judged(policy: Policy, teacher: Policy, groups: Sequence[Sequence[Trajectory]]) -> Paths:
    """Errors and agreement at every position of every answer, summed by prompt and depth."""
    policy, teacher = over_shared_rows([policy, teacher])
    owners = [row for row, group in enumerate(groups) for _ in group]
    flat = [t for group in groups for t in group]
    deepest = max(int(t.trainable.sum()) for t in flat)
    errors, agreed, counts = np.zeros((3, len(groups), deepest))
    seen = 0
    for some in _portions(policy, flat):
        pairs = zip(
            policy.distributions(some, top_k=None),
            teacher.distributions(some, top_k=None),
            some,
            strict=True,
        )
        for (_, mine), (_, theirs), trajectory in pairs:
            row, at = owners[seen], np.flatnonzero(trajectory.trainable)
            p, q = theirs[at].astype(np.float64), mine[at].astype(np.float64)
            with np.errstate(invalid="ignore"):
                terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
            errors[row, : len(at)] += np.maximum(terms.sum(1), 0.0)  # float noise around 0
            agreed[row, : len(at)] += p.argmax(1) == q.argmax(1)
            counts[row, : len(at)] += 1
            seen += 1
    return Paths(errors=errors, agreed=agreed, counts=counts)


def _portions(policy: Policy, flat: Sequence[Trajectory]) -> Iterator[Sequence[Trajectory]]:
    """Chunks whose full distributions fit into memory."""
    size = max(1, ELEMENTS // (policy.rows * max(len(t) for t in flat)))
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


# --- with demonstrations ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DemonstrationExposure:
    """A policy on demonstrations, and its own answers to the same prompts. [P] per prompt.

    ``written`` is the exact probability that an own answer is one of the prompt's demonstrations,
    the product of its token probabilities; ``success`` is below it by sampling noise only.
    ``kept`` is the share of own answers equal to a demonstration, ``left`` the share of those that
    differ and still succeed. ``greedy`` is 1 when greedy decoding gives a demonstration.
    """

    task: str
    prompts: tuple[str, ...]  # [P]
    hits: Floats  # [P, L] argmax tokens that equal the demonstration's
    counts: Floats  # [P, L]
    nats: Floats  # [P] mean −log-prob per token along the demonstrations
    greedy: Floats  # [P]
    written: Floats  # [P]
    success: Floats  # [P]
    kept: Floats  # [P]
    left: Floats  # [P]
    samples: int
    confidence: float
    seed: int

    @property
    def by_depth(self) -> tuple[float, ...]:
        """Share of correct argmax tokens at each depth."""
        return tuple((self.hits.sum(0) / self.counts.sum(0)).tolist())

    @property
    def accuracy(self) -> Interval:
        """Share of correct argmax tokens along the demonstrations."""
        found = ratio_interval(
            self.hits.sum(1), self.counts.sum(1), confidence=self.confidence, seed=self.seed
        )
        return _within(found)

    @property
    def predicted(self) -> float:
        """Success predicted by the shares by depth if errors were independent and final: the mean
        over demonstrations of their product up to its length."""
        product = np.cumprod(self.by_depth)
        ends = self.counts - np.pad(self.counts[:, 1:], ((0, 0), (0, 1)))  # answers that end there
        per_prompt = (ends * product).sum(1) / ends.sum(1)
        return float(per_prompt.mean())

    @property
    def observed(self) -> Interval:
        """Mean over prompts of the success of own answers."""
        return mean_interval(self.success, confidence=self.confidence, seed=self.seed)

    @property
    def recovery(self) -> Interval | None:
        """Success of own answers that are no demonstration, pooled over prompts.

        Near 0, the policy does not recover from a deviation. None when every own answer was a
        demonstration.
        """
        off = 1 - self.kept
        if not off.sum() > 0:
            return None
        found = ratio_interval(self.left, off, confidence=self.confidence, seed=self.seed)
        return _within(found)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """``teacher_forced_accuracy`` and ``recovery``.

        No ``own_rollout_accuracy``: without a teacher, own rollouts have no correct next token.
        """
        words = (
            f"along right answers {self.accuracy.value:.0%} of likeliest tokens are right, which "
            f"predicts {self.predicted:.0%} of answers; {self.observed.value:.0%} of own answers "
            "succeed"
        )
        forced = reading(
            "teacher_forced_accuracy", self.task, self.accuracy, samples=self.samples, words=words
        )
        recovery = self.recovery
        if recovery is None:
            return (forced,)
        words = f"{recovery.value:.0%} of own answers that leave the demonstrations still succeed"
        off = reading("recovery", self.task, recovery, samples=self.samples, words=words)
        return forced, off


def exposure_to_demonstrations(
    policy: Policy,
    taskset: TaskSet,
    demonstrations: Sequence[Demonstration],
    *,
    samples: int = 16,
    max_new_tokens: int,
    seed: int,
    sampling: SamplingSpec = SamplingSpec(),
    confidence: float = 0.95,
) -> DemonstrationExposure:
    """Score demonstrations with the policy, and sample its own answers to the same prompts.

    Several demonstrations of one prompt are pooled; equal ones count once.

    Raises:
        ConfigError: no demonstrations; sampling with another temperature or truncation.
        TaskError: a prompt that does not fit; nothing was drawn.
    """
    require_plain(sampling, why=WHY_PLAIN)
    if not demonstrations:
        raise ConfigError("an exposure probe without demonstrations", fix="give right answers")
    unique = {(d.task.key, d.tokens.tobytes()): d for d in demonstrations}
    demos = list(unique.values())
    tasks = list({d.task.key: d.task for d in demos}.values())
    row = {task.key: i for i, task in enumerate(tasks)}
    prompts = check_prompts(policy, tasks)
    trajectories = [
        as_trajectory(prompts[row[d.task.key]], d.tokens, task=d.task.key) for d in demos
    ]
    hits, counts = np.zeros((2, len(tasks), max(len(d.tokens) for d in demos)))
    nats, lengths, greedy, written = np.zeros((4, len(tasks)))
    logs = token_logprobs(policy, trajectories)
    likeliest = policy.distributions(trajectories, top_k=1)
    for demo, trajectory, logp, (ids, _) in zip(demos, trajectories, logs, likeliest, strict=True):
        i, n = row[demo.task.key], len(demo.tokens)
        right = ids[trajectory.trainable, 0] == demo.tokens
        hits[i, :n] += right
        counts[i, :n] += 1
        greedy[i] = max(greedy[i], float(right.all()))
        nats[i] -= logp.sum()
        lengths[i] += n
        written[i] += math.exp(logp.sum()) if n <= max_new_tokens else 0.0
    groups = draw_answers(
        policy, taskset, tasks, samples=samples, max_new_tokens=max_new_tokens, seed=seed
    )
    same = [[(a.task.key, a.tokens.tobytes()) in unique for a in group] for group in groups]
    won = [[a.success for a in group] for group in groups]
    return DemonstrationExposure(
        task=taskset.name,
        prompts=tuple(row),
        hits=hits,
        counts=counts,
        nats=nats / lengths,
        greedy=greedy,
        written=written,
        success=np.array([np.mean(w) for w in won]),
        kept=np.array([np.mean(s) for s in same]),
        left=np.array(
            [np.mean(np.array(w) & ~np.array(s)) for w, s in zip(won, same, strict=True)]
        ),
        samples=samples,
        confidence=confidence,
        seed=seed,
    )


def _expm1(x: float) -> float:
    return math.inf if x > 700 else math.expm1(x)


def _within(interval: Interval) -> Interval:
    """A share's interval, clipped to [0, 1], which the interval of a ratio may exceed."""
    return Interval(
        value=interval.value,
        low=max(interval.low, 0.0),
        high=min(interval.high, 1.0),
        num_prompts=interval.num_prompts,
        seed=interval.seed,
        confidence=interval.confidence,
    )
