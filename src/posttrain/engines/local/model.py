"""A stock model as posttrain uses it, and the check that packing is exact for it.

A model is used through two of its modules: the decoder (token ids -> hidden states) and the output
head (hidden states -> logits). What a family does to logits after its head, and whether packed,
prefix-shared tokens attend correctly, is *compared* when the model is loaded (``proving.py``).

The policy is the model's own softmax, over all rows of the head. Heads often have more rows than
the tokenizer has tokens, padded to a round number: those are never sampled (``unused_U``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Proof
from posttrain.engines.local.attention import OTHER_FAMILY, AttentionPlan, PackedPlan
from posttrain.engines.local.recording import Recording, stock_hidden
from posttrain.numerics.batch import PackedBatch
from posttrain.numerics.logits import Head, LinearHead

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
    only: int | None = None  # rows of the head that its distributions are over; None for all
    proofs: tuple[Proof, ...] = ()  # what was compared when it was loaded
    unused_U: Tensor | None = field(init=False)  # rows of the head that no token has; None: none
    recording: Recording = field(init=False)  # the decoder's forward, for sampling

    def __post_init__(self) -> None:
        unused = sorted(set(range(self.vocab_size)) - set(self.tokenizer.get_vocab().values()))
        found = torch.tensor(unused, device=self.device) if unused else None
        object.__setattr__(self, "unused_U", found)
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
        rows = int(self.causal.get_output_embeddings().weight.shape[0])
        return rows if self.only is None else min(rows, self.only)

    def over(self, rows: int) -> Model:
        """The same weights, with a head of the first rows only."""
        return replace(self, only=rows)

    @property
    def context(self) -> int:
        """Longest sequence that is computed alone as it is beside others, in tokens.

        A ``longrope`` model has other frequencies for sequences beyond its original context, and
        takes one set for a whole batch; the original context is the limit for it.
        """
        config = self.causal.config.get_text_config()
        settings = config.to_dict()
        name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        longest = settings.get(name)
        if not isinstance(longest, int):
            raise ModelError(
                "the configuration does not say how long a sequence may be",
                expected="max_position_embeddings",
                fix=OTHER_FAMILY,
            )
        rope = settings.get("rope_parameters") or {}
        kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]  # or one per layer type
        whole = [
            int(k["original_max_position_embeddings"])
            for k in kinds
            if k.get("rope_type") == "longrope" and k.get("original_max_position_embeddings")
        ]
        return min([longest, *whole])

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
        scale, cap, rows = self.logit_scale, self.logit_cap, self.vocab_size
        if type(module) is nn.Linear and cap is None:
            if self.only is None:
                return LinearHead(module.weight, module.bias, scale)
            bias = None if module.bias is None else module.bias[:rows]
            return LinearHead(module.weight[:rows], bias, scale)

        def head(hidden_NX: Tensor) -> Tensor:
            logits: Tensor = module(hidden_NX)[..., :rows].float() * scale
            return logits if cap is None else torch.tanh(logits / cap) * cap

        return head
