"""What a report shows, as plain values: no tensors, no files, nothing to compute.

    run folder ──loader──▶ RunView ──render──▶ report.html

A :class:`RunView` may be incomplete. An empty tuple, ``None`` or a non-finite number means "not
measured", and the page says so or leaves the part out; it never shows a zero in its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from posttrain.core.errors import DataError
from posttrain.core.provenance import Kind, Role
from posttrain.report.definitions import HOW_TO_READ, Definition


class Regime(StrEnum):
    """Who sampled the trajectories of a stage, as seen from the model that learned from them."""

    OFF = "off-policy"
    ON = "on-policy"
    MIXED = "mixed"


class Effect(StrEnum):
    """What a stage did to one task set, as measured (arXiv 2604.07941, section 3.3)."""

    EXPANSION = "expansion"
    RESHAPING = "reshaping"
    CONSOLIDATION = "consolidation"
    ATTRITION = "attrition"
    UNDETERMINED = "undetermined"


class Support(StrEnum):
    """Whether a policy practically reaches a correct answer to a prompt."""

    IN = "in"
    OUT = "out"
    UNDETERMINED = "undetermined"


class Outcome(StrEnum):
    """How a gate decided."""

    PASSED = "passed"
    WARNED = "warned"
    STOPPED = "stopped"
    ROLLED_BACK = "rolled back"
    BRANCHED = "branched"


def known(value: float | None) -> float | None:
    """The number itself, or None when it is missing or not finite.

    Example:
        >>> known(0.5), known(float("nan")), known(None)
        (0.5, None, None)
    """
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number and its interval. Non-finite parts become None, the interval goes as a whole.

    Example:
        >>> Estimate(value=0.81, low=0.74, high=0.88).words
        '0.81 [0.74, 0.88]'
        >>> Estimate(value=0.81).words, Estimate(value=float("nan")).words
        ('0.81 (no interval)', 'not measured')
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        value, low, high = known(self.value), known(self.low), known(self.high)
        whole = value is not None and low is not None and high is not None
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "low", low if whole else None)
        object.__setattr__(self, "high", high if whole else None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None when it is unknown."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def words(self) -> str:
        """The number with its interval, two decimals, as the page prints it."""
        if self.value is None:
            return "not measured"
        if self.interval is None:
            return f"{self.value:z.2f} (no interval)"
        value, low, high = (f"{x:z.2f}" for x in (self.value, *self.interval))
        return f"{value} [{low}, {high}]"

    @property
    def is_positive(self) -> bool:
        """True when the number is above zero and its interval, where there is one, excludes it."""
        above = self.value is not None and self.value > 0
        return above and (self.low is None or self.low > 0)


UNMEASURED = Estimate(value=None)


# --- the pipeline ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve of a stage, for example the reward: (step, value) pairs in the order of steps."""

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateView:
    """A decision that was taken after a stage, and why, in words."""

    outcome: Outcome
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEffect:
    """The measured role of a stage on one task set."""

    task: str
    effect: Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens that one producer wrote in one stage, read by a loss term or discarded."""

    kind: Kind
    name: str
    tokens: int
    discarded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePart:
    """What a stage spent on one kind of work; names and groups are those of ``clock.py``."""

    group: str
    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One intervention: what it was meant to do, what it did, and what it cost.

    ``provenance`` is words for a reader ("demonstrations by external:lab-demos"). ``teachers``
    are the policies it was taught by: names of other stages, ``base``, or anything else.
    """

    name: str
    method: str
    regime: Regime
    provenance: str
    interface: str
    steps: int
    seconds: float
    intends: str | None = None
    effects: tuple[TaskEffect, ...] = ()
    teachers: tuple[str, ...] = ()
    tokens: tuple[TokenCount, ...] = ()
    series: tuple[Series, ...] = ()
    gates: tuple[GateView, ...] = ()
    times: tuple[TimePart, ...] = ()


