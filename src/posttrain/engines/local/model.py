"""Loading stock models, and checking that packing is exact for them.

A model is used through two of its modules: the decoder (token ids -> hidden states) and the output
head (hidden states -> logits). What a family does to logits after its head, and whether packed,
prefix-shared tokens attend correctly, is *checked* when the model is loaded: packed and stock
log-probs of a short probe must agree.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as library_logging

from posttrain.core.errors import ModelError
from posttrain.core.files import hash_folder
from posttrain.core.proofs import Proof, Subject
from posttrain.engines.local.attention import IMPLEMENTATION, AttentionPlan, PackedPlan
from posttrain.engines.local.recording import Recording, stock_hidden
from posttrain.numerics.batch import PackedBatch, Segment
from posttrain.numerics.logits import Head, LinearHead

# A progress bar per loaded shard would break the run's own progress display.
library_logging.disable_progress_bar()

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
        speaks: bool = True,
    ) -> Model:
        """Take what the family does to logits after its head from the configuration."""
        config = causal.config.get_text_config().to_dict()
        scale = config.get("logit_scale") or 1.0  # Cohere
        scale /= config.get("logits_scaling") or 1.0  # Granite
        cap = config.get("final_logit_softcapping") or None  # Gemma
        return cls(causal, tokenizer, name, hash_folder(folder), folder, speaks, scale, cap)

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


def resolve_folder(name: str) -> Path:
    """The local folder of a model: the folder itself, or a hub snapshot.

    Raises:
        ModelError: no such folder, and no such model on the hub (or no network).
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"no model folder at {name}",
            expected="a folder with config.json and weights, or a hub id like org/name",
            fix="check the path (it is relative to the recipe)",
        )
    # Imported here: the hub client is only needed for models that are not on disk.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"could not get {name} from the hub: {type(error).__name__}",
            expected="a public model and a network, or the model in the local cache",
            fix="check the name and the network, or give a local folder",
        ) from error


def check_folder(folder: Path) -> None:
    """Raise a ModelError for a folder that is not a model; the message lists its content."""
    config = folder / "config.json"
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    held = sorted(p.name for p in folder.iterdir())
    weights = [
        n for n in held if n.endswith(".safetensors") or n.endswith(".safetensors.index.json")
    ]
    missing = None
    if not config.is_file():
        missing = "config.json"
    elif not weights:
        missing = "*.safetensors"
    elif not set(tokenizers) & set(held):
        missing = "tokenizer"
    if missing:
        raise ModelError(
            f"{folder} is not a model folder: no {missing}",
            expected="config.json, *.safetensors and tokenizer files",
            fix=f"it holds {', '.join(held[:8]) or 'nothing'}: give the folder of an export",
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not JSON: {error}", fix="export the model again") from None


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The requested device; ``auto`` is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_model(
    name: str,
    *,
    dtype: Dtype = "float32",
    device: torch.device | None = None,
    remote_code: bool = False,
) -> Model:
    """Load a causal LM and its tokenizer, and check that packing is exact for it.

    Args:
        name: a folder, or a hub id.
        dtype: of the weights. On a CPU float32 is faster than bfloat16.
        device: default CPU.
        remote_code: run code from the model's repository. Off unless the recipe allows it.

    Raises:
        ModelError: not a model, unreadable, no tokenizer, or not exact when packed.
    """
    folder = resolve_folder(name)
    check_folder(folder)
    where: dict[str, Any] = {"trust_remote_code": remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=IMPLEMENTATION,
            output_loading_info=True,
            **where,
        )
        causal: PreTrainedModel = loaded[0]
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} could not be loaded: {first}",
            expected="a causal language model that transformers can load",
            fix="try AutoModelForCausalLM.from_pretrained on it; for code from the model's own "
            "repository set remote_code to the model's name",
        ) from error
    # With dropout the trained policy would differ from the sampled policy: always eval mode.
    nn.Module.to(causal, device or torch.device("cpu")).eval()
    speaks = _speaks(causal, folder, missing=loaded[1]["missing_keys"])
    model = Model.of(causal, tokenizer, name=name, folder=folder, speaks=speaks)
    return replace(model, proofs=(prove_packing(model),))


def _speaks(causal: PreTrainedModel, folder: Path, *, missing: Collection[str]) -> bool:
    """False for a classifier's folder: its output head is random or untrained."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("architectures") or ()
    out = causal.get_output_embeddings().weight
    named = {n for n, p in causal.named_parameters(remove_duplicate=False) if p is out}
    return not (named & set(missing) or any(k.endswith("Classification") for k in kinds))


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
