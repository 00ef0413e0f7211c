"""The diagnosis card: what was seen, what follows from it, and what to do next.

Evidence ──rules──▶ Finding, OpenRule ──▶ TaskDiagnosis ──▶ Diagnosis ◀── Prescription

A card is plain data. It says for every task set which one thing holds the model back, which
readings decided that, and what would overturn it; or that nothing was decided, and what would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from posttrain.core.errors import DataError
from posttrain.measure.reading import Reading

FORMAT = "posttrain.diagnosis/1"


class Bottleneck(StrEnum):
    """What holds a policy back on a task set (arXiv 2604.07941, sections 3.5 and 7.2.1)."""

    MEASUREMENT = "measurement"  # the numbers cannot be trusted
    RETENTION = "retention"  # it was there before, and is being lost
    AMORTISATION = "amortisation"  # it works with a scaffold, not without
    LEARNER_STATE = "learner_state"  # right on correct prefixes, wrong on its own
    DIVERSITY = "diversity"  # it no longer varies, so there is nothing to choose from
    SUPPORT = "support"  # right answers are out of reach
    ENTRY = "entry"  # right answers are in reach once somebody has begun them
    SIGNAL = "signal"  # right answers are in reach, but too rare to learn from in small groups
    CHOICE = "choice"  # right answers are in reach, and others are chosen
    SATURATION = "saturation"  # nothing is left to gain on these prompts
    UNDETERMINED = "undetermined"  # the intervals do not decide

    @property
    def meaning(self) -> str:
        """One sentence for somebody who sees the word for the first time."""
        return _MEANINGS[self]


_MEANINGS = {
    Bottleneck.MEASUREMENT: "The numbers cannot be trusted yet: mend the measuring first.",
    Bottleneck.RETENTION: "The model could do this before and is losing it.",
    Bottleneck.AMORTISATION: "The model can do this with help at run time, not by itself.",
    Bottleneck.LEARNER_STATE: "The model goes on rightly from correct text, not from its own.",
    Bottleneck.DIVERSITY: "The model says the same thing every time: nothing to choose from.",
    Bottleneck.SUPPORT: "The right answer is out of reach, however often the model tries.",
    Bottleneck.ENTRY: "The model can finish a right answer, but does not begin one.",
    Bottleneck.SIGNAL: "Right answers occur, but too rarely to be found in small groups.",
    Bottleneck.CHOICE: "The model can give the right answer, but prefers another.",
    Bottleneck.SATURATION: "The model already does this: these prompts have no more to teach.",
    Bottleneck.UNDETERMINED: "The evidence does not decide yet.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The readings of one task set, and what was not looked at, with the reason."""

    task: str
    readings: tuple[Reading, ...]
    missing: tuple[str, ...] = ()  # sentences

    def get(self, name: str) -> Reading | None:
        """The reading of that name; None when it was not taken."""
        return next((r for r in self.readings if r.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule whose conditions hold on the bounds of the intervals."""

    rule: str  # its id
    bottleneck: Bottleneck
    words: str  # what it means here
    because: tuple[str, ...]  # each condition with the numbers that met it
    decided_by: tuple[Reading, ...]
    overturned_by: str
    citation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRule:
    """A rule that the intervals neither confirm nor refute, and what would decide it.

    ``more`` is how many times as many units (prompts, or samples where prompts do not vary) the
    least decided condition needs by the square-root law; infinite when the estimate lies on the
    threshold.
    """

    rule: str
    bottleneck: Bottleneck
    because: tuple[str, ...]  # the conditions that straddle their thresholds
    decide: str  # which probe, with how many more
    more: float
    likely: bool  # the middles of the intervals would confirm it


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDiagnosis:
    """What holds the model back on one task set.

    ``findings`` are in order of importance; the first decides ``bottleneck``, unless a rule that
    would come before it is open. ``leaning`` is then the likeliest bottleneck, which nothing has
    shown; None otherwise.
    """

    task: str
    bottleneck: Bottleneck
    headline: str
    evidence: Evidence
    findings: tuple[Finding, ...] = ()
    open: tuple[OpenRule, ...] = ()  # those that could change the answer
    leaning: Bottleneck | None = None

    @property
    def acted_on(self) -> Bottleneck:
        """The bottleneck that a prescription treats: the one shown, or else the likeliest."""
        return self.leaning or self.bottleneck


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One decision of a prescription with its reason, such as ("group size", "16", "...")."""

    what: str
    setting: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prescription:
    """The next stage, ready to run; or, without a recipe, what has to be obtained first.

    ``tasks`` are treated together, since they share the bottleneck. ``provisional`` is True when
    the bottleneck was likely rather than shown.
    """

    tasks: tuple[str, ...]
    bottleneck: Bottleneck
    treatment: str | None  # its name in rules.yaml
    title: str  # one line: what is done
    choices: tuple[Choice, ...] = ()
    recipe: str | None = None  # YAML
    gate: str | None = None  # in words
    obtain: str | None = None  # what is needed before anything helps
    provisional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What looking cost. Tokens of answers that were sampled, and of text that was only scored."""

    rollouts: int
    sampled_tokens: int
    scored_tokens: int
    seconds: float

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(
            rollouts=self.rollouts + other.rollouts,
            sampled_tokens=self.sampled_tokens + other.sampled_tokens,
            scored_tokens=self.scored_tokens + other.scored_tokens,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The card of a model: every task set, and what to do, one stage per kind of bottleneck.

    ``prescriptions`` are in order: support, then reshaping, then consolidation.

    Example:
        >>> from posttrain.measure.reading import Reading
        >>> r = Reading("pass@1", "sums", 0.97, 0.93, 1.0, 32, 64, "nearly always right")
        >>> task = TaskDiagnosis(task="sums", bottleneck=Bottleneck.SATURATION,
        ...     headline="Nothing left to gain.", evidence=Evidence(task="sums", readings=(r,)))
        >>> card = Diagnosis(model="m", digest="d", rules="r", seed=0, confidence=0.95,
        ...     tasks=(task,), cost=Cost(rollouts=0, sampled_tokens=0, scored_tokens=0, seconds=0))
        >>> Diagnosis.from_json(card.to_json()) == card
        True
    """

    model: str
    digest: str  # of the weights
    rules: str  # digest of the rules
    seed: int
    confidence: float
    tasks: tuple[TaskDiagnosis, ...]
    cost: Cost
    prescriptions: tuple[Prescription, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def next(self) -> Prescription | None:
        """What to do now: the first prescription with a recipe. Then diagnose again."""
        return next((p for p in self.prescriptions if p.recipe is not None), None)

    def task(self, name: str) -> TaskDiagnosis:
        """The diagnosis of one task set."""
        return next(t for t in self.tasks if t.task == name)

    def to_json(self) -> str:
        """One JSON document that :meth:`from_json` reads back to an equal card."""
        body = msgspec.to_builtins(replace(self, tasks=()))
        body["tasks"] = [_task_out(t) for t in self.tasks]
        text = msgspec.json.encode({"format": FORMAT, **body})
        return msgspec.json.format(text, indent=1).decode() + "\n"

    @staticmethod
    def from_json(text: str) -> Diagnosis:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: the text is not a diagnosis, or is damaged.
        """
        try:
            body = msgspec.json.decode(text, type=dict[str, object])
            if body.pop("format", None) != FORMAT:
                raise DataError("not a diagnosis", expected=FORMAT, fix="diagnose again")
            return msgspec.convert(_with_infinities(body), Diagnosis)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(
                f"not a diagnosis: {error}", expected=FORMAT, fix="diagnose again"
            ) from None


# --- JSON has no infinity: it is written as text ---------------------------------------------


def _task_out(task: TaskDiagnosis) -> object:
    return _without_infinities(msgspec.to_builtins(task))


def _without_infinities(value: object) -> object:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {k: _without_infinities(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_infinities(v) for v in value]
    return value


_NUMBERS = frozenset({"value", "low", "high", "more"})


def _with_infinities(value: object, key: str = "") -> object:
    if key in _NUMBERS and value in ("inf", "-inf"):
        return float(str(value))
    if isinstance(value, dict):
        return {k: _with_infinities(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_infinities(v) for v in value]
    return value
