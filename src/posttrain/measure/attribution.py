"""Where a change in success came from: newly reachable, sharpened, kept, weakened, lost.

before, after ──▶ folds: three decide, one measures ──▶ parts per prompt ──▶ intervals ──▶ role

**Algebra.** Split the samples of a prompt into folds. For fold f let p0, p1 be the success rates
before and after *in f*, d = p1 − p0, and let all samples *outside* f decide the labels L0, L1 (IN,
OUT, undetermined) and the direction: u = 1 when after succeeded more often, 0 when less, 1/2 when
equally often. Then gain = u·d and loss = −(1−u)·d, and each goes to one cell:

    gain   L0 OUT and L1 IN  newly reachable     loss   L0 IN and L1 OUT  lost
           L0 IN             sharpened                  L1 IN, not lost   weakened
           otherwise         undetermined gain          otherwise         undetermined loss
    kept = p1 − gain = p0 − loss = u·p0 + (1−u)·p1

Averaged over folds (by their size) and prompts, and exact to rounding:

    kept + newly reachable + sharpened + undetermined gain = pass@1 after
    kept + lost + weakened + undetermined loss             = pass@1 before
    newly reachable + sharpened − weakened − lost + undetermined = after − before,
        undetermined = undetermined gain − undetermined loss

**Why folds.** The positive part of a noisy difference is positive even when nothing changed, and a
prompt that got its label by luck falls back. Here what decides and what is measured share no
sample, so a part's expectation is Σ d · P(cell): zero for every part when nothing changed, for any
number of samples. The price: a prompt whose direction is a toss-up adds a little of its gain to a
loss with opposite sign, so a part may come out slightly below zero. Read that as zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError
from posttrain.measure.bootstrap import Floats, Interval, mean_intervals, ratio_interval
from posttrain.measure.measurement import (
    Measurement,
    TaskMeasurement,
    require_comparable,
    require_same_task,
)
from posttrain.measure.support import SupportChange, cutoffs, support_change

FOLDS = 4
"""Two decide on too few samples; with many, folds share deciders and the parts get noisier."""
MATERIAL = 0.05
"""Smallest change of pass@1 that gets a name. A smaller one may be certain and still not matter."""
RETAINED = 0.75
"""Lower bound of retention from which "kept" is a finding rather than a lack of one."""


class ChangeKind(StrEnum):
    """A share of the success rate. Losses are amounts, positive when something went away."""

    NEWLY_REACHABLE = "newly reachable"  # gained where before was OUT and after is IN
    SHARPENED = "sharpened"  # gained where before was IN
    KEPT = "kept"  # was there before and still is
    WEAKENED = "weakened"  # went away where after is still IN
    LOST = "lost"  # went away where before was IN and after is OUT
    UNDETERMINED = "undetermined"  # net change (signed) where labels cannot tell which


class MeasuredRole(StrEnum):
    """What happened to a task set, in the roles of arXiv 2604.07941, section 3."""

    EXPANSION = "expansion"  # support expansion: the gain is newly reachable for the most part
    RESHAPING = "reshaping"  # policy reshaping: the gain is sharpening for the most part
    CONSOLIDATION = "consolidation"  # behaviour kept, or brought back; no other material change
    ATTRITION = "attrition"  # more went away than came
    UNDETERMINED = "undetermined"  # the samples or the labels do not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """The change of pass@1 on one task set, split into parts that add up (see the module).

    ``retention`` is kept / before, the share of the earlier successes that survived; None when no
    prompt was IN before, so that there was nothing certain to keep. Intervals are over prompts:
    see :func:`posttrain.measure.bootstrap.mean_intervals`.
    """

    task: str
    before: Interval  # pass@1
    after: Interval  # pass@1
    change: Interval  # after − before, paired
    parts: Mapping[ChangeKind, Interval]
    undetermined_gain: Interval
    undetermined_loss: Interval
    gained: Interval  # newly reachable + sharpened
    gone: Interval  # weakened + lost
    balance: Interval  # gained − gone, paired
    retention: Interval | None
    epsilon: float
    confidence: float

    @property
    def dominant(self) -> MeasuredRole:
        """The role that the bounds of the intervals support. First rule that applies:

        1. attrition: more went away than came, so that the interval of ``balance`` is below zero
           and that of ``gone`` above it;
        2. expansion: more came than went away, newly reachable is above zero, and at least as
           large as sharpened;
        3. reshaping: more came than went away, sharpened is above zero, and the larger gain;
        4. consolidation: no material amount is above zero, kept is above zero, and retention is
           at least RETAINED by its lower bound;
        5. undetermined.

        "Above" and "below" are said of whole intervals; material means at least MATERIAL. Rules
        1 to 3 name material amounts only, and do not apply when an undetermined amount is larger
        than what they name.
        """
        unclear = max(self.undetermined_gain.value, self.undetermined_loss.value)
        new, sharper = self.parts[ChangeKind.NEWLY_REACHABLE], self.parts[ChangeKind.SHARPENED]
        named = max(unclear, MATERIAL)
        if self.gone.is_positive and self.balance.high < 0 and self.gone.value >= named:
            return MeasuredRole.ATTRITION
        larger = new if new.value >= sharper.value else sharper
        if larger.is_positive and self.balance.is_positive and larger.value >= named:
            return MeasuredRole.EXPANSION if larger is new else MeasuredRole.RESHAPING
        changes = [new, sharper, self.parts[ChangeKind.WEAKENED], self.parts[ChangeKind.LOST]]
        changes += [self.undetermined_gain, self.undetermined_loss]
        still = not any(c.is_positive and c.value >= MATERIAL for c in changes)
        kept = self.retention is not None and self.retention.low >= RETAINED
        if still and kept and self.parts[ChangeKind.KEPT].is_positive:
            return MeasuredRole.CONSOLIDATION
        return MeasuredRole.UNDETERMINED


def role_in_run(change: Attribution, earlier: Sequence[Attribution]) -> MeasuredRole:
    """The role of a stage, seen from all policies that the run has measured before it.

    A gain that only brings back what an earlier policy could do is a hand-off, not an expansion:
    it counts as consolidation when that policy was clearly better than the stage's input (their
    pass@1 intervals do not touch) and the result retains at least RETAINED of it.

    Args:
        change: from the stage's input to its result.
        earlier: from each earlier policy to the stage's result.
    """
    role = change.dominant
    if role not in (MeasuredRole.EXPANSION, MeasuredRole.RESHAPING):
        return role
    for old in earlier:
        was_better = old.before.low > change.before.high
        if was_better and old.retention is not None and old.retention.low >= RETAINED:
            return MeasuredRole.CONSOLIDATION
    return role


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChange:
    """Two measured policies: what changed, and how their support changed, per task set."""

    before: str
    after: str
    tasks: tuple[Attribution, ...]
    support: tuple[SupportChange, ...]

    def task(self, name: str) -> Attribution | None:
        """The attribution on one task set, or None when it was not measured."""
        return next((t for t in self.tasks if t.task == name), None)


def attribute_changes(
    before: Measurement,
    after: Measurement,
    *,
    epsilon: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> PolicyChange:
    """Attribute the change from ``before`` to ``after`` on every task set.

    Args:
        before: measurement of the earlier policy.
        after: measurement of the later one, under the same protocol.
        epsilon: success probability below which a prompt is out of reach.
        confidence: of each label's bound, and of the two-sided intervals.
        seed: of the bootstrap.

    Raises:
        RunError: the two were not measured in the same way; says what differs.
        ConfigError: ``epsilon`` or ``confidence`` outside (0, 1) and (0.5, 1).
    """
    require_comparable(before, after)
    pairs = [(task, after.task(task.taskset)) for task in before.tasks]
    return PolicyChange(
        before=before.policy,
        after=after.policy,
        tasks=tuple(
            attribute(b, a, epsilon=epsilon, confidence=confidence, seed=seed) for b, a in pairs
        ),
        support=tuple(
            support_change(b, a, epsilon=epsilon, confidence=confidence) for b, a in pairs
        ),
    )


def attribute(
    before: TaskMeasurement,
    after: TaskMeasurement,
    *,
    epsilon: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> Attribution:
    """Split the change of pass@1 on one task set into parts, with intervals.

    Raises:
        RunError: the two were not measured on the same prompts in the same way.
        ConfigError: ``epsilon`` or ``confidence`` outside (0, 1) and (0.5, 1), or one sample only.

    Example:
        >>> def measured(rates):
        ...     scores = np.array([[j < 64 * r for j in range(64)] for r in rates])
        ...     zeros = np.zeros((len(rates), 64))
        ...     return TaskMeasurement(taskset="sums", success=1.0, scores=scores, lengths=zeros,
        ...         prompts=tuple(f"sums/{i}" for i in range(len(rates))), truncated=zeros,
        ...         nll=zeros, distinct=zeros[:, 0])
        >>> a = attribute(measured([0, 0.5] * 8), measured([1, 0.5] * 8), epsilon=0.05)
        >>> kinds = ChangeKind.NEWLY_REACHABLE, ChangeKind.KEPT
        >>> [a.parts[kind].value for kind in kinds], str(a.dominant)
        ([0.5, 0.25], 'expansion')
    """
    require_same_task(before, after)
    cells = contributions(before, after, epsilon=epsilon, confidence=confidence)
    p0, p1 = (t.successes.mean(axis=1, dtype=np.float64) for t in (before, after))
    gained = cells.newly_reachable + cells.sharpened
    gone = cells.weakened + cells.lost
    net = cells.undetermined_gain - cells.undetermined_loss
    named = (cells.newly_reachable, cells.sharpened, cells.weakened, cells.lost)
    amounts = (*named, cells.undetermined_gain, cells.undetermined_loss, gained, gone)
    columns = (p0, p1, cells.kept, p1 - p0, net, gained - gone, *amounts)
    # An amount is below zero by noise only: no further than was seen, and never provably so.
    floors = [0.0] * 3 + [-1.0] * 3 + [min(0.0, float(a.min())) for a in amounts]
    rows = mean_intervals(
        np.stack(columns, axis=1),
        ranges=tuple((floor, 1.0) for floor in floors),
        confidence=confidence,
        seed=seed,
    )
    start, end, kept, change, undetermined, balance = rows[:6]
    new, sharpened, weakened, lost, open_gain, open_loss, came, went = (
        replace(row, high=max(row.high, 0.0)) for row in rows[6:]
    )
    parts = {
        ChangeKind.NEWLY_REACHABLE: new,
        ChangeKind.SHARPENED: sharpened,
        ChangeKind.KEPT: kept,
        ChangeKind.WEAKENED: weakened,
        ChangeKind.LOST: lost,
        ChangeKind.UNDETERMINED: undetermined,
    }
    retention = None
    _, min_in = cutoffs(before.num_samples, epsilon=epsilon, confidence=confidence)
    if (before.counts >= min_in).any():
        ratio = ratio_interval(cells.kept, p0, confidence=confidence, seed=seed)
        retention = replace(ratio, low=min(ratio.low, 1.0))  # more than all cannot be kept
    return Attribution(
        task=before.taskset,
        before=start,
        after=end,
        change=change,
        parts=MappingProxyType(parts),
        undetermined_gain=open_gain,
        undetermined_loss=open_loss,
        gained=came,
        gone=went,
        balance=balance,
        retention=retention,
        epsilon=epsilon,
        confidence=confidence,
    )


# --- per prompt ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contributions:
    """What each prompt adds to each part, all [P]; losses are amounts. See the module's algebra."""

    kept: Floats
    newly_reachable: Floats
    sharpened: Floats
    weakened: Floats
    lost: Floats
    undetermined_gain: Floats
    undetermined_loss: Floats


