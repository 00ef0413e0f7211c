"""Packing: scored groups become flat tensors. The only place where tokens shift.

    group: prompt p, completions a, b        packed tokens_T       read by
    ──────────────────────────────────       ─────────────────     ───────────────────
    p₀ p₁ p₂ | a₀ a₁ ⏎                        p₀ p₁ p₂              all below
             | b₀ ⏎                           a₀ a₁                 after p₀ p₁ p₂
                                              b₀                    after p₀ p₁ p₂

There is no padding. A prompt that several sequences share (rollouts of one group, both sides of a
pair) is stored once. A sequence's last token is a target only and is not computed, unless a term
reads the hidden state *after* it (``whole``). The hidden state that predicts a completion's first
token belongs to the shared prompt, so ``predict_N`` may hold one position several times.

Shape legend: ``T`` packed tokens, ``N`` trained tokens, ``S`` sequences, ``P`` pairs, ``K``
entries of a top-k distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from posttrain.core.errors import LegalityError
from posttrain.core.provenance import Kind, Span
from posttrain.core.trajectory import IN_PLACE, Column, Group, Scored, Trajectory

KINDS = tuple(Kind)
"""``kind_N`` holds indices into this tuple."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of packed tokens that attends to itself causally, and to all of its parent.

    ``parent`` is the index of the segment with the shared prompt, or None for a root.
    """

    start: int
    length: int
    parent: int | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """One micro-batch. Integer tensors are int64, the others float32."""

    tokens_T: Tensor
    positions_T: Tensor  # position within the sequence, for the rotary embedding
    segments: tuple[Segment, ...]
    predict_N: Tensor  # index in T of the hidden state that predicts the trained token
    after_N: Tensor  # index in T of the hidden state after it; -1 where it was not computed
    target_N: Tensor  # the trained token
    sequence_N: Tensor  # index in S
    kind_N: Tensor  # kind of its author, index in KINDS
    temperature_N: Tensor  # temperature it was sampled at, 1 when it was not sampled
    columns: Mapping[Column, Tensor]  # [N, ...] for per-token columns, [S] for scalars
    pairs_P2: Tensor  # (chosen, rejected), indices in S
    num_sequences: int

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes."""
        return int(self.tokens_T.shape[0])

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in (
                "tokens_T",
                "positions_T",
                "predict_N",
                "after_N",
                "target_N",
                "sequence_N",
                "kind_N",
                "temperature_N",
                "pairs_P2",
            )
        }
        columns = {c: v.to(device) for c, v in self.columns.items()}
        return replace(self, columns=columns, **moved)

    def where(self, kinds: Iterable[Kind]) -> Tensor:
        """[N] bool: tokens written by these kinds of producer. No kinds means all."""
        wanted = [KINDS.index(k) for k in kinds]
        if not wanted:
            return torch.ones_like(self.kind_N, dtype=torch.bool)
        return torch.isin(self.kind_N, torch.tensor(wanted, device=self.kind_N.device))

    def only(self, selected_N: Tensor) -> PackedBatch:
        """The batch with only these tokens trained.

        Sequences without a selected token are left out, with their pairs, and the others are
        renumbered. The tokens that the model computes do not change.
        """
        if bool(selected_N.all()):
            return self
        kept_S = torch.zeros(self.num_sequences, dtype=torch.bool, device=selected_N.device)
        kept_S[self.sequence_N[selected_N]] = True
        number_S = kept_S.cumsum(0) - 1
        return replace(
            self,
            predict_N=self.predict_N[selected_N],
            after_N=self.after_N[selected_N],
            target_N=self.target_N[selected_N],
            sequence_N=number_S[self.sequence_N[selected_N]],
            kind_N=self.kind_N[selected_N],
            temperature_N=self.temperature_N[selected_N],
            columns={c: v[selected_N if c.per_token else kept_S] for c, v in self.columns.items()},
            pairs_P2=number_S[self.pairs_P2[kept_S[self.pairs_P2].all(-1)]],
            num_sequences=int(kept_S.sum()),
        )


Needs = frozenset[Column] | Mapping[Column, frozenset[Kind]]
"""Required columns: at every trained token, or at those of the given kinds of author."""


