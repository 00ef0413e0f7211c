"""The proof of a family at load: packed, and sampled with a cache, it is the model itself.

    probe rows ──one at a time, the library's attention──▶ the model's own log-probs ─┐
        │                └─ again, every module's output rounded anew ──▶ noise floor ├─ compared
        ├──────── packed, prompts shared ──────────────────▶ log-probs ───────────────┤
        └──────── prefilled, then one token at a time ─────▶ log-probs ───────────────┘

The rows have mixed lengths; one is at the last positions of the context, where rotary embeddings
that depend on the length show themselves; and a sliding window is made shorter than the rows for
as long as they are compared.

What is compared is the root mean square over the vocabulary of the differences of a position: a
fault moves the hidden state, and with it all log-probs. The tolerance is a multiple of what the
model differs from itself by when each module's output is rounded anew, at random, in the number
type of the weights. In bfloat16 rounding would hide a wrong position, so there the comparison is
made twice: with weights widened to float32, and as they are.

Shape legend: ``T`` tokens of a row, ``S`` rows, ``V`` vocabulary, ``X`` hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from posttrain.core.errors import ModelError, PosttrainError
from posttrain.core.proofs import Proof, Subject
from posttrain.engines.local.attention import (
    IMPLEMENTATION,
    OTHER_FAMILY,
    AttentionPlan,
    PackedPlan,
)
from posttrain.engines.local.decoding import DecodePlan, PrefillPlan
from posttrain.engines.local.model import Model
from posttrain.engines.local.rounding import rounded_anew
from posttrain.numerics.batch import Segment

ALLOWED = {torch.float32: 16.0, torch.bfloat16: 4.0}
"""Largest difference from the model's own, in noise floors. Sums in another order give 1 to 3; a
wrong mask or position gives more than 100 in float32."""

ATTEMPTS = 3
"""Probes with other tokens before a model is refused. A wrong mask shows in each; an expert that
rounding chose otherwise does not."""

WINDOW = 3
"""Tokens of a sliding window while rows are compared."""

WIDEN_BYTES = 2**34
"""Largest model, as float32, whose weights are widened for the proof."""

Rows = Sequence["_Row"]


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt and an answer, at consecutive positions from ``start`` on."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    start: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


def prove(model: Model, *, brief: bool = False) -> tuple[Proof, ...]:
    """Compare packed and sampled computation with the model's own.

    Args:
        model: with its weights.
        brief: with fewer rows, none at the end of the context: enough for other weights of a
            configuration that was proved before.

    Raises:
        ModelError: they differ by more than rounding explains, or the family cannot be run packed;
            the message names the family, and what about it.
    """
    if not _is_widened(model):
        return (_proved(model, wide=False, brief=brief),)
    return _proved(model, wide=True, brief=brief), _proved(model, wide=False, brief=True)


def _proved(model: Model, *, wide: bool, brief: bool) -> Proof:
    """The first comparison that holds, of several probes. Raises a ModelError when none does."""
    start, reason = time.perf_counter(), ""
    with _as_family(model), _widened(model.causal, wide), _short_window(model):
        for attempt in range(ATTEMPTS):
            found = _compare(model, _probe(model, seed=attempt, brief=brief))
            if found.holds:
                break
        if not found.holds:
            reason = _reason(model, limit=found.limit)
    if found.holds:
        return found.proof(model, seconds=time.perf_counter() - start)
    worst, gap = max(found.gaps.items(), key=lambda item: item[1])
    raise ModelError(
        f"{model.name} ({_family(model)}): {worst} log-probs differ from the model's own by "
        f"{gap:.2g}{reason}",
        expected=f"at most {found.limit:.2g} in {_name(found.dtype)}: {ALLOWED[found.dtype]:.0f} "
        "times what rounding does",
        fix=OTHER_FAMILY,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """The largest difference per way of computing, and the noise floor [log-prob]."""

    dtype: torch.dtype
    floor: float
    gaps: Mapping[str, float]

    @property
    def limit(self) -> float:
        return ALLOWED[self.dtype] * self.floor

    @property
    def holds(self) -> bool:
        # Not "any above the limit": a NaN is no agreement.
        return all(gap <= self.limit for gap in self.gaps.values())

    def proof(self, model: Model, *, seconds: float) -> Proof:
        words = ", ".join(f"{way} rows {gap:.1g}" for way, gap in self.gaps.items())
        return Proof(
            subject=Subject.SAMPLER,
            of=model.name,
            words=f"{_name(self.dtype)}: {words} from the model's own, rounding {self.floor:.1g}",
            seconds=seconds,
            figures={**self.gaps, "floor": self.floor},
        )


def _compare(model: Model, rows: Rows) -> _Compared:
    dtype = model.causal.dtype
    own = _own(model, rows)
    with rounded_anew(model.causal):
        noise = _largest(_own(model, rows), own)
    # At least one rounding of the logits themselves.
    least = torch.finfo(dtype).eps * max(
        float(row_TV.std(-1, correction=0).max()) for row_TV in own
    )
    answers = [row_TV[len(r.prompt) - 1 :] for row_TV, r in zip(own, rows, strict=True)]
    floor = max(noise, least)
    packed = _Compared(
        dtype=dtype, floor=floor, gaps={"packed": _largest(_packed(model, rows), own)}
    )
    if not packed.holds:
        return packed
    sampled = _largest(_sampled(model, rows), answers)
    return replace(packed, gaps={**packed.gaps, "sampled": sampled})


def _largest(found: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """The largest root mean square of a position's differences."""
    pairs = zip(found, own, strict=True)
    return max(float((a - b).pow(2).mean(-1).sqrt().max()) for a, b in pairs)


