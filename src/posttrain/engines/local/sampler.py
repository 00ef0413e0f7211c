"""The local sampler: completions from the learner's own weights, without a copy of them.

    requests ──▶ Queue ──admit──▶ prefill new prompts ──▶ first token of every row that enters
                   ▲                                          │
                   │ rows leave when they end                 ▼
                   └────────── harvest ◀── record ◀── decode: one token per row

Each distinct prompt is computed once for all its completions, and its keys and values are stored
and read once (``decoding.py``). Finished rows leave at once, and waiting requests take their slots
(continuous batching). Randomness is per request: each row draws its uniform numbers from its own
seed, so a completion does not depend on the rest of the batch, up to float rounding of about 1e-6
in its log-probs.

Written for CUDA too (ended rows are checked only every few tokens there, so that the device runs
ahead), and not run on a GPU yet.

Shape legend: ``S`` row slots, ``C`` most tokens of a completion, ``N`` some rows, ``X`` hidden
size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from posttrain.core import clock
from posttrain.core.errors import TaskError
from posttrain.core.provenance import Sampling
from posttrain.core.trajectory import End
from posttrain.engines.local.admission import Limits, Queue, QueuedPrompt
from posttrain.engines.local.attention import PackedPlan
from posttrain.engines.local.decoding import DecodePlan, PrefillPlan
from posttrain.engines.local.model import Model
from posttrain.engines.local.sampling import sample
from posttrain.engines.local.stops import Decode, find_stop
from posttrain.numerics.batch import Segment
from posttrain.protocols import Completion, Request

MAX_ROWS = 1024
"""Most rows decoded together. More rows use the device better, and need more memory."""

KEY_VALUE_BYTES = 2**31
"""Most memory for keys and values; large models decode fewer rows together."""

PREFILL_TOKENS = 8192
"""Prompt tokens computed together. A longer prompt is computed alone."""

COMPACT_BELOW = 0.75
"""Empty row slots are dropped once fewer than this share of the slots is in use."""

LOGIT_ELEMENTS = 2**20
"""Logits computed at a time: 4 MB stay in a CPU's caches while they are sampled from."""

LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens between two checks for ended rows. A check makes a GPU wait for the host."""

STOP_EVERY = 8
"""Tokens between two searches of the text for stop strings."""


def generate(
    model: Model, requests: Sequence[Request], *, end_tokens: frozenset[int], decode: Decode
) -> list[Completion]:
    """One completion per request, in order.

    Log-probs are those of the sampled distribution: after temperature and truncation. Greedy
    requests (temperature 0) have log-prob 0, since that distribution is one point. A
    completion ends after an end token, after the token that completes a stop string, after
    ``max_new_tokens``, or where the model's context is full. Stop strings are looked for in what
    ``decode`` makes of its tokens.

    Raises:
        TaskError: a prompt without tokens, or without room for one more.
    """
    for request in requests:
        if not 0 < len(request.prompt) < model.context or request.max_new_tokens < 1:
            raise TaskError(
                f"a prompt of {len(request.prompt)} tokens, {request.max_new_tokens} to draw",
                expected=f"1 to {model.context - 1} prompt tokens (the model's context is "
                f"{model.context}), and at least 1 to draw",
                fix="shorten the task's prompts, or use a model with a longer context",
            )
    if not requests:
        return []
    with torch.inference_mode():
        model.recording.prepare()
        done = dict(_Batch.of(model, requests, end_tokens, decode).run())
    return [done[index] for index in range(len(requests))]


def key_value_bytes(model: Model) -> int:
    """Bytes of one token's keys and values in all layers.

    One token is computed: families differ in which layers keep any, and in their sizes.
    """
    _, plan = _prefilled(model, [np.zeros(1, np.int64)])
    return sum(t.numel() * t.element_size() for layer in plan.kept for t in layer)


def _prefilled(model: Model, prompts: Sequence[np.ndarray]) -> tuple[Tensor, PrefillPlan]:
    """Compute prompts, packed one after the other: hidden states [T, X], and what is kept."""
    device = model.device
    lengths = [len(tokens) for tokens in prompts]
    ends = np.cumsum(lengths)
    segments = [Segment(int(e) - n, n, None) for e, n in zip(ends, lengths, strict=True)]
    plan = PrefillPlan(PackedPlan.of(segments, device=device))
    tokens = np.concatenate(prompts).astype(np.int64)
    positions = np.concatenate([np.arange(n) for n in lengths])
    hidden_TX = model.recording.hidden(
        torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device), plan
    )
    return hidden_TX, plan


def limits(model: Model, requests: Sequence[Request]) -> Limits:
    """Limits of the batch from the memory for keys and values."""
    return Limits(
        rows=min(MAX_ROWS, len(requests)),
        tokens=KEY_VALUE_BYTES // key_value_bytes(model),
        prefill_tokens=PREFILL_TOKENS,
        row_tokens=max(_most(model, r) for r in requests),
    )


def _most(model: Model, request: Request) -> int:
    """Most tokens that may be sampled for a request."""
    return min(request.max_new_tokens, model.context - len(request.prompt))


@final
@dataclass(slots=True, eq=False)
class _Batch:
    """The rows being decoded. A slot holds one row; an empty slot is computed and not read.

    Arrays [S] are on the host; they change when rows enter and leave, and ages grow by one per
    step. Tensors are on the model's device.
    """

    model: Model
    requests: Sequence[Request]
    decode: Decode
    ends: Tensor
    queue: Queue
    plan: DecodePlan
    kinds: list[Sampling]  # distinct sampling parameters
    kind_of: list[int]  # of each request
    any_stops: bool
    tokens_SC: Tensor
    logprobs_SC: Tensor
    uniform_SC: np.ndarray
    ended_S: Tensor
    request_S: np.ndarray  # index of the request, −1 for an empty slot
    age_S: np.ndarray  # tokens sampled
    most_S: np.ndarray  # tokens that may be sampled
    searched_S: np.ndarray  # tokens that were searched for stop strings
    place_S: np.ndarray  # prompt slot; an empty row slot keeps its last
    prompts: list[QueuedPrompt] = field(default_factory=list)  # of each prompt slot, used or not
    states: list[Tensor] = field(default_factory=list)  # [X] of each prompt slot's last token
    num_slots: int = 0  # in use or emptied since the last compaction
    since_look: int = 0
    stale: bool = False  # rows have entered or left since the plan was arranged

    @classmethod
    def of(
        cls,
        model: Model,
        requests: Sequence[Request],
        end_tokens: frozenset[int],
        decode: Decode,
    ) -> _Batch:
        """An empty batch, with all requests waiting."""
        kinds: dict[Sampling, int] = {}
        kind_of = [
            kinds.setdefault(replace(r.sampling, seed=None, stop=()), len(kinds)) for r in requests
        ]
        bounds = limits(model, requests)
        rows = bounds.room(prompts=1, width=min(len(r.prompt) for r in requests))
        shape, device = (rows, bounds.row_tokens), model.device
        return cls(
            model=model,
            requests=requests,
            decode=decode,
            ends=torch.tensor(sorted(end_tokens), dtype=torch.int64, device=device),
            queue=Queue.of(requests, bounds),
            plan=DecodePlan(bounds.row_tokens),
            kinds=list(kinds),
            kind_of=kind_of,
            any_stops=any(r.sampling.stop for r in requests),
            tokens_SC=torch.zeros(shape, dtype=torch.int64, device=device),
            logprobs_SC=torch.zeros(shape, device=device),
            uniform_SC=np.zeros(shape),
            ended_S=torch.zeros(rows, dtype=torch.bool, device=device),
            request_S=np.full(rows, -1),
            age_S=np.zeros(rows, np.int64),
            most_S=np.zeros(rows, np.int64),
            searched_S=np.zeros(rows, np.int64),
            place_S=np.zeros(rows, np.int64),
        )

    def run(self) -> Iterator[tuple[int, Completion]]:
        """Decode all requests; yields (index of the request, completion) as rows end."""
        yield from self._enter()
        while self.queue.live:
            self._compact()
            self._draw(self._step(), np.arange(self.num_slots))
            left = self.queue.live
            yield from self._harvest()
            if self.queue.live < left:
                yield from self._enter()

    # --- rows enter ---

    def _enter(self) -> Iterator[tuple[int, Completion]]:
        """Start all rows that fit; some may end at their first token, and make room for more."""
        while True:
            fresh, rows = self.queue.admit()
            if not rows:
                return
            if fresh:
                with clock.timed("prefill"):
                    self._prefill(fresh)
            slots = self._assign_slots(rows)
            states = torch.stack([self.states[p] for p in self.place_S[slots]])
            self._draw(states, slots)
            yield from self._harvest()

    def _prefill(self, fresh: Sequence[QueuedPrompt]) -> None:
        """Compute prompts, packed one after the other, and store their keys and values."""
        hidden_TX, plan = _prefilled(self.model, [p.tokens for p in fresh])
        lengths = [len(p.tokens) for p in fresh]
        last = torch.from_numpy(np.cumsum(lengths) - 1).to(self.model.device)
        states = hidden_TX[last]
        vacant = [i for i, p in enumerate(self.prompts) if not p.is_open]
        slots = [*vacant, *range(len(self.prompts), len(self.prompts) + len(fresh))][: len(fresh)]
        for slot, prompt, state in zip(slots, fresh, states, strict=True):
            if slot == len(self.prompts):
                self.prompts.append(prompt)
                self.states.append(state)
            self.prompts[slot], self.states[slot], prompt.slot = prompt, state, slot
        self.plan.store(slots, lengths, plan)

    def _assign_slots(self, rows: Sequence[tuple[QueuedPrompt, int]]) -> np.ndarray:
        """Assign an empty slot to every row; returns the slots."""
        slots = np.flatnonzero(self.request_S < 0)[: len(rows)]
        for slot, (prompt, index) in zip(slots, rows, strict=True):
            request = self.requests[index]
            most = _most(self.model, request)
            rng = np.random.Generator(np.random.Philox(key=request.sampling.seed or 0))
            self.uniform_SC[slot, :most] = rng.random(most)
            self.request_S[slot], self.most_S[slot] = index, most
            self.place_S[slot] = prompt.slot
        self.age_S[slots] = self.searched_S[slots] = 0
        self.ended_S[torch.from_numpy(slots)] = False
        self.num_slots = max(self.num_slots, int(slots.max()) + 1)
        self.stale = True
        return slots

    # --- rows grow ---

    def _step(self) -> Tensor:
        """Compute every row's last token; hidden states [S, X] that predict the next."""
        plan, num = self.plan, self.num_slots
        if self.stale:
            self._arrange()
        plan.begin()
        last_S = self.tokens_SC[:num].gather(1, plan.age_S[:, None])[:, 0]
        # A row never leaves the context, but an empty slot can, with the age of a row of a shorter
        # prompt: it would have no embedding, or change the frequencies of the whole batch.
        positions_S = plan.positions_S.clamp_max(self.model.context - 1)
        hidden_SX = self.model.recording.hidden(last_S, positions_S, plan)
        plan.advance()
        return hidden_SX

    def _arrange(self) -> None:
        """Tell the plan which rows are in the slots.

        An empty slot is computed like a row, and so needs an age that a row has: the oldest's, so
        that ages stay equal where they are. It is set here, where rows that entered are known, and
        grows with the rows until the next change.
        """
        num = self.num_slots
        live_S = self.request_S[:num] >= 0
        self.age_S[:num][~live_S] = self.age_S[:num][live_S].max()
        self.plan.arrange(self.place_S[:num], self.age_S[:num] - 1)
        self.stale = False

    def _draw(self, hidden_NX: Tensor, slots: np.ndarray) -> None:
        """Sample a token for each of these slots, and store it."""
        device, head = self.model.device, self.model.head
        ages = self.age_S[slots]
        slot_N, age_N = torch.from_numpy(slots).to(device), torch.from_numpy(ages).to(device)
        uniform_N = torch.from_numpy(self.uniform_SC[slots, ages]).to(device)
        size = max(LOGIT_ELEMENTS // self.model.vocab_size, 1)
        parts = [slice(first, first + size) for first in range(0, len(slots), size)]
        drawn = [self._sample(head(hidden_NX[p]), slots[p], uniform_N[p]) for p in parts]
        tokens_N, logprobs_N = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        self.tokens_SC[slot_N, age_N] = tokens_N
        self.logprobs_SC[slot_N, age_N] = logprobs_N
        self.ended_S[slot_N] |= (tokens_N[:, None] == self.ends).any(-1)
        self.age_S[slots] += 1
        self.since_look += 1

    def _sample(
        self, logits_NV: Tensor, slots: np.ndarray, uniform_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sample rows that may differ in their sampling parameters."""
        unused_U = self.model.unused_U
        if len(self.kinds) == 1:
            return sample(logits_NV, self.kinds[0], uniform_N, unused_U=unused_U)
        kind_N = np.array([self.kind_of[i] for i in self.request_S[slots]])
        tokens_N = torch.empty(len(slots), dtype=torch.int64, device=logits_NV.device)
        logprobs_N = torch.empty(len(slots), device=logits_NV.device)
        for kind in np.unique(kind_N):
            at = torch.from_numpy(np.flatnonzero(kind_N == kind)).to(logits_NV.device)
            tokens_N[at], logprobs_N[at] = sample(
                logits_NV[at], self.kinds[kind], uniform_N[at], unused_U=unused_U
            )
        return tokens_N, logprobs_N

    # --- rows leave ---

    def _harvest(self) -> Iterator[tuple[int, Completion]]:
        """Completions of the rows that have ended; their slots become empty."""
        num = self.num_slots
        live_S = self.request_S[:num] >= 0
        full_S = live_S & (self.age_S[:num] >= self.most_S[:num])
        if not full_S.any() and self.since_look < LOOK_EVERY[self.model.device.type]:
            return
        self.since_look = 0
        ended_S = live_S & self.ended_S[:num].cpu().numpy()
        last_S = full_S | ended_S
        stopped = self._stopped(live_S, last_S) if self.any_stops else {}
        last_S[list(stopped)] = True
        if not last_S.any():
            return
        rows = np.flatnonzero(last_S)
        at = torch.from_numpy(rows).to(self.model.device)
        tokens, logprobs = self.tokens_SC[at].cpu().numpy(), self.logprobs_SC[at].cpu().numpy()
        ends = self.ends.cpu().numpy()
        for row, drawn, values in zip(rows.tolist(), tokens, logprobs, strict=True):
            hits = np.flatnonzero(np.isin(drawn[: self.age_S[row]], ends))
            size = int(self.age_S[row])
            size = min([size, *(hits[:1] + 1).tolist(), stopped.get(row, size)])
            index = int(self.request_S[row])
            end = End.COMPLETED
            if not len(hits) and row not in stopped:
                short = size < self.requests[index].max_new_tokens
                end = End.CONTEXT if short else End.LENGTH
            yield (
                index,
                Completion(
                    tokens=drawn[:size].astype(np.int32), logprobs=values[:size].copy(), end=end
                ),
            )
        self._empty(rows)

    def _stopped(self, live_S: np.ndarray, last_S: np.ndarray) -> dict[int, int]:
        """By row, the number of tokens up to and with the one that completed a stop string.

        A row is searched every few tokens, and when it ends for another reason (``last_S``).
        """
        out: dict[int, int] = {}
        for row in np.flatnonzero(live_S).tolist():
            stops = self.requests[self.request_S[row]].sampling.stop
            age, searched = int(self.age_S[row]), int(self.searched_S[row])
            if not stops or not (last_S[row] or age - searched >= STOP_EVERY):
                continue
            tokens = self.tokens_SC[row, :age].tolist()
            found = find_stop(tokens, stops, self.decode, searched=searched)
            self.searched_S[row] = age
            if found is not None:
                out[row] = found
        return out

    def _empty(self, rows: np.ndarray) -> None:
        """Free the slots of rows."""
        for row in rows:
            self.queue.leave(self.prompts[self.place_S[row]])
        self.request_S[rows] = -1
        self.queue.drop_closed()
        self.stale = True

    def _compact(self) -> None:
        """Move rows into the first slots when too many slots are empty."""
        live_S = self.request_S[: self.num_slots] >= 0
        if live_S.mean() >= COMPACT_BELOW:
            return
        rows = np.flatnonzero(live_S)
        rows = rows[np.argsort(self.place_S[rows], kind="stable")]
        places = [i for i, p in enumerate(self.prompts) if p.is_open]
        self.plan.keep(places, rows.tolist())
        self.prompts = [self.prompts[i] for i in places]
        self.states = [self.states[i] for i in places]
        for slot, prompt in enumerate(self.prompts):
            prompt.slot = slot
        num = len(rows)
        self.place_S[:num] = np.searchsorted(places, self.place_S[rows])
        for values in (self.request_S, self.age_S, self.most_S, self.searched_S, self.uniform_SC):
            values[:num] = values[rows]
        self.request_S[num:] = -1
        at = torch.from_numpy(rows).to(self.model.device)
        for drawn in (self.tokens_SC, self.logprobs_SC, self.ended_S):
            drawn[:num] = drawn[at]
        self.num_slots, self.stale = num, True
