"""The local sampler: completions from the learner's own weights, no copy and no second engine.

    requests ──▶ waves ──prefill──▶ one key/value prefix per distinct prompt
                         ──decode──▶ rows: one token each ──▶ sample ──▶ finished rows leave

Each distinct prompt is computed once for all its completions, and its keys and values are stored
and read once per group. Randomness is per request: row i draws its uniforms from its own seed, so
a completion does not depend on what else is in the batch.

Shape legend: ``P`` prompts of a wave, ``G`` rows per prompt, ``R = P·G`` rows, ``H`` query heads,
``J`` key/value heads, ``D`` head size, ``L`` padded prompt length, ``C`` completion capacity,
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from posttrain import clock
from posttrain.batch import Segment
from posttrain.engines.attention import PackedPlan
from posttrain.engines.model import Model
from posttrain.errors import TaskError
from posttrain.protocols import Completion, Request
from posttrain.provenance import Sampling
from posttrain.trajectory import End

MAX_ROWS = 1024
"""Rows decoded together. More rows use a wide machine better, and need more memory."""

KEY_VALUE_BYTES = 2**31
"""Most memory for keys and values of a wave; large models decode fewer rows together."""

COMPACT_BELOW = 0.75
"""Finished rows are dropped once fewer than this share of the rows is still going."""


@dataclass(slots=True, eq=False)
class _PrefillPlan:
    """Packed attention over the prompts that remembers every layer's keys and values."""

    packed: PackedPlan
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        self.kept[layer] = (k, v)
        return self.packed.attend(layer, q, k, v, scaling=scaling, window=window)


@dataclass(slots=True, eq=False)
class _Layer:
    """Key/value storage of one layer, written in place."""

    prefix_k: Tensor  # [P, J, L, D]
    prefix_v: Tensor
    own_k: Tensor  # [R, J, C, D]
    own_v: Tensor


@dataclass(slots=True, eq=False)
class _DecodePlan:
    """One new token per row, which reads its prompt's prefix and its own earlier tokens."""

    layers: dict[int, _Layer]
    lengths_P: Tensor  # prompt lengths
    step: int = 0

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """q [R, H, D], k and v [R, J, D] -> [R, H, D]."""
        store, t = self.layers[layer], self.step
        store.own_k[:, :, t] = k
        store.own_v[:, :, t] = v
        num_prompts, heads_kv, width, size = store.prefix_k.shape
        rows, heads = q.shape[0], q.shape[1]
        per_kv, per_prompt = heads // heads_kv, rows // num_prompts

        def by_prompt(x: Tensor) -> Tensor:  # [R, J, per_kv, *] -> [P, J, G * per_kv, *]
            folded = x.view(num_prompts, per_prompt, heads_kv, per_kv, -1)
            return folded.transpose(1, 2).reshape(num_prompts, heads_kv, per_prompt * per_kv, -1)

        q_rows = (q * scaling).view(rows, heads_kv, per_kv, size)
        own = q_rows @ store.own_k[:, :, : t + 1].transpose(-1, -2)
        prefix = by_prompt(q_rows) @ store.prefix_k.transpose(-1, -2)
        prefix = prefix.masked_fill(~self._visible(width, window)[:, None, None], float("-inf"))
        if window is not None and t + 1 > window:
            own[..., : t + 1 - window] = float("-inf")
        prefix = prefix.view(num_prompts, heads_kv, per_prompt, per_kv, width)
        prefix = prefix.transpose(1, 2).reshape(rows, heads_kv, per_kv, width)

        weights = torch.cat([prefix, own], -1).float().softmax(-1).to(q.dtype)
        read_prefix = by_prompt(weights[..., :width]) @ store.prefix_v
        read_prefix = read_prefix.view(num_prompts, heads_kv, per_prompt, per_kv, size)
        read_prefix = read_prefix.transpose(1, 2).reshape(rows, heads_kv, per_kv, size)
        read_own = weights[..., width:] @ store.own_v[:, :, : t + 1]
        return (read_prefix + read_own).reshape(rows, heads, size)

    def _visible(self, width: int, window: int | None) -> Tensor:
        """[P, L] True where a prefix position exists and stands within the window."""
        at = torch.arange(width, device=self.lengths_P.device)
        visible = at < self.lengths_P[:, None]
        if window is not None:
            visible = visible & (self.lengths_P[:, None] + self.step - at < window)
        return visible

    def keep(self, prompts: Tensor, rows: Tensor) -> None:
        """Drop everything but these prompts and rows."""
        self.lengths_P = self.lengths_P[prompts]
        for layer in self.layers.values():
            layer.prefix_k, layer.prefix_v = layer.prefix_k[prompts], layer.prefix_v[prompts]
            layer.own_k, layer.own_v = layer.own_k[rows], layer.own_v[rows]


@dataclass(slots=True, eq=False)
class _Wave:
    """Requests decoded together: P prompts with up to G rows each; row id -1 is a filler."""

    prompts: list[np.ndarray]
    ids_PG: np.ndarray
    sampling: Sampling
    capacity: int