# --- the rows -------------------------------------------------------------------------------


def _probe(model: Model, *, seed: int, brief: bool = False) -> Rows:
    """Two answers to one prompt, a short prompt, a row alone, and one at the end of the context.

    ``brief`` keeps the first three: the kernels of a number type, not what a family does.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    # No special tokens: a model may refuse an image token without an image.
    unused = [] if model.unused_U is None else model.unused_U.tolist()
    special = {*model.tokenizer.all_special_ids, *unused}
    plain = [i for i in range(model.vocab_size) if i not in special] or [0]

    def drawn(num: int) -> tuple[int, ...]:
        return tuple(plain[i] for i in rng.integers(0, len(plain), num))

    shared, longest = drawn(7), 6
    rows = [
        _Row(shared, drawn(5)),
        _Row(shared, drawn(2)),
        _Row(drawn(2), drawn(longest)),
        _Row(drawn(11), drawn(1)),
        _Row(drawn(4), drawn(3), start=max(model.context - 4 - longest, 0)),
    ]
    # Every row is decoded for as many tokens as the longest.
    fitting = [r for r in rows if len(r.prompt) + longest <= model.context]
    return fitting[: 3 if brief else None] or [_Row(drawn(1), drawn(1))]


def _prompts(rows: Rows) -> dict[tuple[int, tuple[int, ...]], list[int]]:
    """Row numbers by shared prompt and position."""
    prompts: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, row in enumerate(rows):
        prompts.setdefault((row.start, row.prompt), []).append(number)
    return prompts


# --- three ways of computing --------------------------------------------------------------------


def _own(model: Model, rows: Rows) -> list[Tensor]:
    """[T, V] log-probs of each row by the stock model: the library's attention, no packing."""
    model.causal.set_attn_implementation("eager")
    if model.causal.config._attn_implementation != "eager":
        raise ModelError("its layers do not ask the library for their attention")
    try:
        return [_own_row(model, row) for row in rows]
    finally:
        model.causal.set_attn_implementation(IMPLEMENTATION)


def _own_row(model: Model, row: _Row) -> Tensor:
    ids = torch.tensor([row.tokens], device=model.device)
    # Positions only where they differ from the default: some families do not take them.
    at = torch.arange(row.start, row.start + len(row.tokens), device=model.device)[None]
    where = {"position_ids": at} if row.start else {}
    logits: Tensor = model.causal(input_ids=ids, use_cache=False, **where).logits[0]
    return logits.float().log_softmax(-1)


def _packed(model: Model, rows: Rows) -> list[Tensor]:
    """[T, V] log-probs of each row, all in one batch, prompts shared."""
    segments: list[Segment] = []
    tokens, positions = list[int](), list[int]()
    spans: dict[int, tuple[slice, slice]] = {}

    def add(new: Sequence[int], first: int, parent: int | None) -> slice:
        segments.append(Segment(len(tokens), len(new), parent))
        positions.extend(range(first, first + len(new)))
        tokens.extend(new)
        return slice(len(tokens) - len(new), len(tokens))

    for (start, prompt), members in _prompts(rows).items():
        root, parent = add(prompt, start, None), len(segments) - 1
        for number in members:
            answer = add(rows[number].answer, start + len(prompt), parent)
            spans[number] = root, answer
    plan = _Windowed(PackedPlan.of(segments, device=model.device))
    hidden_TX = _hidden(model, tokens, positions, plan)
    logp_TV = model.head(hidden_TX).log_softmax(-1)
    return [torch.cat([logp_TV[part] for part in spans[n]]) for n in range(len(rows))]