# --- what was measured -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """pass@k at one k."""

    k: int
    rate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTask:
    """One policy on one task set: success over ``num_samples`` draws per prompt, and its drift."""

    task: str
    num_prompts: int
    num_samples: int
    pass_at_1: Estimate
    curve: tuple[CurvePoint, ...] = ()
    kl_base: Estimate = UNMEASURED  # nats per answer, KL(policy ‖ base)
    entropy: Estimate = UNMEASURED  # nats per token
    tokens: Estimate = UNMEASURED  # per answer


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyView:
    """A measured policy: the base model, or the model after a stage."""

    name: str
    tasks: tuple[PolicyTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Where one task set's behaviour went between two policies, in parts that add up to one.

    ``undetermined`` is the part for which the samples were too few to say; it has a sign.
    ``before`` and ``after`` are pass@1 on both sides: before + reachable + sharpened − weakened
    − lost + undetermined = after.
    """

    task: str
    reachable: Estimate
    sharpened: Estimate
    kept: Estimate
    weakened: Estimate
    lost: Estimate
    undetermined: Estimate = UNMEASURED
    retention: Estimate = UNMEASURED
    before: Estimate = UNMEASURED
    after: Estimate = UNMEASURED


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two measured policies, by name, and the change per task set.

    ``stage`` is the stage in between, or None for the whole run (base to final).
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    stage: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSupport:
    """Support of one prompt under every policy of its map, in the map's order."""

    prompt: str
    labels: tuple[Support, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportMap:
    """Prompts by policies for one task set.

    Raises:
        DataError: a prompt has more or fewer labels than there are policies.
    """

    task: str
    policies: tuple[str, ...]
    prompts: tuple[PromptSupport, ...]

    def __post_init__(self) -> None:
        for row in self.prompts:
            if len(row.labels) != len(self.policies):
                raise DataError(
                    f"prompt {row.prompt!r} of {self.task} with {len(row.labels)} support labels",
                    expected=f"one for each of the {len(self.policies)} policies",
                )


# --- treatment -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundView:
    """What held one task set back; ``shown`` is False where it is only the likeliest."""

    task: str
    bottleneck: str
    shown: bool
    words: str
    because: tuple[str, ...]
    first: Estimate  # pass@1
    reach: Estimate  # pass@k at the largest k, which is ``tries``
    tries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundView:
    """One look and what followed. ``stage`` is empty where nothing was done after it.

    ``helped`` and ``kept`` are None while the stage is not judged. Tokens are of this round.
    """

    number: int
    page: str
    found: tuple[FoundView, ...]
    stage: str
    start: str
    steps: int
    tasks: tuple[str, ...]
    title: str
    why: str
    decision: str
    helped: bool | None
    kept: bool | None
    looking: int
    sampled: int
    trained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TreatmentView:
    """All rounds of a treatment; ``ended`` says why it ended, and is empty while it has not."""

    rounds: tuple[RoundView, ...]
    budget: int
    spent: int
    ended: str


# --- retention -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionView:
    """What later stages left of what a task set had after the stage that taught it.

    ``learned`` names that stage, or the base. None of the numbers is there when it was the last.
    """

    task: str
    learned: str
    forward: Estimate  # pass@1 before its own stage minus that of the base
    backward: Estimate  # pass@1 at the end minus just after its own stage
    forgetting: Estimate  # best earlier pass@1 minus the last
    handoff: Estimate  # of the prompts its stage brought into reach, those still there


# --- tokens and samples ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Tokens of one kind of producer in one stage: those a term read, and those it did not."""

    stage: str
    kind: Kind
    trained: int
    discarded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token as text, with its log-prob in nats under the policy that wrote it."""

    text: str
    logprob: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of text by one producer in one turn. ``tokens``, where given, spell the text."""

    text: str
    kind: Kind
    producer: str
    role: Role
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trajectory to read."""

    task: str
    stage: str
    pieces: tuple[Piece, ...]
    reward: float | None = None


# --- the run ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the run cost: seconds on the wall, tokens drawn and tokens a term read."""

    wall_seconds: float
    tokens_generated: int
    tokens_trained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The head of the run's ledger. ``verified`` is None when nobody checked the chain."""

    head: str
    verified: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Everything a page shows. ``policies`` starts with the base and ends with the final one.

    ``unit`` says what the parts of a change are shares of. ``protocol`` is the measuring
    protocol in words: prompts, samples, seeds, sampling, threshold.
    """

    name: str
    created: str
    base_model: str
    machine: str
    totals: Totals
    ledger: Seal
    recipe_digest: str
    versions: tuple[tuple[str, str], ...] = ()
    seeds: tuple[int, ...] = ()
    protocol: str = ""
    unit: str = "share of held-out prompts"
    stages: tuple[StageView, ...] = ()
    policies: tuple[PolicyView, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    support: tuple[SupportMap, ...] = ()
    accounts: tuple[Account, ...] = ()
    samples: tuple[Sample, ...] = ()
    warnings: tuple[str, ...] = ()
    retention: tuple[RetentionView, ...] = ()
    treatment: TreatmentView | None = None
    how_to_read: tuple[Definition, ...] = HOW_TO_READ

    def between(self, stage: str | None) -> Comparison | None:
        """The comparison across a stage, or across the whole run for None."""
        return next((c for c in self.comparisons if c.stage == stage), None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task sets with a measured policy, in the order of their first appearance."""
        return tuple(dict.fromkeys(t.task for p in self.policies for t in p.tasks))


def task_of(policy: PolicyView, task: str) -> PolicyTask | None:
    """What a policy measured on a task set, or None."""
    return next((t for t in policy.tasks if t.task == task), None)