def generate(
    model: Model, requests: Sequence[Request], *, end_tokens: frozenset[int]
) -> list[Completion]:
    """One completion per request, in order.

    Log-probs are those of the distribution that was sampled: after temperature and truncation.
    Greedy requests (temperature 0) have log-prob 0, since that distribution is one point.
    """
    for request in requests:
        if not 0 < len(request.prompt) < model.context or request.max_new_tokens < 1:
            raise TaskError(
                f"a prompt of {len(request.prompt)} tokens, {request.max_new_tokens} to draw",
                expected=f"1 to {model.context - 1} prompt tokens (the model's context is "
                f"{model.context}), and at least 1 to draw",
                fix="shorten the task's prompts, or use a model with a longer context",
            )
    done: list[Completion | None] = [None] * len(requests)
    with torch.inference_mode():
        for wave in _waves(requests, model):
            for index, completion in _run(model, requests, wave, end_tokens):
                done[index] = completion
    return [c for c in done if c is not None]


def _waves(requests: Sequence[Request], model: Model) -> Iterator[_Wave]:
    """Group requests by decoding and prompt; prompts of similar length go together."""
    by_decoding: dict[tuple[Sampling, int], dict[bytes, list[int]]] = {}
    for index, request in enumerate(requests):
        decoding = (replace(request.sampling, seed=None), request.max_new_tokens)
        prompts = by_decoding.setdefault(decoding, {})
        prompts.setdefault(request.prompt.tobytes(), []).append(index)
    for (sampling, capacity), prompts in by_decoding.items():
        longest = max(len(requests[ids[0]].prompt) for ids in prompts.values())
        rows = _rows_that_fit(model, capacity + longest)
        chunks: list[list[int]] = []
        for ids in prompts.values():
            chunks.extend(ids[i : i + rows] for i in range(0, len(ids), rows))
        chunks.sort(key=lambda ids: (len(requests[ids[0]].prompt), len(ids)))
        wave: list[list[int]] = []
        for ids in chunks:
            widest = max([len(ids), *(len(w) for w in wave)])
            if wave and widest * (len(wave) + 1) > rows:
                yield _wave(wave, requests, sampling, capacity)
                wave = []
            wave.append(ids)
        if wave:
            yield _wave(wave, requests, sampling, capacity)