def contributions(
    before: TaskMeasurement, after: TaskMeasurement, *, epsilon: float, confidence: float
) -> Contributions:
    """The parts prompt by prompt, each averaged over folds.

    Sample j of both policies belongs to fold j mod FOLDS: measurements may share their seeds, so
    equal j may be dependent, while different j never are. Labels from m of the n samples hold with
    confidence 1 − (1 − confidence)^(m/n), the evidence per sample being the same; so 0 of m is OUT
    exactly when 0 of n is.
    """
    old, new = before.successes, after.successes
    n = before.num_samples
    if n < 2:
        raise ConfigError(
            f"{before.taskset}: {n} sample per prompt",
            expected="at least 2, some to decide and some to measure",
            fix="raise measure.samples",
        )
    num_folds = min(FOLDS, n)
    sums: Floats = np.zeros((7, len(old)))
    for fold in range(num_folds):
        measures = np.arange(n) % num_folds == fold
        size = int(measures.sum())
        rest = n - size
        p0, p1 = (x[:, measures].mean(axis=1, dtype=np.float64) for x in (old, new))
        c0, c1 = (x[:, ~measures].sum(axis=1) for x in (old, new))
        certain = 1 - (1 - confidence) ** (rest / n)
        max_out, min_in = cutoffs(rest, epsilon=epsilon, confidence=certain)
        sums += size / n * _cells(p0, p1, c0, c1, max_out=max_out, min_in=min_in)
    return Contributions(
        kept=sums[0],
        newly_reachable=sums[1],
        sharpened=sums[2],
        weakened=sums[3],
        lost=sums[4],
        undetermined_gain=sums[5],
        undetermined_loss=sums[6],
    )


def _cells(
    p0: Floats,
    p1: Floats,
    c0: npt.NDArray[np.int64],
    c1: npt.NDArray[np.int64],
    *,
    max_out: int,
    min_in: int,
) -> Floats:
    """[7, P] parts of one fold, in the order of :class:`Contributions`.

    ``p0`` and ``p1`` [P] are the success rates in the fold, ``c0`` and ``c1`` [P] the success
    counts outside it, with the cut-offs that make labels of them.
    """
    up = (np.sign(c1 - c0) + 1) / 2
    gain, loss = up * (p1 - p0), (1 - up) * (p0 - p1)
    was_in, was_out = c0 >= min_in, c0 <= max_out
    is_in, is_out = c1 >= min_in, c1 <= max_out
    reached, lost = was_out & is_in, was_in & is_out
    weakened = is_in & ~lost
    return np.stack(
        [
            p1 - gain,
            gain * reached,
            gain * was_in,
            loss * weakened,
            loss * lost,
            gain * ~(reached | was_in),
            loss * ~(lost | weakened),
        ]
    )
