"""Keys and values of the rows being decoded, written in place, and attention over them.

    prefix [P, J, L, D]   one copy per prompt, read once for all its rows ──┐
                                                                            ├─ one softmax ─▶ out
    own    [S, J, C, D]   each row's sampled tokens, written in place ──────┘

All rows of a prompt read its prefix together: their queries are folded into one matrix, so the
prefix passes through the caches once, whatever the number of rows. The prefix part returns an
output and a log-sum-exp; the own part adds them as one more key, so the softmax over both is
exact.

Not run on a GPU yet: nothing here reads a value from the device, and with ``static=True`` no shape
changes between two calls of ``arrange`` and no number comes from the host, as a CUDA graph needs
(:func:`capture`). The static form is tested on a CPU; :func:`capture` itself has never run.

Shape legend: ``S`` row slots, ``P`` prompt slots, ``G`` rows of the prompt with most, ``H`` query
heads, ``J`` key/value heads, ``I`` query heads per key/value head, ``D`` head size
(``E`` that of values), ``L`` prefix columns, ``C`` own columns, ``X`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.engines.local.attention import PackedPlan

HIDDEN = -1e30
"""Added to masked scores. Finite: a row whose whole prefix is masked (beyond a sliding window) gets
weight exp(−1e30) = 0 for it, where −inf would give NaN."""

COLUMNS = 64
"""Initial number of own columns; it doubles as completions grow."""


@dataclass(slots=True, eq=False)
class PrefillPlan:
    """Packed attention over prompts that stores every layer's keys and values."""

    packed: PackedPlan
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        self.kept.append((k, v))
        return self.packed.attend(q, k, v, scaling=scaling, window=window)


@dataclass(slots=True, eq=False)
class _Layer:
    """Storage of one layer: of one call of attention, since a layer may attend twice."""

    prefix_k: Tensor  # [P, J, L, D]
    prefix_v: Tensor  # [P, J, L, E]
    own_k: Tensor  # [S, J, C, D]
    own_v: Tensor  # [S, J, C, E]


