"""The record: one trajectory type for demonstrations, preferences, teacher output and rollouts.

A :class:`Trajectory` records tokens and their authors, and is immutable. What signals compute for
it (a reward, an advantage, a reference log-prob) is stored in the columns of a :class:`Scored`, so
the same trajectory can be scored again, or replayed under another objective.

Shape legend: ``T`` tokens of one trajectory, ``K`` entries of a top-k distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import DataError
from posttrain.core.provenance import IntArray, Kind, Span

Array = npt.NDArray[Any]


class End(StrEnum):
    """Why a trajectory ended."""

    COMPLETED = "completed"  # the author ended the turn
    LENGTH = "length"  # the token budget was reached
    CONTEXT = "context"  # the model's context was full


class Column(StrEnum):
    """Columns of a scored trajectory. Per-token columns are [T, ...], the others scalars."""

    BEHAVIOUR_LOGPROB = "behaviour_logprob"  # [T] under the distribution it was sampled from
    REFERENCE_LOGPROB = "reference_logprob"  # [T] under the frozen reference
    TEACHER_IDS = "teacher_ids"  # [T, K] the teacher's K most likely tokens
    TEACHER_LOGPROBS = "teacher_logprobs"  # [T, K] their log-probs
    TEACHER_STATES = "teacher_states"  # [T, X] the teacher's hidden states, in place of these
    TEACHER_HEAD = "teacher_head"  # scalar: index of that teacher's head in the objective
    TEACHER_LOGPROB = "teacher_logprob"  # [T] the teacher's log-prob of the trajectory's token
    TEACHER_SORTED = "teacher_sorted"  # [T, K] log-probs of another vocabulary, largest first
    TEACHER_ALIGNED = "teacher_aligned"  # [T] 1 where TEACHER_SORTED follows the same text, else 0
    ADVANTAGE = "advantage"  # [T]
    REWARD = "reward"  # scalar
    PREFERENCE = "preference"  # scalar: +1 chosen, -1 rejected
    TRAINER_LOGPROB = "trainer_logprob"  # [T] computed by the learner before the update
    TOKEN_REWARD = "token_reward"  # [T] added to the reward at single tokens: penalties
    MARK = "mark"  # [T] 1 at tokens that a signal selected, else 0
    BASELINE = "baseline"  # scalar: the reward of the policy's greedy completion
    DISCARD = "discard"  # scalar: 0 to train on it, else the index of a Discard
    WEIGHT = "weight"  # scalar: weight of a row of a data set
    LABEL = "label"  # scalar: +1 good, -1 bad, judged without a comparison
    MISMATCHED_KL = "mismatched_kl"  # scalar: mean log-ratio of completions of other prompts
    LOG_RATIO_CENTRE = "log_ratio_centre"  # scalar: between the log-ratios of good and bad ones
    MARGIN = "margin"  # scalar: target difference between the scores of a pair
    STEP_LABEL = "step_label"  # [T] 0 to 1 where a labelled step ends, -1 elsewhere
    STEP_REWARD = "step_reward"  # [T] process reward of the step that ends there
    OLD_VALUE = "old_value"  # [T] the critic's value before each token, before the update
    RETURN = "return"  # [T] return from each token on: the critic's target
    QUANTILE = "quantile"  # scalar: the value of the same rank that it is compared with

    @property
    def per_token(self) -> bool:
        """True when the column has one entry per token."""
        return self not in SCALARS


SCALARS = frozenset(
    {
        Column.REWARD,
        Column.PREFERENCE,
        Column.BASELINE,
        Column.DISCARD,
        Column.LABEL,
        Column.MISMATCHED_KL,
        Column.LOG_RATIO_CENTRE,
        Column.QUANTILE,
        Column.WEIGHT,
        Column.MARGIN,
        Column.TEACHER_HEAD,
    }
)
"""Columns with one number per trajectory."""

IN_PLACE = {
    Column.TEACHER_LOGPROBS: Column.TEACHER_STATES,
    Column.TEACHER_IDS: Column.TEACHER_HEAD,
}
"""Columns that may replace another: a distribution over the vocabulary is the teacher's head
applied to its hidden states, which are far fewer numbers."""


class Discard(StrEnum):
    """Why a signal leaves a member out of the update. It stays in its group's statistics."""

    KEPT = "kept"
    EQUAL_REWARDS = "equal rewards"  # no member of the group is better than another
    CUT_OFF = "cut off"  # the token budget ended the completion: its reward is unreliable
    LOW_REWARD = "reward too low"
    NOT_BEST = "not among the best"  # of its group
    DUPLICATE = "duplicate"  # of an earlier completion of its group
    NO_ADVANTAGE = "no advantage"  # not better than the baseline
    UNRANKED = "unranked"  # neither the best nor the worst of its group
    NO_SUCCESS = "no successful sibling"  # for the teacher's context
    SURPLUS = "surplus"  # usable, and the step had enough
    IMITATED = "a demonstration instead"  # the group failed: its demonstration is trained on
    NOT_NEEDED = "demonstration not needed"  # the group succeeded often enough without it

    @property
    def code(self) -> int:
        """Its value in the ``DISCARD`` column."""
        return tuple(Discard).index(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """Immutable record of one sequence. Its spans cover the tokens exactly.

    Tokens before ``prompt_length`` are context and are never trained on. Trajectories of one
    group with the same context share its computation.

    Example:
        >>> from posttrain.core.provenance import Producer, Role
        >>> book = Producer(kind=Kind.EXTERNAL, name="book")
        >>> t = Trajectory(task="sums/0", tokens=np.array([5, 6, 7], np.int32), prompt_length=1,
        ...                spans=(Span(length=1, role=Role.USER, producer=book),
        ...                       Span(length=2, role=Role.ASSISTANT, producer=book)))
        >>> t.trainable.tolist()
        [False, True, True]
    """

    task: str  # "<task set>/<task id>"
    tokens: IntArray  # [T]
    prompt_length: int
    spans: tuple[Span, ...]
    end: End = End.COMPLETED
    parent: str | None = None  # id of the trajectory that this one branches from or edits

    def __post_init__(self) -> None:
        tiled = sum(s.length for s in self.spans)
        if self.tokens.ndim != 1 or tiled != len(self.tokens):
            raise DataError(f"spans over {tiled} tokens, tokens of shape {self.tokens.shape}")
        if not 0 <= self.prompt_length <= len(self.tokens):
            raise DataError(f"prompt_length {self.prompt_length} of {len(self.tokens)} tokens")
        self.tokens.flags.writeable = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def id(self) -> str:
        """Content hash of task, tokens and authors, 16 hex digits. The same text by another
        author or learner version has another id."""
        h = hashlib.sha256(f"{self.task}|{self.prompt_length}|{self.end}|{self.parent}".encode())
        h.update(np.ascontiguousarray(self.tokens, np.int32).tobytes())
        for s in self.spans:
            h.update(f"{s.length}|{s.role}|{s.producer}|{s.versions}|{s.sampling}".encode())
        return h.hexdigest()[:16]

    @property
    def trainable(self) -> npt.NDArray[np.bool_]:
        """[T] True where an authored assistant token follows the prompt."""
        mask = self.spread(lambda s: s.is_authored).astype(np.bool_)
        mask[: self.prompt_length] = False
        return mask

    @property
    def authors(self) -> frozenset[Kind]:
        """Kinds of producers of the trained tokens."""
        at, found = 0, set[Kind]()
        for span in self.spans:
            at += span.length
            if span.is_authored and at > self.prompt_length:
                found.add(span.producer.kind)
        return frozenset(found)

    @property
    def answer_start(self) -> int:
        """Index of the last answer's first token: before ``prompt_length`` if the prompt holds
        the answer's beginning."""
        ends = np.cumsum([s.length for s in self.spans])
        start = self.prompt_length
        for span, end in zip(reversed(self.spans), reversed(ends), strict=True):
            if end == start and span.is_authored:
                start -= span.length
        return start

    def spread(self, of: Callable[[Span], Any]) -> Array:
        """[T] array of a per-span value: a scalar, or an array [length]."""
        parts = [np.broadcast_to(np.asarray(of(s)), (s.length,)) for s in self.spans]
        return np.concatenate(parts)

    @property
    def behaviour_logprobs(self) -> npt.NDArray[np.float32]:
        """[T] log-probs recorded by the producers; NaN where unknown."""
        known = self.spread(lambda s: np.nan if s.logprobs is None else s.logprobs)
        return known.astype(np.float32)

    def age(self, version: int) -> int:
        """Learner versions between the oldest live span and ``version``; 0 with no live span."""
        firsts = [s.versions[0] for s in self.spans if s.versions is not None]
        return version - min(firsts) if firsts else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """A trajectory and its columns. A missing column was not computed; it is not zero."""

    trajectory: Trajectory
    columns: Mapping[Column, Array] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        num_tokens = len(self.trajectory)
        for column, values in self.columns.items():
            fits = values.shape[:1] == (num_tokens,) if column.per_token else values.shape == ()
            if not fits:
                want = f"[{num_tokens}, ...]" if column.per_token else "a scalar array"
                raise DataError(f"column {column} of shape {values.shape}", expected=want)

    def with_columns(self, columns: Mapping[Column, Array]) -> Scored:
        """A new ``Scored`` with these columns added. The trajectory is shared, not copied."""
        return replace(self, columns=MappingProxyType({**self.columns, **columns}))

    def scalar(self, column: Column) -> float | None:
        """The value of a scalar column, or None when it is missing."""
        value = self.columns.get(column)
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Trajectories of the same prompt: G rollouts, one pair, or one demonstration."""

    task: str
    members: tuple[Scored, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise DataError(f"an empty group for task {self.task}")