def _rows_that_fit(model: Model, tokens: int) -> int:
    """Rows of ``tokens`` keys and values each within the memory budget, at most MAX_ROWS."""
    config = model.causal.config.get_text_config().to_dict()
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    kept = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * size
    per_row = kept * tokens * model.causal.dtype.itemsize
    return max(1, min(MAX_ROWS, int(KEY_VALUE_BYTES // per_row)))


def _wave(
    chunks: list[list[int]], requests: Sequence[Request], sampling: Sampling, capacity: int
) -> _Wave:
    ids = np.full((len(chunks), max(len(c) for c in chunks)), -1)
    for row, chunk in enumerate(chunks):
        ids[row, : len(chunk)] = chunk
    return _Wave([requests[c[0]].prompt for c in chunks], ids, sampling, capacity)


def _run(
    model: Model, requests: Sequence[Request], wave: _Wave, end_tokens: frozenset[int]
) -> Iterator[tuple[int, Completion]]:
    """Decode one wave; yields completions as their rows finish."""
    device = model.device
    lengths = np.array([len(p) for p in wave.prompts])
    with clock.measure("prefill"):
        plan, hidden_PX = _prefill(model, wave)
    ids_PG = wave.ids_PG
    ids_R = ids_PG.reshape(-1)
    uniform = np.zeros((ids_R.size, wave.capacity))
    for row, index in enumerate(ids_R):
        if index >= 0:
            rng = np.random.Generator(np.random.Philox(key=requests[index].sampling.seed or 0))
            uniform[row] = rng.random(wave.capacity)
    tokens_RC = np.zeros((ids_R.size, wave.capacity), np.int32)
    logprobs_RC = np.zeros((ids_R.size, wave.capacity), np.float32)
    alive_R = ids_R >= 0
    room_R = np.repeat(model.context - lengths, ids_PG.shape[1])
    logits_RV = model.head(hidden_PX).repeat_interleave(ids_PG.shape[1], 0)
    ends = np.array(sorted(end_tokens))

    for t in range(wave.capacity):
        draws = torch.from_numpy(uniform[:, t]).to(device)
        token_R, logprob_R = sample(logits_RV, wave.sampling, draws)
        tokens_RC[:, t], logprobs_RC[:, t] = token_R.cpu().numpy(), logprob_R.cpu().numpy()
        ended_R = np.isin(tokens_RC[:, t], ends)
        full_R = (t + 1 >= wave.capacity) | (t + 1 >= room_R)
        for row in np.flatnonzero(alive_R & (ended_R | full_R)).tolist():
            end = End.COMPLETED if ended_R[row] else End.LENGTH
            if not ended_R[row] and t + 1 < wave.capacity:
                end = End.CONTEXT
            yield (
                int(ids_R[row]),
                Completion(
                    tokens=tokens_RC[row, : t + 1].copy(),
                    logprobs=logprobs_RC[row, : t + 1].copy(),
                    end=end,
                ),
            )
        alive_R &= ~(ended_R | full_R)
        if not alive_R.any():
            return
        if alive_R.mean() < COMPACT_BELOW:
            prompts, rows = _survivors(alive_R.reshape(ids_PG.shape))
            plan.keep(torch.from_numpy(prompts).to(device), torch.from_numpy(rows).to(device))
            kept_alive = alive_R[rows]
            # A short group is filled up with copies of a row; only the first copy is alive.
            first = np.zeros(len(rows), bool)
            first[np.unique(rows, return_index=True)[1]] = True
            ids_PG = ids_R[rows].reshape(len(prompts), -1)
            ids_R, alive_R = ids_R[rows], kept_alive & first
            uniform, room_R, lengths = uniform[rows], room_R[rows], lengths[prompts]
            tokens_RC, logprobs_RC = tokens_RC[rows], logprobs_RC[rows]
        fed_R = torch.from_numpy(tokens_RC[:, t].astype(np.int64)).to(device)
        positions_R = torch.from_numpy(np.repeat(lengths + t, ids_PG.shape[1])).to(device)
        plan.step = t
        logits_RV = model.head(model.hidden(fed_R, positions_R, plan))


def _survivors(alive_PG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with a live row, and as many rows of each as the fullest of them has."""
    prompts = np.flatnonzero(alive_PG.any(1))
    width = int(alive_PG.sum(1).max())
    rows = []
    for prompt in prompts:
        live = np.flatnonzero(alive_PG[prompt])
        rows.append(prompt * alive_PG.shape[1] + np.resize(live, width))
    return prompts, np.concatenate(rows)


def _prefill(model: Model, wave: _Wave) -> tuple[_DecodePlan, Tensor]:
    """Compute every prompt once; returns the stores and the last hidden states [P, X]."""
    device, num_rows = model.device, wave.ids_PG.size
    lengths = [len(p) for p in wave.prompts]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    segments = [Segment(int(s), n, None) for s, n in zip(starts, lengths, strict=True)]
    prefill = _PrefillPlan(PackedPlan.of(segments, device=device))
    tokens_T = torch.from_numpy(np.concatenate(wave.prompts).astype(np.int64)).to(device)
    positions_T = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
    hidden_TX = model.hidden(tokens_T, positions_T, prefill)

    width = max(lengths)
    gather_PL = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, segment in enumerate(segments):
        gather_PL[row, : segment.length] = segment.start + torch.arange(segment.length)
    gather_PL = gather_PL.to(device)
    layers: dict[int, _Layer] = {}
    for layer, (k, v) in prefill.kept.items():
        shape = (num_rows, k.shape[1], wave.capacity, k.shape[2])
        layers[layer] = _Layer(
            k[gather_PL].transpose(1, 2).contiguous(),
            v[gather_PL].transpose(1, 2).contiguous(),
            k.new_zeros(shape),
            v.new_zeros(shape),
        )
    last = torch.from_numpy(starts + np.array(lengths) - 1).to(device)
    return _DecodePlan(layers, torch.tensor(lengths, device=device)), hidden_TX[last]


def sample(logits_RV: Tensor, sampling: Sampling, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting its CDF at ``uniform_R`` in [0, 1).

    Returns:
        token ids [R], and their log-probs [R] under the distribution that was sampled.
    """
    if sampling.temperature == 0:
        return logits_RV.argmax(-1), torch.zeros_like(logits_RV[:, 0])
    logp_RV = _truncate((logits_RV / sampling.temperature).log_softmax(-1), sampling)
    cdf_RV = logp_RV.double().exp().cumsum(-1)
    target_R1 = (uniform_R.double() * cdf_RV[:, -1])[:, None]
    token_R = torch.searchsorted(cdf_RV, target_R1, right=True)[:, 0]
    token_R = token_R.clamp_max(logits_RV.shape[1] - 1)
    return token_R, logp_RV.gather(-1, token_R[:, None])[:, 0]


def _truncate(logp_RV: Tensor, sampling: Sampling) -> Tensor:
    """Apply top-k, top-p and min-p, in that order, and renormalise."""
    if not sampling.is_truncated:
        return logp_RV
    barred = torch.zeros_like(logp_RV, dtype=torch.bool)
    if 0 < sampling.top_k < logp_RV.shape[1]:
        # By index, not by value: of equal logits only as many stay as were asked for.
        kept = logp_RV.topk(sampling.top_k, -1).indices
        barred |= torch.ones_like(barred).scatter(-1, kept, False)
    if sampling.top_p < 1:
        masked = logp_RV.masked_fill(barred, float("-inf")).softmax(-1)
        ordered, order = masked.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        barred |= beyond.scatter(-1, order, beyond)
    if sampling.min_p > 0:
        barred |= logp_RV < logp_RV.amax(-1, keepdim=True) + float(np.log(sampling.min_p))
    return logp_RV.masked_fill(barred, float("-inf")).log_softmax(-1)