@dataclass(slots=True, eq=False)
class DecodePlan:
    """One new token per row slot. :meth:`arrange` assigns a prompt slot to each row slot.

    ``age`` of a row is the number of its tokens whose keys and values are stored; the token of
    this step goes to that column. Layers are known by the order in which they attend, which is
    that of the prefill.
    """

    most_columns: int
    static: bool = False
    layers: list[_Layer] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of each prompt slot
    num_rows: int = 0
    age_S: Tensor = field(init=False)
    _length_S: Tensor = field(init=False)
    _row_S: Tensor = field(init=False)
    _row_PG: Tensor = field(init=False)
    _place_S: Tensor = field(init=False)  # of each row, in P·G
    _folds: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _next: int = 0  # layer that attends next
    _oldest: int = 0
    _same_age: bool = True
    _padding: Tensor | None = None
    _masks: dict[int | None, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    # --- storage ---

    def store(self, slots: Sequence[int], lengths: Sequence[int], prefill: PrefillPlan) -> None:
        """Store the keys and values of newly prefilled prompts, packed one after the other."""
        device = prefill.kept[0][0].device
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        width = max(lengths)
        gather = np.minimum(np.arange(width), np.array(lengths)[:, None] - 1) + starts[:, None]
        gather_PL = torch.from_numpy(gather).to(device)
        slots_P = torch.tensor(slots, device=device)
        num = max(len(self.lengths), max(slots) + 1)
        self.lengths += [0] * (num - len(self.lengths))
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        self.layers = self.layers or [_Layer(*map(_empty, (k, v, k, v))) for k, v in prefill.kept]
        for layer, (k, v) in zip(self.layers, prefill.kept, strict=True):
            layer.prefix_k = _grown(layer.prefix_k, num, width)
            layer.prefix_v = _grown(layer.prefix_v, num, width)
            layer.prefix_k[:, :, :width].index_copy_(0, slots_P, k[gather_PL].transpose(1, 2))
            layer.prefix_v[:, :, :width].index_copy_(0, slots_P, v[gather_PL].transpose(1, 2))

    def keep(self, prompts: Sequence[int], rows: Sequence[int]) -> None:
        """Drop every prompt and row slot but these; they are renumbered in this order."""
        self.lengths = [self.lengths[p] for p in prompts]
        for layer in self.layers:
            if len(prompts) < layer.prefix_k.shape[0]:
                at = torch.tensor(prompts, device=layer.prefix_k.device)
                width = max(self.lengths, default=0)
                layer.prefix_k = layer.prefix_k[:, :, :width].index_select(0, at)
                layer.prefix_v = layer.prefix_v[:, :, :width].index_select(0, at)
            at = torch.tensor(rows, device=layer.own_k.device)
            # Rows that have just entered may have no storage yet: they have stored nothing.
            layer.own_k = _grown(layer.own_k, max(rows) + 1, 0).index_select(0, at)
            layer.own_v = _grown(layer.own_v, max(rows) + 1, 0).index_select(0, at)

    def arrange(self, prompt_of_row: np.ndarray, ages: np.ndarray) -> None:
        """Set the prompt slot of each row slot, and how many own tokens each has stored.

        Call it when rows enter, leave or are renumbered; between two calls every row's age grows
        by one per :meth:`advance`. Every slot, empty or not, needs an age of 0 or more.
        """
        assert ages.min() >= 0, "a slot without a token in front"
        device = self.layers[0].prefix_k.device
        self.num_rows = len(prompt_of_row)
        members = [np.flatnonzero(prompt_of_row == p) for p in range(len(self.lengths))]
        grid = np.zeros((len(members), max(len(m) for m in members)), np.int64)
        place = np.zeros(self.num_rows, np.int64)
        for prompt, rows in enumerate(members):
            grid[prompt, : len(rows)] = rows  # the rest is padding: row 0, computed, never read
            place[rows] = prompt * grid.shape[1] + np.arange(len(rows))
        lengths = np.array(self.lengths)
        self._row_PG = torch.from_numpy(grid).to(device)
        self._place_S = torch.from_numpy(place).to(device)
        self._length_S = torch.from_numpy(lengths[prompt_of_row]).to(device)
        self._row_S = torch.arange(self.num_rows, device=device)
        self.age_S = torch.from_numpy(ages.astype(np.int64)).to(device)
        self._oldest = int(ages.max())
        self._same_age = bool((ages == ages[0]).all()) and not self.static
        self._folds.clear()
        self._padding = None
        if self.static or lengths.min() < lengths.max():
            beyond_PL = np.arange(lengths.max()) >= lengths[:, None]
            self._padding = self._hidden(torch.from_numpy(beyond_PL).to(device))[:, None, None]
        for stored in self.layers:
            stored.own_k = _grown(stored.own_k, self.num_rows, 0)
            stored.own_v = _grown(stored.own_v, self.num_rows, 0)
        self._reserve()

    def begin(self) -> None:
        """Start a step: clear the masks, which depend on ages."""
        self._masks.clear()
        self._next = 0

    def advance(self) -> None:
        """End a step: every row has stored one more token."""
        self.age_S.add_(1)
        self._oldest += 1
        self._reserve()

    @property
    def positions_S(self) -> Tensor:
        """Positions of this step's tokens."""
        return self._length_S + self.age_S

    def _reserve(self) -> None:
        """Allocate this step's column, in every layer."""
        held = self.layers[0].own_k.shape[2]
        if self._oldest >= held:
            columns = min(max(2 * held, self._oldest + 1, COLUMNS), self.most_columns)
            for layer in self.layers:
                layer.own_k = _grown(layer.own_k, 0, columns)
                layer.own_v = _grown(layer.own_v, 0, columns)

    # --- attention ---

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """q [S, H, D], k [S, J, D], v [S, J, E] -> [S, H, E]."""
        store = self.layers[self._next]
        self._next += 1
        num_rows, heads, size = q.shape
        heads_kv, size_v = v.shape[1:]
        per_kv = heads // heads_kv
        num_prompts, width = len(self.lengths), max(self.lengths)
        self._write(store, k, v)
        prefix_mask, own_mask = self._masks_of(window, per_kv)
        fold, unfold = self._fold(heads_kv)

        q = q.reshape(num_rows * heads_kv, per_kv * size)
        read, mass = _read(
            q.index_select(0, fold).view(num_prompts, heads_kv, -1, size),
            store.prefix_k[:num_prompts, :, :width],
            store.prefix_v[:num_prompts, :, :width],
            mask=prefix_mask,
            scaling=scaling,
        )
        read = read.reshape(-1, per_kv * size_v).index_select(0, unfold)
        mass = mass.reshape(-1, per_kv).index_select(0, unfold)

        columns = self._read_columns()
        own_k = store.own_k.flatten(0, 1)[: len(q), :columns]  # [S·J, C, D]
        own_v = store.own_v.flatten(0, 1)[: len(q), :columns]
        scores = (q.view(-1, per_kv, size) * scaling).bmm(own_k.transpose(1, 2))
        if own_mask is not None:
            scores.view(num_rows, heads_kv, per_kv, -1).add_(own_mask)
        both = torch.cat([scores.float(), mass[..., None]], -1)
        weights = both.softmax(-1).to(q.dtype)
        out = weights[..., :columns].bmm(own_v)
        out.addcmul_(weights[..., columns:], read.view(-1, per_kv, size_v))
        return out.view(num_rows, heads, size_v)

    def _write(self, store: _Layer, k: Tensor, v: Tensor) -> None:
        if self._same_age:
            store.own_k[: self.num_rows, :, self._oldest] = k
            store.own_v[: self.num_rows, :, self._oldest] = v
        else:
            store.own_k[self._row_S, :, self.age_S] = k
            store.own_v[self._row_S, :, self.age_S] = v

    def _fold(self, heads_kv: int) -> tuple[Tensor, Tensor]:
        """Indices from queries [S·J] to those ordered by prompt [P·J·G], and back."""
        if heads_kv not in self._folds:
            head_J = self._columns(heads_kv)
            fold = self._row_PG[:, None] * heads_kv + head_J[:, None]
            widest = self._row_PG.shape[1]
            prompt_S, within_S = self._place_S // widest, self._place_S % widest
            unfold = (prompt_S[:, None] * heads_kv + head_J) * widest + within_S[:, None]
            self._folds[heads_kv] = fold.flatten(), unfold.flatten()
        return self._folds[heads_kv]

    def _masks_of(self, window: int | None, per_kv: int) -> tuple[Tensor | None, Tensor | None]:
        """Additive masks, or None where nothing is masked: prefix [P, 1, G·I, L], own
        [S, 1, 1, C]. The same for all layers with this window; computed once per step."""
        if window in self._masks:
            return self._masks[window]
        columns = self._read_columns()
        prefix = self._padding
        hidden_SC = None
        if not self._same_age:
            hidden_SC = self._columns(columns) > self.age_S[:, None]
        if window is not None and (self.static or max(self.lengths) + self._oldest >= window):
            far_SC = self._columns(columns) <= self.age_S[:, None] - window
            hidden_SC = far_SC if hidden_SC is None else hidden_SC | far_SC
            last_PG1 = (self._length_S + self.age_S)[self._row_PG][..., None]
            far_PGL = self._columns(max(self.lengths)) <= last_PG1 - window
            prefix = self._hidden(far_PGL[:, None]) + (0.0 if prefix is None else prefix)
        if prefix is not None:
            prefix = prefix.expand(-1, -1, self._row_PG.shape[1], -1)
            prefix = prefix.repeat_interleave(per_kv, 2)
        own = None if hidden_SC is None else self._hidden(hidden_SC)[:, None, None]
        self._masks[window] = prefix, own
        return prefix, own

    def _read_columns(self) -> int:
        if self.static:
            return self.layers[0].own_k.shape[2]
        return self._oldest + 1

    def _columns(self, num: int) -> Tensor:
        return torch.arange(num, device=self.age_S.device)

    def _hidden(self, hidden: Tensor) -> Tensor:
        dtype = self.layers[0].own_k.dtype
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, HIDDEN)


