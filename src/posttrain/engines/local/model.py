"""A stock model as posttrain uses it, and the check that packing is exact for it.

A model is used through two of its modules: the decoder (token ids -> hidden states) and the output
head (hidden states -> logits). What a family does to logits after its head, and whether packed,
prefix-shared tokens attend correctly, is *checked* when the model is loaded: packed and stock
log-probs of a short probe must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Proof, Subject
from posttrain.engines.local.attention import IMPLEMENTATION, AttentionPlan, PackedPlan
from posttrain.engines.local.recording import Recording, stock_hidden
from posttrain.numerics.batch import PackedBatch, Segment
from posttrain.numerics.logits import Head, LinearHead

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest |Δ log-prob| allowed between packed and stock computation."""

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A stock causal LM with its tokenizer."""

    causal: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    folder: Path
    speaks: bool = True  # False where the folder has no output head: a classifier
    logit_scale: float = 1.0
    logit_cap: float | None = None
    proofs: tuple[Proof, ...] = ()  # what was compared when it was loaded
    recording: Recording = field(init=False)  # the decoder's forward, for sampling

    def __post_init__(self) -> None:
        object.__setattr__(self, "recording", Recording(self.causal))

    @classmethod
    def of(
        cls,
        causal: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        folder: Path,
        digest: str,
        speaks: bool = True,
    ) -> Model:
        """Take what the family does to logits after its head from the configuration."""
        config = causal.config.get_text_config().to_dict()
        scale = config.get("logit_scale") or 1.0  # Cohere
        scale /= config.get("logits_scaling") or 1.0  # Granite
        cap = config.get("final_logit_softcapping") or None  # Gemma
        return cls(causal, tokenizer, name, digest, folder, speaks, scale, cap)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.causal.device

    @property
    def vocab_size(self) -> int:
        """Rows of the output head, padding rows included."""
        return int(self.causal.get_output_embeddings().weight.shape[0])

    @property
    def context(self) -> int:
        """Longest sequence of the model, in tokens."""
        return int(self.causal.config.get_text_config().max_position_embeddings)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a turn, from the model's generation config."""
        ends = self.causal.generation_config.eos_token_id
        return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, plan: AttentionPlan) -> Tensor:
        """Final hidden states [T, X] of packed tokens."""
        return stock_hidden(self.causal.base_model, tokens_T, positions_T, plan)

    def predicting(self, batch: PackedBatch) -> Tensor:
        """Hidden states [N, X] that predict the batch's trained tokens."""
        return self.packed(batch)[batch.predict_N]

    def packed(self, batch: PackedBatch) -> Tensor:
        """Hidden states [T, X] of all tokens of the batch."""
        plan = PackedPlan.of(batch.segments, device=self.device)
        return self.hidden(batch.tokens_T, batch.positions_T, plan)

    @property
    def head(self) -> Head:
        """Hidden states [N, X] to logits [N, V], with a family's scaling and soft-capping."""
        module = self.causal.get_output_embeddings()
        scale, cap = self.logit_scale, self.logit_cap
        if type(module) is nn.Linear and cap is None:
            return LinearHead(module.weight, module.bias, scale)

        def head(hidden_NX: Tensor) -> Tensor:
            logits: Tensor = module(hidden_NX).float() * scale
            return logits if cap is None else torch.tanh(logits / cap) * cap

        return head

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens left out."""
        ids = [int(t) for t in tokens]
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def prove_packing(model: Model) -> Proof:
    """Check that packed, prefix-shared log-probs equal the model's own on a short probe.

    Raises:
        ModelError: they differ by more than the tolerance of the dtype.
    """
    vocab = min(model.vocab_size, len(model.tokenizer))
    prompt, first, second = (
        [i * 7919 % vocab for i in range(3, 12)],
        [5 % vocab] * 3,
        [2, 9 % vocab],
    )
    segments = (Segment(0, 9, None), Segment(9, 3, 0), Segment(12, 2, 0))
    tokens = torch.tensor(prompt + first + second, device=model.device)
    positions = torch.tensor([*range(9), *range(9, 12), *range(9, 11)], device=model.device)
    plan = _WindowsSeen(PackedPlan.of(segments, device=model.device))
    with torch.inference_mode():
        try:
            packed = model.head(model.hidden(tokens, positions, plan)).log_softmax(-1)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"{model.name} ({model.causal.config.model_type}) cannot run packed: {error}",
                expected="a decoder with plain softmax attention",
                fix="use another model family",
            ) from error
        gap = 0.0
        for rest, start in ((first, 9), (second, 12)):
            own = _stock_logprobs(model, prompt + rest)
            ours = torch.cat([packed[:9], packed[start : start + len(rest)]])
            gap = max(gap, float((own - ours).abs().max()))
    _check_windows(model, plan.windows)
    limit = TOLERANCE[model.causal.dtype]
    if not gap <= limit:
        raise ModelError(
            f"{model.name}: packed log-probs differ from the model's own by {gap:.2g}",
            expected=f"at most {limit} in {model.causal.dtype}",
            fix="this family mixes tokens in a way that packing cannot isolate; use another",
        )
    words = f"packed rows give the model's own log-probs, to {gap:.1g}"
    return Proof(subject=Subject.SAMPLER, of=model.name, words=words, figures={"gap": gap})


@dataclass(slots=True, eq=False)
class _WindowsSeen:
    """A plan that records which sliding windows the layers pass on."""

    packed: PackedPlan
    windows: set[int | None] = field(default_factory=set)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        self.windows.add(window)
        return self.packed.attend(layer, q, k, v, scaling=scaling, window=window)


def _check_windows(model: Model, seen: set[int | None]) -> None:
    """Raise a ModelError for families whose window is only in the mask, which packing does not use.

    The probe cannot show it: it is shorter than any real window.
    """
    config = model.causal.config.get_text_config().to_dict()
    kinds = config.get("layer_types")
    limited = ("sliding_attention", "chunked_attention")
    if kinds is not None:
        has_window = any(kind in limited for kind in kinds)
    else:
        has_window = bool(config.get("sliding_window") or config.get("attention_chunk_size"))
    if has_window and seen == {None}:
        raise ModelError(
            f"{model.name} ({model.causal.config.model_type}) limits attention to a window or "
            "chunk that its attention layers do not hand down",
            expected="layers that pass sliding_window to the attention function",
            fix="use another model family",
        )


def _stock_logprobs(model: Model, tokens: Sequence[int]) -> Tensor:
    """[T, V] log-probs by the stock model: the library's attention, no packing."""
    ids = torch.tensor([tokens], device=model.device)
    model.causal.set_attn_implementation("eager")
    try:
        logits: Tensor = model.causal(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.causal.set_attn_implementation(IMPLEMENTATION)
    return logits.float().log_softmax(-1)
