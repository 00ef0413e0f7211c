"""The record: one trajectory type for demonstrations, preferences, teacher output and rollouts.

A :class:`Trajectory` says what happened and is never changed. What somebody thinks of it (a
reward, an advantage, a reference log-prob) stands *beside* it in a :class:`Scored`, so the same
trajectory can be judged again, or replayed under another objective.

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
    """Why a trajectory stopped."""

    COMPLETED = "completed"  # the author ended the turn
    LENGTH = "length"  # the token budget ended it
    CONTEXT = "context"  # the model's context ended it


class Column(StrEnum):
    """What can stand beside a trajectory. Per-token columns are [T, ...], the others scalars."""

    BEHAVIOUR_LOGPROB = "behaviour_logprob"  # [T] under the distribution that was sampled
    REFERENCE_LOGPROB = "reference_logprob"  # [T] under the frozen reference
    TEACHER_IDS = "teacher_ids"  # [T, K] the teacher's K most likely tokens
    TEACHER_LOGPROBS = "teacher_logprobs"  # [T, K] their log-probs
    TEACHER_STATES = "teacher_states"  # [T, X] what the teacher's head reads, in their place
    TEACHER_HEAD = "teacher_head"  # scalar: which head that is, by its number in the objective
    TEACHER_LOGPROB = "teacher_logprob"  # [T] the teacher's log-prob of the written token
    TEACHER_SORTED = "teacher_sorted"  # [T, K] log-probs of another vocabulary, largest first
    TEACHER_ALIGNED = "teacher_aligned"  # [T] 1 where TEACHER_SORTED follows the same text, else 0
    ADVANTAGE = "advantage"  # [T]
    REWARD = "reward"  # scalar
    PREFERENCE = "preference"  # scalar: +1 chosen, -1 rejected
    TRAINER_LOGPROB = "trainer_logprob"  # [T] the learner's own scoring, before it was updated
    TOKEN_REWARD = "token_reward"  # [T] added to the reward where it was earned: penalties
    MARK = "mark"  # [T] 1 at tokens that a signal singled out, else 0
    BASELINE = "baseline"  # scalar: the reward that the policy's likeliest answer got
    DISCARD = "discard"  # scalar: 0 to train on it, else the index of a Discard
    WEIGHT = "weight"  # scalar: how much a row of a data set counts
    LABEL = "label"  # scalar: +1 good, -1 bad, judged without a comparison
    MISMATCHED_KL = "mismatched_kl"  # scalar: mean log-ratio of other prompts' answers
    LOG_RATIO_CENTRE = "log_ratio_centre"  # scalar: between those of good and of bad answers
    MARGIN = "margin"  # scalar: how far apart the sides of a pair should be scored
    STEP_LABEL = "step_label"  # [T] 0 to 1 where a labelled step ends, -1 elsewhere
    STEP_REWARD = "step_reward"  # [T] what a process model gives the step that ends there
    OLD_VALUE = "old_value"  # [T] what the critic expected before each token, before the update
    RETURN = "return"  # [T] what was really still to come at each token: the critic's target
    QUANTILE = "quantile"  # scalar: the value of the same rank that an answer is compared with

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
"""What may stand beside a trajectory in place of a column: a distribution over the vocabulary is
the teacher's head applied to its hidden states, which are far fewer numbers."""


class Discard(StrEnum):
    """Why a signal keeps a member out of the update. It stays in its group's statistics."""

    KEPT = "kept"
    EQUAL_REWARDS = "equal rewards"  # nothing in the group is better than anything else
    CUT_OFF = "cut off"  # the token budget ended the answer, so its reward says little
    LOW_REWARD = "reward too low"
    NOT_BEST = "not among the best"  # of its group
    DUPLICATE = "duplicate"  # of an earlier answer of its group
    NO_ADVANTAGE = "no advantage"  # not better than the baseline
    UNRANKED = "unranked"  # neither the best nor the worst of its group
    NO_SUCCESS = "no successful sibling"  # that could be shown to a teacher
    SURPLUS = "surplus"  # worth training on, and the step had enough
    IMITATED = "a demonstration instead"  # the group failed, and is shown how
    NOT_NEEDED = "demonstration not needed"  # the group did well enough by itself

    @property
    def code(self) -> int:
        """What the ``DISCARD`` column holds."""
        return tuple(Discard).index(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """Immutable record of one branch of text. Its spans tile the tokens exactly.

    Tokens before ``prompt_length`` are context: nothing there is ever trained, and trajectories
    of one group that share them share their computation.

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
    parent: str | None = None  # id of the trajectory this one was branched or edited from

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
        """Content hash of task, tokens and authors, 16 hex digits: equal text by another author
        or learner version is another trajectory."""
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
        """Kinds of producers with tokens that are trained."""
        at, found = 0, set[Kind]()
        for span in self.spans:
            at += span.length
            if span.is_authored and at > self.prompt_length:
                found.add(span.producer.kind)
        return frozenset(found)

    @property
    def answer_start(self) -> int:
        """Where the last answer begins: before ``prompt_length`` if its beginning was given."""
        ends = np.cumsum([s.length for s in self.spans])
        start = self.prompt_length
        for span, end in zip(reversed(self.spans), reversed(ends), strict=True):
            if end == start and span.is_authored:
                start -= span.length
        return start

    def spread(self, of: Callable[[Span], Any]) -> Array:
        """[T] array from a per-span value: a scalar, or an array [length]."""
        parts = [np.broadcast_to(np.asarray(of(s)), (s.length,)) for s in self.spans]
        return np.concatenate(parts)

    @property
    def behaviour_logprobs(self) -> npt.NDArray[np.float32]:
        """[T] log-probs recorded by the producers; NaN where unknown, since unknown is not 0."""
        known = self.spread(lambda s: np.nan if s.logprobs is None else s.logprobs)
        return known.astype(np.float32)

    def age(self, version: int) -> int:
        """Learner versions between the oldest live span and ``version``; 0 with no live span."""
        firsts = [s.versions[0] for s in self.spans if s.versions is not None]
        return version - min(firsts) if firsts else 0

    def tokens_by_kind(self) -> dict[Kind, int]:
        """Tokens per kind of producer."""
        counts: dict[Kind, int] = {}
        for s in self.spans:
            counts[s.producer.kind] = counts.get(s.producer.kind, 0) + s.length
        return counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """A trajectory and what was said about it. A missing column means never asked, not zero."""

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
        """A new ``Scored`` with these columns added. The trajectory is shared, never copied."""
        return replace(self, columns=MappingProxyType({**self.columns, **columns}))

    def scalar(self, column: Column) -> float | None:
        """The value of a scalar column, or None when nobody wrote it."""
        value = self.columns.get(column)
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Trajectories that answer the same prompt: G rollouts, one pair, or one demonstration."""

    task: str
    members: tuple[Scored, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise DataError(f"an empty group for task {self.task}")