def _sampled(model: Model, rows: Rows) -> list[Tensor]:
    """[T, V] log-probs of each row's answer as the sampler computes them, and one position more."""
    prompts = _prompts(rows)
    lengths = [len(prompt) for _, prompt in prompts]
    ends = np.cumsum(lengths)
    segments = [Segment(int(e) - n, n, None) for e, n in zip(ends, lengths, strict=True)]
    prefill = PrefillPlan(PackedPlan.of(segments, device=model.device))
    tokens = [t for _, prompt in prompts for t in prompt]
    positions = [start + i for start, prompt in prompts for i in range(len(prompt))]
    hidden_TX = _hidden(model, tokens, positions, _Windowed(prefill))
    place_S, start_S = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for place, ((start, _), members) in enumerate(prompts.items()):
        place_S[members], start_S[members] = place, start
    longest = max(len(r.answer) for r in rows)
    plan = DecodePlan(longest)
    plan.store(range(len(prompts)), lengths, prefill)
    plan.arrange(place_S, np.zeros(len(rows), np.int64))
    states = [hidden_TX[torch.from_numpy(ends - 1).to(model.device)[place_S]]]
    first_S = torch.from_numpy(start_S).to(model.device)
    for step in range(longest):
        plan.begin()
        last = [r.answer[min(step, len(r.answer) - 1)] for r in rows]
        at_S = plan.positions_S + first_S
        states.append(_hidden(model, last, at_S, _Windowed(plan)))
        if step + 1 < longest:
            plan.advance()
    logp_STV = model.head(torch.stack(states, 1)).log_softmax(-1)
    return [logp_STV[n, : len(r.answer) + 1] for n, r in enumerate(rows)]


def _hidden(
    model: Model, tokens: Sequence[int], positions: Sequence[int] | Tensor, plan: AttentionPlan
) -> Tensor:
    tokens_T = torch.tensor(tokens, device=model.device)
    return model.hidden(tokens_T, torch.as_tensor(positions, device=model.device), plan)


# --- what is changed while rows are compared ---------------------------------------------------


def _is_widened(model: Model) -> bool:
    """Whether the comparison is made in float32 too."""
    weights = sum(p.numel() for p in model.causal.parameters())
    return model.causal.dtype != torch.float32 and 4 * weights <= WIDEN_BYTES


@contextmanager
def _widened(causal: nn.Module, wide: bool) -> Iterator[None]:
    """Weights in float32, without loss; afterwards the same tensors as before."""
    if not wide:
        yield
        return
    held = [(p, p.data) for p in causal.parameters() if p.is_floating_point()]
    try:
        for weight, values in held:
            weight.data = values.float()
        yield
    finally:
        for weight, values in held:
            weight.data = values


_LENGTHS = ("sliding_window", "attention_chunk_size")


def _settings(model: Model) -> PreTrainedConfig:
    return model.causal.config.get_text_config()


@contextmanager
def _short_window(model: Model) -> Iterator[None]:
    """The stock masks of a window or chunk of few tokens; plans get it from :class:`_Windowed`."""
    settings = vars(_settings(model))
    held = {n: settings[n] for n in _LENGTHS if isinstance(settings.get(n), int)}
    settings.update({n: min(WINDOW, length) for n, length in held.items()})
    try:
        yield
    finally:
        settings.update(held)


@dataclass(slots=True, eq=False)
class _Windowed:
    """A plan that gets the short window where a layer passes on the one it was built with."""

    plan: AttentionPlan
    calls: int = 0
    windows: set[int | None] = field(default_factory=set)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        self.calls += 1
        self.windows.add(window)
        short = None if window is None else min(window, WINDOW)
        return self.plan.attend(q, k, v, scaling=scaling, window=short)


# --- a refusal in words ------------------------------------------------------------------------


def _family(model: Model) -> str:
    return str(model.causal.config.model_type)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _as_family(model: Model) -> Iterator[None]:
    """Turn whatever a family's code raises when it is run packed into a ModelError naming it."""
    try:
        with torch.inference_mode():
            yield
    # Not a list of exceptions: the code belongs to some two hundred families.
    except Exception as error:
        words = error.found if isinstance(error, PosttrainError) else _words(error)
        raise ModelError(
            f"{model.name} ({_family(model)}) cannot run packed: {words}",
            expected="a decoder with plain softmax attention",
            fix=OTHER_FAMILY,
        ) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"


def _reason(model: Model, *, limit: float) -> str:
    """What about the family makes it differ, as far as experiments on one row show."""
    row = _probe(model, seed=0)[0]
    whole, begun = _own(model, (row, replace(row, answer=())))
    if not _largest([whole[: len(begun)]], [begun]) <= limit:
        return ": a token reads tokens that come after it"
    alone = _Windowed(PackedPlan.of((Segment(0, len(row.tokens), None),), device=model.device))
    hidden_TX = _hidden(model, row.tokens, range(len(row.tokens)), alone)
    settings = vars(_settings(model))
    layers = settings.get("num_hidden_layers")
    if isinstance(layers, int) and alone.calls < layers:
        return f": of {layers} layers {alone.calls} attend, the others mix tokens in another way"
    if alone.windows == {None} and any(settings.get(n) for n in _LENGTHS):
        return ": its layers do not pass on the window or chunk that limits their attention"
    if not _largest([model.head(hidden_TX).log_softmax(-1)], [whole]) <= limit:
        return ": its layers do more than they pass on to the attention (a bias, or positions)"
    return ": a row changes with what is computed beside it"