def pack(
    groups: Sequence[Group],
    *,
    needs: Needs,
    max_tokens: int,
    group_tokens: int | None = None,
    whole: bool = False,
) -> list[PackedBatch]:
    """Pack groups into micro-batches of at most ``max_tokens`` computed tokens.

    A pair is never split, and a group only if it is longer than ``group_tokens``: the prompt
    of a split group is computed again. A group or a single sequence longer than ``max_tokens``
    gets its own batch.

    Args:
        groups: scored trajectories. Every member must have the columns that its authors' tokens
            need; a column may be missing, or not finite, elsewhere.
        needs: columns to include, aligned with the trained tokens. Missing values are NaN in the
            batch (-1 for ids), never a number that arithmetic would take for a value.
        max_tokens: budget of a micro-batch.
        group_tokens: longest group that is not split; None for ``max_tokens``.
        whole: compute last tokens too, for terms that read the hidden state after a token.

    Raises:
        LegalityError: a needed column is missing or not finite at a token that needs it.
    """
    if not isinstance(needs, Mapping):
        needs = dict.fromkeys(needs, frozenset(KINDS))
    batches: list[PackedBatch] = []
    builder = _Builder(needs, whole)
    longest = group_tokens or max_tokens
    for unit in _units(groups, lambda g: _Builder({}, whole).cost(g.members) <= longest):
        if builder.num_tokens and builder.num_tokens + builder.cost(unit) > max_tokens:
            batches.append(builder.build())
            builder = _Builder(needs, whole)
        builder.add(unit)
    if builder.num_tokens:
        batches.append(builder.build())
    return batches


def pack_trajectories(
    trajectories: Sequence[Trajectory], *, max_tokens: int, whole: bool = False
) -> list[tuple[PackedBatch, list[int]]]:
    """Pack trajectories without columns for scoring: batches, each with its indices in order."""
    packed: list[tuple[PackedBatch, list[int]]] = []
    builder, members = _Builder({}, whole), list[int]()
    for index, trajectory in enumerate(trajectories):
        unit = [Scored(trajectory=trajectory)]
        if members and builder.num_tokens + builder.cost(unit) > max_tokens:
            packed.append((builder.build(), members))
            builder, members = _Builder({}, whole), []
        builder.add(unit)
        members.append(index)
    if members:
        packed.append((builder.build(), members))
    return packed


def _units(groups: Sequence[Group], fits: Callable[[Group], bool]) -> Iterable[list[Scored]]:
    """Members that share a micro-batch: those of a group that fits, or that has preferences."""
    for group in groups:
        if any(Column.PREFERENCE in m.columns for m in group.members) or fits(group):
            yield list(group.members)
        else:
            yield from ([member] for member in group.members)


def _temperature(span: Span) -> float:
    return span.sampling.temperature if span.sampling else 1.0