def _read(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of q [P, J, Q, D] over k, v [P, J, L, D]: outputs, and the log of the softmax's
    denominator [P, J, Q]."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        # The kernel behind F.scaled_dot_product_attention, which does not return the log-sum-exp.
        out, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scaling
        )
        return out, mass
    return _read_plainly(q, k, v, mask=mask, scaling=scaling)


def _read_plainly(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """:func:`_read` in plain tensor code, for every device."""
    scores = ((q * scaling) @ k.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores + mask
    mass = scores.logsumexp(-1)
    return (scores - mass[..., None]).exp().to(q.dtype) @ v, mass


def _empty(like_TJD: Tensor) -> Tensor:
    return like_TJD.new_empty(0, like_TJD.shape[1], 0, like_TJD.shape[2])


def _grown(stored: Tensor, num: int, columns: int) -> Tensor:
    """The tensor enlarged to [num or more, J, columns or more, D]. New entries are zero: masked
    values are still multiplied by 0, and 0 · NaN is NaN."""
    have, heads, held, size = stored.shape
    num, columns = max(num, have), max(columns, held)
    if (num, columns) == (have, held):
        return stored
    grown = stored.new_zeros(num, heads, columns, size)
    grown[:have, :, :held] = stored
    return grown


def capture(step: Callable[[Tensor], Tensor], tokens_S: Tensor) -> Callable[[Tensor], Tensor]:
    """Record one decoding step as a CUDA graph; the result replays it on new tokens.

    ``step`` must belong to a plan with ``static=True``. The graph is valid until the next
    :meth:`DecodePlan.arrange`, or until storage grows. **Never run**: there was no GPU.

    Raises:
        RuntimeError: no CUDA device.
    """
    static_tokens = tokens_S.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up outside the capture
        step(static_tokens)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(static_tokens)

    def replay(tokens: Tensor) -> Tensor:
        static_tokens.copy_(tokens)
        graph.replay()
        return out

    return replay
