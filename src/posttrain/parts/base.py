"""What a part is, and the three roles of parts that a stage is composed of.

    Source ──draws──▶ groups ──Signal──▶ columns beside them ──pack──▶ Term ──sum──▶ loss

A part is one class: fields are the options of a recipe, class variables and properties say what it
needs and gives, methods compute. Whoever plans, builds or runs a stage asks the part, and knows no
part by name. The decorator :func:`posttrain.parts.registry.part` makes a class known to recipes,
under its name in snake case.

No module of parts loads PyTorch when it is imported: what computes with tensors takes it from
:mod:`posttrain.core.lazy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.sampling import SamplingSpec
from posttrain.core.statistics import Stat, Wanted
from posttrain.core.trajectory import Column, Group
from posttrain.parts.registry import snake_case
from posttrain.parts.tools import Score, Tools
from posttrain.protocols import Renderer, Stream

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
"""``token_mean``: every token counts alike. ``sequence_mean``: every sequence counts alike,
its tokens are averaged first. ``sequence_sum``: a sequence's tokens are summed and the sums
averaged, so a token's weight does not depend on any length; this is the gradient of an expected
reward, and with the weight 1 / (longest answer) it is Dr.GRPO's division by a constant. The choice
changes the objective (survey section 5, trap 3)."""

Unit = Literal["token", "step", "sequence", "pair"]
"""What one number of a loss belongs to."""

Columns = frozenset[Column]
NONE: Columns = frozenset()


class Part(Config, tag=snake_case, tag_field="type"):
    """What sources, signals, terms and methods share.

    ``formula`` and ``paper`` (an arXiv number, or words) are shown by ``posttrain methods``.
    """

    role: ClassVar[str]
    declares: ClassVar[tuple[str, ...]]  # what every class of the role must have of its own
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = "-"
    may_ask_learner: ClassVar[bool] = False  # else only frozen policies can be referred to
    in_words: ClassVar[str] = ""  # how lists of options call it, if not by its tag

    def references(self) -> tuple[PolicyRef, ...]:
        """Policies that the part asks. They count in the stage's identity."""
        return ()

    def scorers(self) -> tuple[PolicyRef, ...]:
        """Those of its references that must have a scalar head."""
        return ()

    def check(self, scene: Scene) -> None:
        """Refuse a stage in which the part cannot do what it claims.

        Needs, authors and group sizes are checked for every part; here a part adds what only it
        knows.

        Raises:
            LegalityError: what was found, what was expected, what to do.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What is known before a model is loaded: its tokenizer, its context, and the task sets."""

    root: Path  # the recipe's folder
    renderer: Renderer
    context: int  # tokens
    prompt_lengths: Callable[[str], Sequence[int]]  # tokens of some prompts of a task set


# --- sources ---------------------------------------------------------------------------------


class Source(Part):
    """Where trajectories come from.

    A source inside of others is one of their ``leaves``: a leaf draws by itself. The properties
    speak of everything that it draws.
    """

    role: ClassVar[str] = "source"
    declares: ClassVar[tuple[str, ...]] = ("writes", "origin", "identity", "open")
    mixed: ClassVar[bool] = False  # parts may need different columns beside different authors
    has_end: ClassVar[bool] = False  # it has a number of rows, so a budget can be in epochs

    @property
    def writes(self) -> frozenset[Kind]:
        """Who authors the tokens that can be trained."""
        raise NotImplementedError

    @property
    def provides(self) -> Columns:
        """Columns that stand beside everything it draws."""
        return frozenset.intersection(*(self.provides_for(kind) for kind in self.writes))

    def provides_for(self, kind: Kind) -> Columns:
        """Columns that stand beside what this author wrote."""
        raise NotImplementedError

    @property
    def leaves(self) -> tuple[Source, ...]:
        """The sources inside that draw by themselves; itself for most."""
        return (self,)

    @property
    def leaf_shares(self) -> tuple[float, ...]:
        """What share of all groups each leaf draws."""
        return (1.0,)

    @property
    def judged_by(self) -> tuple[Signal, ...]:
        """Signals that decide inside of the source what it hands out."""
        return ()

    @property
    def draws_from(self) -> tuple[str, ...]:
        """Task sets of the recipe whose prompts it answers."""
        return ()

    @property
    def row_names(self) -> tuple[str, ...]:
        """First halves of the keys of the tasks it draws: of task sets, or of a data set."""
        return self.draws_from

    @property
    def sampled(self) -> SamplingSpec | None:
        """How a policy is sampled; None where nothing is sampled."""
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
        """Most tokens of an answer, where the source bounds them."""
        return None

    @property
    def origin(self) -> str:
        """In words, where its trajectories come from."""
        raise NotImplementedError

    def identity(self, root: Path) -> dict[str, object]:
        """Its options as plain data, with the content of files in place of their paths.

        Raises:
            DataError: a file does not exist.
        """
        raise NotImplementedError

    def rows(self, *, root: Path, renderer: Renderer, context: int, seed: int = 0) -> Stream | None:
        """Its file, rendered and checked; None for a source that reads none.

        Raises:
            DataError: a row that cannot be used; names the file and the row.
        """
        return None

    def tokens(self, groups: float, ground: Ground) -> tuple[float, float]:
        """(prompt, completion) tokens of so many groups of a leaf; the most where unknown."""
        raise NotImplementedError

    def open(self, tools: Tools, *, seed: int) -> Stream:
        """The source at work.

        Args:
            tools: policies, task sets and files of the stage.
            seed: of its own randomness.
        """
        raise NotImplementedError