def _filled(parts: Sequence[np.ndarray | int], column: Column) -> list[np.ndarray]:
    """Each number of missing rows replaced by rows of NaN (-1 for ids)."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    shape = max(part.shape[1:] for part in arrays)
    fill = -1 if column is Column.TEACHER_IDS else np.nan
    out = [np.full((part, *shape), fill) if isinstance(part, int) else part for part in parts]
    if column is not Column.TEACHER_STATES:
        return out
    # Teachers may have different hidden sizes: shorter rows are padded with NaN.
    return [np.pad(p, ((0, 0), (0, shape[0] - p.shape[1])), constant_values=fill) for p in out]


@dataclass(slots=True, eq=False)
class _Builder:
    """Collects one micro-batch in numpy; ``build`` turns it into tensors."""

    needs: Mapping[Column, frozenset[Kind]]
    whole: bool = False
    num_tokens: int = 0
    num_sequences: int = 0
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    prompts: dict[bytes, int] = field(default_factory=dict)  # prompt tokens -> segment index
    predict: list[np.ndarray] = field(default_factory=list)
    after: list[np.ndarray] = field(default_factory=list)
    target: list[np.ndarray] = field(default_factory=list)
    sequence: list[np.ndarray] = field(default_factory=list)
    kind: list[np.ndarray] = field(default_factory=list)
    temperature: list[np.ndarray] = field(default_factory=list)
    columns: dict[Column, list[np.ndarray | int]] = field(default_factory=dict)  # int: rows to fill
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def cost(self, unit: Sequence[Scored]) -> int:
        """Computed tokens that the unit would add, shared prompts counted once."""
        seen, total = set(self.prompts), 0
        for member in unit:
            trajectory = member.trajectory
            key = trajectory.tokens[: trajectory.prompt_length].tobytes()
            total += max(len(trajectory) - (not self.whole) - trajectory.prompt_length, 0)
            if key not in seen:
                total += trajectory.prompt_length
                seen.add(key)
        return total

    def add(self, unit: Sequence[Scored]) -> None:
        first = self.num_sequences
        for member in unit:
            self._add_member(member)
        signs = [m.scalar(Column.PREFERENCE) for m in unit]
        chosen = [first + i for i, s in enumerate(signs) if s is not None and s > 0]
        rejected = [first + i for i, s in enumerate(signs) if s is not None and s < 0]
        self.pairs.extend((c, r) for c in chosen for r in rejected)

    def _segment(self, tokens: np.ndarray, *, offset: int, parent: int | None) -> int:
        """Append a run of tokens; returns the index of its segment."""
        self.segments.append(Segment(self.num_tokens, len(tokens), parent))
        self.tokens.append(tokens)
        self.positions.append(np.arange(offset, offset + len(tokens)))
        self.num_tokens += len(tokens)
        return len(self.segments) - 1

    def _add_member(self, member: Scored) -> None:
        trajectory = member.trajectory
        cut = trajectory.prompt_length
        computed = len(trajectory) - (not self.whole)
        prompt, rest = trajectory.tokens[:cut], trajectory.tokens[cut:computed]
        parent: int | None = None
        if cut:
            key = prompt.tobytes()
            if key not in self.prompts:
                self.prompts[key] = self._segment(prompt, offset=0, parent=None)
            parent = self.prompts[key]
        own_start = self.num_tokens
        if len(rest):
            self._segment(rest, offset=cut, parent=parent)

        trained = np.flatnonzero(trajectory.trainable)
        trained = trained[trained > 0]  # nothing precedes the first token to predict it
        before = trained - 1
        prompt_start = self.segments[parent].start if parent is not None else 0
        in_prompt = before < cut
        self.predict.append(np.where(in_prompt, prompt_start + before, own_start + before - cut))
        self.after.append(np.where(trained < computed, own_start + trained - cut, -1))
        self.target.append(trajectory.tokens[trained])
        self.sequence.append(np.full(len(trained), self.num_sequences))
        kinds = trajectory.spread(lambda s: KINDS.index(s.producer.kind))[trained]
        self.kind.append(kinds)
        self.temperature.append(trajectory.spread(_temperature)[trained])
        self._add_columns(member, trained, kinds)
        self.num_sequences += 1

    def _add_columns(self, member: Scored, trained: np.ndarray, kinds: np.ndarray) -> None:
        for column, readers in self.needs.items():
            read = np.isin(kinds, [KINDS.index(k) for k in readers])
            other = IN_PLACE.get(column)
            if other is not None:
                present = other in member.columns
                self._add_column(other, member, trained, read & present)
                read = read & (not present)
            self._add_column(column, member, trained, read)

    def _add_column(
        self, column: Column, member: Scored, trained: np.ndarray, read: np.ndarray
    ) -> None:
        """The member's rows of a column, which must be present where ``read``."""
        parts = self.columns.setdefault(column, [])
        if column not in member.columns:
            if not read.any():
                parts.append(len(trained) if column.per_token else 1)
                return
            raise LegalityError(
                f"a trajectory of task {member.trajectory.task} has no {column}",
                expected=f"every trained trajectory to carry {column}",
                fix="add the signal that writes it, or filter these trajectories out",
            )
        values = member.columns[column]
        chosen = values[trained] if column.per_token else values[None]
        needed = chosen[read] if column.per_token else chosen[: int(read.any())]
        if not np.isfinite(needed).all():
            raise LegalityError(
                f"{column} is not finite on a trajectory of task {member.trajectory.task}",
                expected="a number at every trained token",
            )
        parts.append(chosen)

    def build(self) -> PackedBatch:
        def joined(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(dtype)

        def typed(column: Column) -> torch.dtype:
            return torch.int64 if column is Column.TEACHER_IDS else torch.float32

        return PackedBatch(
            tokens_T=joined(self.tokens, torch.int64),
            positions_T=joined(self.positions, torch.int64),
            segments=tuple(self.segments),
            predict_N=joined(self.predict, torch.int64),
            after_N=joined(self.after, torch.int64),
            target_N=joined(self.target, torch.int64),
            sequence_N=joined(self.sequence, torch.int64),
            kind_N=joined(self.kind, torch.int64),
            temperature_N=joined(self.temperature, torch.float32),
            columns={
                c: joined(_filled(parts, c), typed(c))
                for c, parts in self.columns.items()
                if any(isinstance(part, np.ndarray) for part in parts)
            },
            pairs_P2=torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
            num_sequences=self.num_sequences,
        )
