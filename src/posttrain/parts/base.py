"""What a part is, and the three roles of parts that a stage is composed of.

    Source ──draws──▶ groups ──Signal──▶ columns beside them ──pack──▶ Term ──sum──▶ loss

A part is one class: fields are the options of a recipe, class variables and properties declare
what it needs and provides, methods compute. Code that plans, builds or runs a stage calls these,
and knows no part by name. ``@part`` registers a class under its name in snake case.

No module of parts imports PyTorch at import time: tensor code takes it from
:mod:`posttrain.core.lazy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from posttrain.core.bounds import Inner, NonNegative
from posttrain.core.config import Config
from posttrain.core.errors import LegalityError
from posttrain.core.provenance import Kind, Regime
from posttrain.core.sampling import SamplingSpec
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import Column, Group
from posttrain.parts.registry import snake_case
from posttrain.parts.shelf import Reader
from posttrain.parts.tools import Score, Tools
from posttrain.protocols import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.numerics.batch import PackedBatch

ANYONE = frozenset(Kind) - {Kind.TEMPLATE, Kind.ENVIRONMENT}
"""Every kind of producer that authors assistant turns."""

PolicyRef = str
"""``learner``; ``input`` (the policy the stage started from); ``base``; an earlier stage's name;
``moving`` (the composition's reference that follows the learner); or
``path:<folder or hub id>``."""

LEARNER: PolicyRef = "learner"

Aggregate = Literal["token_mean", "sequence_mean", "sequence_sum"]
"""``token_mean``: every token has equal weight. ``sequence_mean``: every sequence has equal weight,
its tokens are averaged first. ``sequence_sum``: a sequence's tokens are summed and the sums
averaged, so a token's weight does not depend on any length; this is the gradient of an expected
reward, and with the weight 1 / (longest answer) it is Dr.GRPO's division by a constant. The choice
changes the objective (survey section 5, trap 3)."""

Unit = Literal["token", "step", "sequence", "pair"]
"""The unit of one value of a loss."""

Columns = frozenset[Column]
COLUMNS: Columns = frozenset(Column)
NONE: Columns = frozenset()


class Part(Config, tag=snake_case, tag_field="type"):
    """Base class of sources, signals, terms and methods.

    ``formula`` and ``paper`` (an arXiv number, or words) are shown by ``posttrain methods``.
    """

    role: ClassVar[str]
    declares: ClassVar[tuple[str, ...]]  # members that every class of the role must define
    vocabulary: ClassVar[Mapping[str, frozenset[Any]]] = MappingProxyType({})
    """Values that class variables of these names may have."""

    formula: ClassVar[str] = ""
    paper: ClassVar[str] = "-"
    may_ask_learner: ClassVar[bool] = False  # else references must be frozen policies
    in_words: ClassVar[str] = ""  # its name in lists of options, if not its tag

    def references(self) -> tuple[PolicyRef, ...]:
        """Policies that the part uses. They are part of the stage's identity."""
        return ()

    def scorers(self) -> tuple[PolicyRef, ...]:
        """Those of its references that must have a scalar head."""
        return ()

    def check(self, at: StageContext) -> None:
        """Refuse a stage in which the part cannot work.

        Needs, authors and group sizes are checked for every part; this adds the part's own checks.

        Raises:
            LegalityError: what was found, what was expected, what to do.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """Planning facts, known before a model is loaded: tokenizer, context and task sets."""

    reader: Reader
    taskset: Callable[[str], TaskSet]

    def prompt_lengths(self, name: str) -> list[int]:
        """Tokens of the first training prompts of a task set."""
        prompts = map(self.reader.renderer.prompt, self.taskset(name).train[:64])
        return [len(prompt.tokens) for prompt in prompts]


# --- sources ---------------------------------------------------------------------------------


class Source(Part):
    """Where trajectories come from.

    A source inside another is one of its ``leaves``: a leaf draws by itself. The properties
    describe everything that it draws.
    """

    role: ClassVar[str] = "source"
    declares: ClassVar[tuple[str, ...]] = (
        *("writes", "provides_for", "origin", "identity", "open"),
    )
    mixed: ClassVar[bool] = False  # parts may need different columns beside different authors
    has_end: ClassVar[bool] = False  # it has a number of rows, so a budget can be in epochs

    @property
    def writes(self) -> frozenset[Kind]:
        """Kinds of author of the trainable tokens."""
        raise NotImplementedError

    @property
    def provides(self) -> Columns:
        """Columns of everything it draws."""
        return frozenset.intersection(*(self.provides_for(kind) for kind in self.writes))

    def provides_for(self, kind: Kind) -> Columns:
        """Columns of what this author wrote."""
        raise NotImplementedError

    @property
    def leaves(self) -> tuple[Source, ...]:
        """The sources inside that draw by themselves; for most, the source itself."""
        return (self,)

    @property
    def leaf_shares(self) -> tuple[float, ...]:
        """The share of all groups that each leaf draws."""
        return (1.0,)

    @property
    def judged_by(self) -> tuple[Signal, ...]:
        """Signals inside the source that decide which groups it returns."""
        return ()

    @property
    def draws_from(self) -> tuple[str, ...]:
        """Task sets of the recipe whose prompts it draws."""
        return ()

    @property
    def row_names(self) -> tuple[str, ...]:
        """Prefixes of the task keys it draws: names of task sets, or of a data set."""
        return self.draws_from

    @property
    def sampled(self) -> SamplingSpec | None:
        """Decoding of the sampled policy; None where nothing is sampled."""
        return None

    @property
    def group_size(self) -> int:
        """Trajectories of a group."""
        return 1

    @property
    def row_columns(self) -> tuple[str, ...]:
        """Columns that its data file must have."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """Data files that it reads, relative to the recipe's folder."""
        return ()

    @property
    def longest(self) -> int | None:
        """Maximum tokens of an answer, where the source bounds them."""
        return None

    @property
    def regime(self) -> Regime:
        """Mixed for a mix of sources, on-policy where the learner writes, else off-policy."""
        if self.mixed:
            return Regime.MIXED
        return Regime.ON if Kind.LEARNER in self.writes else Regime.OFF

    @property
    def origin(self) -> str:
        """Who wrote its trajectories, in words. ``regime`` says the rest."""
        raise NotImplementedError

    def identity(self, root: Path) -> dict[str, object]:
        """Its options as plain data, with the content of files in place of their paths.

        Raises:
            DataError: a file does not exist.
        """
        raise NotImplementedError

    def rows(self, reader: Reader, *, seed: int = 0) -> Stream | None:
        """Its file, rendered and checked; None for a source that reads none.

        Raises:
            DataError: a row that cannot be used; names the file and the row.
        """
        return None

    def tokens(self, groups: float, facts: PlanFacts) -> tuple[float, float]:
        """(prompt, completion) tokens of that many groups of a leaf; upper bounds where unknown.

        By default nothing is known, and every trajectory may fill the context.
        """
        return 0.0, groups * self.group_size * facts.reader.context

    def check_task(self, task: Task) -> None:
        """Refuse a task that the source cannot draw, before anything is loaded.

        Raises:
            TaskError: it lacks what the source needs of it.
        """

    def open(self, tools: Tools, *, seed: int) -> Stream:
        """The stream of groups of this source.

        Args:
            tools: policies, task sets and files of the stage.
            seed: of its own randomness.
        """
        raise NotImplementedError


# --- signals ---------------------------------------------------------------------------------


class Signal(Part):
    """Scores groups before the update, and writes the scores as columns.

    ``judges``: it writes the reward of an answer (``REWARD``). ``sieves``: it selects what to train
    on without using a policy, so a source may use it to redraw. ``untempered``: it compares
    log-probs of sampled tokens with others at temperature 1. ``remembered``: it computes log-probs
    of the tokens under frozen policies, which can be cached by trajectory.
    """

    role: ClassVar[str] = "signal"
    declares: ClassVar[tuple[str, ...]] = ("provides", "score")
    vocabulary: ClassVar[Mapping[str, frozenset[Any]]] = MappingProxyType(
        {"needs": COLUMNS, "provides": COLUMNS}
    )
    judges: ClassVar[bool] = False
    sieves: ClassVar[bool] = False
    untempered: ClassVar[bool] = False
    remembered: ClassVar[bool] = False

    @property
    def needs(self) -> Columns:
        """Columns that the groups must have already."""
        return NONE

    @property
    def provides(self) -> Columns:
        """Columns that it writes."""
        raise NotImplementedError

    @property
    def min_group(self) -> int:
        """Minimum members of a group, where they are compared with each other."""
        return 1

    @property
    def distributions_of(self) -> tuple[PolicyRef, ...]:
        """Policies whose full next-token distribution it only passes on."""
        return ()

    @property
    def num_entries(self) -> int | None:
        """Entries of a distribution per token, where it keeps only the top k."""
        return None

    def trained_share(self, members: int) -> float:
        """Maximum share of a group of that many members that it leaves to train on."""
        return 1.0

    def prepare(self, tools: Tools) -> None:
        """Load and check what scoring needs, before anything is drawn.

        Raises:
            PosttrainError: what was found, what was expected, what to do.
        """

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups in the same order, with its columns on every member."""
        raise NotImplementedError


def bound(signal: Signal, tools: Tools) -> Score:
    """The scoring function of a prepared signal in a stage."""
    signal.prepare(tools)

    def score(groups: Sequence[Group]) -> Sequence[Group]:
        return signal.score(groups, tools)

    return score


# --- terms -----------------------------------------------------------------------------------


class Limit(Config):
    """Restricts the units that a term reads; ``where`` restricts by author.

    ``entropy_share`` keeps, *in every sequence*, the ⌈share · n⌉ of its n readable tokens with the
    highest entropy. It needs no extra pass, since the choice depends on the sequence only. But a
    sequence of low entropy still keeps its share.

    ``marked`` keeps tokens that a signal marked: ``mark_entropy`` compares those of a whole draw,
    as papers do (arXiv 2506.01939), in a pass over the draw before its first update.

    ``rewards: positive`` keeps sequences with a reward above 0, ``negative`` all others (a
    verifier's 0 is negative).

    ``preference`` keeps the chosen, or the rejected, answers of pairs: several methods add
    cross-entropy on chosen answers to a loss on pairs.
    """

    entropy_share: Inner | None = None
    marked: bool = False
    rewards: Literal["any", "positive", "negative"] = "any"
    preference: Literal["any", "chosen", "rejected"] = "any"

    @property
    def needs(self) -> Columns:
        """Columns that the limit reads."""
        by_reward = NONE if self.rewards == "any" else frozenset({Column.REWARD})
        by_pair = NONE if self.preference == "any" else frozenset({Column.PREFERENCE})
        return by_reward | by_pair | (frozenset({Column.MARK}) if self.marked else NONE)


class WeightSchedule(Config):
    """A term's weight moves from ``weight`` at the first update to ``end`` at the last one."""

    end: NonNegative
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, weight: float, *, progress: float) -> float:
        """The weight when ``progress`` of the stage, from 0 to 1, is done.

        Example:
            >>> [WeightSchedule(end=0.0).at(2.0, progress=p) for p in (0.0, 0.5, 1.0)]
            [2.0, 1.0, 0.0]
            >>> round(WeightSchedule(end=0.0, shape="cosine").at(2.0, progress=0.25), 3)
            1.707
        """
        if self.shape == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return (1 - progress) * weight + progress * self.end


Stats = Mapping[Wanted, "Tensor"]
"""The policy's statistics that a term reads: float32 [N] each, N trained tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """A term's loss per unit, and its metrics: numbers per unit, averaged like the loss."""

    loss: Tensor
    shown: Mapping[str, Tensor] = field(default_factory=dict)


class Term(Part):
    """A loss per token, step, sequence or pair, and its weight in the objective.

    ``where`` restricts the authors whose tokens it reads; empty means all that it accepts. Terms
    are averaged over their own units, in :mod:`posttrain.training.reduce` and nowhere else.
    ``reads`` names statistics of the policy; they carry the gradient. Columns are constants.
    """

    role: ClassVar[str] = "term"
    declares: ClassVar[tuple[str, ...]] = ("values",)
    vocabulary: ClassVar[Mapping[str, frozenset[Any]]] = MappingProxyType(
        {
            "unit": frozenset(get_args(Unit)),
            "needs": COLUMNS,
            "reads": frozenset(Stat),
            "accepts": frozenset(Kind),
        }
    )
    unit: ClassVar[Unit] = "token"
    accepts: ClassVar[frozenset[Kind]] = ANYONE  # authors on whose tokens the loss is valid
    by_divergence: ClassVar[bool] = False  # reads divergences from a teacher, and no log-probs

    weight: NonNegative = 1.0
    where: tuple[Kind, ...] = ()
    limit: Limit = Limit()
    weight_schedule: WeightSchedule | None = None  # null: constant

    @property
    def aggregate(self) -> str:
        """How units are averaged: an :data:`Aggregate` for terms over tokens."""
        return "token_mean"

    @property
    def needs(self) -> Columns:
        """Columns that the tokens it reads must have."""
        return NONE

    @property
    def reads(self) -> frozenset[Wanted]:
        """Statistics that the output head computes for it."""
        return frozenset({Stat.LOGPROB})

    @property
    def readable(self) -> frozenset[Kind]:
        """Kinds of author whose tokens it reads: those it accepts, restricted by ``where``."""
        return self.accepts & frozenset(self.where) if self.where else self.accepts

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """The loss of every unit: [N] tokens, [S] sequences or [P] pairs."""
        raise NotImplementedError

    def signals(self, reference: PolicyRef) -> tuple[Signal, ...]:
        """Signals that a method of this term alone adds, besides reference log-probs."""
        return ()

    # State of a term across updates. The learner keeps it, by name, with its weights.

    @property
    def moves(self) -> bool:
        """True when its weight changes between updates."""
        return self.weight_schedule is not None

    def factor(self, memory: Mapping[str, float]) -> float:
        """Multiplier of its weight, from its state."""
        return 1.0

    def remember(
        self, memory: Mapping[str, float], metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Its new state after an update with these metrics."""
        return {}


class TokenTerm(Term):
    """A loss per token, averaged according to ``aggregate``."""

    aggregate: Aggregate = "token_mean"


# --- the stage around them -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """The stage that a part is checked in."""

    stage: str
    source: Source
    signals: tuple[Signal, ...]
    terms: tuple[Term, ...]
    kinds: frozenset[Kind]  # authors whose groups or tokens the part reads here

    @property
    def drawn(self) -> tuple[Source, ...]:
        """The sources that draw what the part reads."""
        return tuple(s for s in self.source.leaves if s.writes & self.kinds)

    @property
    def rows(self) -> tuple[Source, ...]:
        """Those of them that read files, whose trajectories belong to no task."""
        return tuple(s for s in self.drawn if s.sampled is None)

    def refuse(
        self, found: str, *, expected: str | None = None, fix: str | None = None
    ) -> LegalityError:
        """An error that names the stage.

        Example:
            >>> from posttrain.parts.sources.dataset import Dataset
            >>> rows = Dataset(path="a.jsonl")
            >>> at = StageContext(stage="warm", source=rows, signals=(), terms=(), kinds=ANYONE)
            >>> at.refuse("no term").found
            'stage warm: no term'
        """
        return LegalityError(f"stage {self.stage}: {found}", expected=expected, fix=fix)