# --- signals ---------------------------------------------------------------------------------


class Signal(Part):
    """An opinion on groups, written as columns beside them, before the update.

    ``judges``: it says what an answer is worth (``REWARD``). ``sieves``: it decides without asking
    a policy what is worth training on, so a source may use it to draw again. ``untempered``: it
    compares log-probs of what was sampled with others at temperature 1. ``remembered``: it asks
    frozen policies for log-probs of the written tokens, which are the same when the trajectory
    comes again.
    """

    role: ClassVar[str] = "signal"
    declares: ClassVar[tuple[str, ...]] = ("provides", "score")
    judges: ClassVar[bool] = False
    sieves: ClassVar[bool] = False
    untempered: ClassVar[bool] = False
    remembered: ClassVar[bool] = False

    @property
    def needs(self) -> Columns:
        """Columns that must stand beside the groups already."""
        return NONE

    @property
    def provides(self) -> Columns:
        """Columns that it writes."""
        raise NotImplementedError

    @property
    def min_group(self) -> int:
        """Members that a group must have, because they are compared with each other."""
        return 1

    @property
    def distributions_of(self) -> tuple[PolicyRef, ...]:
        """Policies whose whole next-token distribution it hands on, and does nothing else with."""
        return ()

    @property
    def num_entries(self) -> int | None:
        """Entries of a distribution per token, where it keeps only the likeliest."""
        return None

    def trained_share(self, members: int) -> float:
        """The most of a group of so many members that it leaves to be trained on."""
        return 1.0

    def prepare(self, tools: Tools) -> None:
        """Refuse, before anything is drawn, what could not be scored later.

        Raises:
            PosttrainError: what was found, what was expected, what to do.
        """

    def score(self, groups: Sequence[Group], tools: Tools) -> Sequence[Group]:
        """The same groups in the same order, with its columns on every member."""
        raise NotImplementedError


def bound(signal: Signal, tools: Tools) -> Score:
    """A signal at work in a stage, after it has refused what it could not score."""
    signal.prepare(tools)

    def score(groups: Sequence[Group]) -> Sequence[Group]:
        return signal.score(groups, tools)

    return score


# --- terms -----------------------------------------------------------------------------------


class Limit(Config):
    """Which of the units that a term may read it does read; ``where`` limits by author.

    ``entropy_share`` keeps, *in every sequence*, the ⌈share · n⌉ of its n readable tokens at which
    the policy is least sure. It costs nothing, since the choice depends on nothing outside of the
    sequence. The price: a sequence that is sure throughout still keeps its share.

    ``marked`` keeps tokens that a signal marked: ``mark_entropy`` compares those of a whole draw,
    as papers do (arXiv 2506.01939), in a pass over the draw before its first update.

    ``rewards: positive`` keeps sequences with a reward above 0, ``negative`` all others (a
    verifier's 0 is negative).

    ``preference`` keeps the chosen, or the rejected, answers of pairs: cross-entropy on chosen
    answers is what several methods add to a loss on pairs.
    """

    entropy_share: float | None = None
    marked: bool = False
    rewards: Literal["any", "positive", "negative"] = "any"
    preference: Literal["any", "chosen", "rejected"] = "any"

    def __post_init__(self) -> None:
        if self.entropy_share is not None and not 0 < self.entropy_share < 1:
            raise ConfigError(
                f"limit with entropy_share={self.entropy_share}",
                expected="above 0 and below 1; null reads every token",
            )

    @property
    def needs(self) -> Columns:
        """Columns that the limit itself reads."""
        by_reward = NONE if self.rewards == "any" else frozenset({Column.REWARD})
        by_pair = NONE if self.preference == "any" else frozenset({Column.PREFERENCE})
        return by_reward | by_pair | (frozenset({Column.MARK}) if self.marked else NONE)


class WeightSchedule(Config):
    """A term's weight moves from ``weight`` at the first update to ``end`` at the last one."""

    end: float
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if not math.isfinite(self.end):
            raise ConfigError(f"weight_schedule with end={self.end}", expected="a finite number")

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
"""What a term reads of the policy: float32 [N] each, N trained tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """A term's loss per unit, and what to show: numbers per unit, averaged like the loss."""

    loss: Tensor
    shown: Mapping[str, Tensor] = field(default_factory=dict)


class Term(Part):
    """A loss per token, step, sequence or pair, and its share in the objective.

    ``where`` limits the authors whose tokens it reads; empty means all that it accepts. Each term
    is averaged over its own units, in :mod:`posttrain.training.reduce` and nowhere else.
    ``reads`` names statistics of the policy; they carry the gradient. Columns are constants.
    """

    role: ClassVar[str] = "term"
    declares: ClassVar[tuple[str, ...]] = ("values",)
    unit: ClassVar[Unit] = "token"
    accepts: ClassVar[frozenset[Kind]] = ANYONE  # authors on whose tokens it means what it says
    by_divergence: ClassVar[bool] = False  # of a teacher it reads divergences, and no log-probs

    weight: float = 1.0
    where: tuple[Kind, ...] = ()
    limit: Limit = Limit()
    weight_schedule: WeightSchedule | None = None  # null: constant

    @property
    def aggregate(self) -> str:
        """How units are averaged: an :data:`Aggregate` on terms over tokens."""
        return "token_mean"

    @property
    def needs(self) -> Columns:
        """Columns that must stand beside the tokens it reads."""
        return NONE

    @property
    def reads(self) -> frozenset[Wanted]:
        """What the output head computes for it."""
        return frozenset({Stat.LOGPROB})

    @property
    def readable(self) -> frozenset[Kind]:
        """Kinds of author whose tokens it reads: what it accepts, limited by ``where``."""
        return self.accepts & frozenset(self.where) if self.where else self.accepts

    def values(self, stats: Stats, batch: PackedBatch) -> Values:
        """The loss of every unit: [N] tokens, [S] sequences or [P] pairs."""
        raise NotImplementedError

    def signals(self, reference: PolicyRef) -> tuple[Signal, ...]:
        """What a method that is this term alone must add, beside log-probs of its reference."""
        return ()

    # What a term remembers of earlier updates. The learner keeps it, by name, with its weights.

    @property
    def moves(self) -> bool:
        """True when its weight is not the same at every update."""
        return self.weight_schedule is not None

    def factor(self, memory: Mapping[str, float]) -> float:
        """What its weight is multiplied by, for what it remembers."""
        return 1.0

    def remember(
        self, memory: Mapping[str, float], metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        """What it remembers once an update gave these metrics of its own."""
        return {}


class TokenTerm(Term):
    """A loss per token, averaged as ``aggregate`` says."""

    aggregate: Aggregate = "token_mean"


# --- the stage around them -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a part sees of its stage when it is asked whether it can work there."""

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
            >>> scene = Scene(stage="warm", source=Dataset(path="a.jsonl"), signals=(), terms=(),
            ...               kinds=ANYONE)
            >>> scene.refuse("no term").found
            'stage warm: no term'
        """
        return LegalityError(f"stage {self.stage}: {found}", expected=expected, fix=fix)
