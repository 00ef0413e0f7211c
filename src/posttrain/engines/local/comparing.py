"""Whether two policies are the same: tensors, log-probs, tokens, templates, settings.

Each function returns the first difference in words, or None. Log-probs are compared with the
noise of the number type, which is measured: one rounding error at the output of every module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.engines.local.attention import IMPLEMENTATION
from posttrain.engines.local.rounding import rounded_anew

NOISES = 16.0
"""Largest difference of log-probs, in units of the measured noise."""
FLOOR = 1e-5
"""Largest difference of log-probs that is never a fault, in nats."""
ROWS = 2
LENGTH = 12
"""Rows and tokens of the probe."""

_TEXTS = (
    "The answer is 42.\n\n  It's x² ≠ 3/4, naïve 日本語 🙂\tend",
    "def f(a):\n    return {'k': [1_000, -2.5e-3]}  # done\r\n",
)
_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi.\nHow are you?"},
        {"role": "user", "content": "Fine."},
    ],
)
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first entry of two mappings that differs, in words."""
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            return f"{name} is {_short(found.get(name))}, and was {_short(expected.get(name))}"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def differing_tensor(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> str | None:
    """The first tensor that differs by a bit, in words. ``dtype``: compare after rounding to it."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            return f"tensor {name} is {'missing' if name in expected else 'new'}"
        new, old = found[name].detach(), expected[name].detach().to(found[name].device)
        if dtype is not None:
            new, old = new.to(dtype), old.to(dtype)
        if new.shape != old.shape:
            return f"tensor {name} has shape {list(new.shape)}, and had {list(old.shape)}"
        if new.dtype != old.dtype:
            return f"tensor {name} is {new.dtype}, and was {old.dtype}"
        if not torch.equal(new, old):
            wrong = int((new != old).sum())
            gap = float((new.double() - old.double()).abs().max())
            return (
                f"tensor {name} differs in {wrong:,} of {new.numel():,} numbers, by up to {gap:.2g}"
            )
    return None


def tensors(causal: nn.Module) -> dict[str, Tensor]:
    """Every weight by name, a shared one once."""
    return dict(causal.named_parameters())


def buffers(causal: nn.Module) -> dict[str, Tensor]:
    """Every buffer by name: rotary frequencies and other constants that no file holds."""
    return dict(causal.named_buffers())


def probe_rows(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[ROWS, LENGTH] token ids, spread over the vocabulary, none special: an image token without
    an image is refused by its model."""
    known, special = min(vocab_size, len(tokenizer)), set(tokenizer.all_special_ids)
    spread = (i * 7919 % known for i in range(3, 3 + known + ROWS * LENGTH))
    plain = [i for i in spread if i not in special] or [0]
    return torch.tensor([plain[i % len(plain)] for i in range(ROWS * LENGTH)]).reshape(ROWS, LENGTH)


@torch.inference_mode()
def log_probs(causal: PreTrainedModel, rows: Tensor) -> Tensor:
    """[ROWS, LENGTH, V] of the probe by the stock model, one row at a time, on its device."""
    with stock_attention(causal):
        logits = [
            causal(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)
            for row in rows.to(causal.device)
        ]
    return torch.stack(logits).cpu()


@contextmanager
def stock_attention(causal: PreTrainedModel) -> Iterator[None]:
    """The model library's own attention in this context, in place of the packed one."""
    before = causal.config._attn_implementation
    causal.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before == IMPLEMENTATION:
            causal.set_attn_implementation(before)


def noise_floor(causal: PreTrainedModel, rows: Tensor, expected: Tensor) -> float:
    """Largest |Δ log-prob| when the output of every module has one more rounding error."""
    with rounded_anew(causal):
        return float((log_probs(causal, rows) - expected).abs().max())


@dataclass(frozen=True, slots=True)
class Gap:
    """How far log-probs [ROWS, LENGTH, V] are from those that are expected."""

    largest: float  # NaN when one is
    place: tuple[int, int]  # (row, position) of the largest
    noise: float  # what rounding explains; 0 where it was not needed

    @property
    def difference(self) -> str | None:
        """In words, when rounding does not explain it."""
        if self.largest <= max(FLOOR, NOISES * self.noise):
            return None
        row, position = self.place
        return (
            f"log-probs differ by {self.largest:.2g} after {position + 1} tokens of probe row "
            f"{row + 1}, and rounding explains {self.noise:.1g}"
        )

    @property
    def words(self) -> str:
        """Such as ``to the bit``, or ``to 3e-06``."""
        return f"to {self.largest:.1g}" if self.largest else "to the bit"


def gap(found: Tensor, expected: Tensor, *, of: PreTrainedModel, rows: Tensor) -> Gap:
    """Compare log-probs; noise is measured on the model that computed the expected ones."""
    gap_RTV = (found - expected).abs()
    worst = float(gap_RTV.max())
    noise = 0.0 if worst <= FLOOR else noise_floor(of, rows, expected)
    row, position = divmod(int(gap_RTV.amax(-1).argmax()), LENGTH)
    return Gap(worst, (row, position), noise)


def differing_tokens(
    found: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase
) -> str | None:
    """The first difference of two tokenizers: vocabulary, special tokens, templates, texts."""
    special = first_difference(found.special_tokens_map, expected.special_tokens_map)
    if special:
        return f"special token {special}"
    if found.get_vocab() != expected.get_vocab():
        return f"the vocabulary: {len(found)} tokens, and it had {len(expected)}, or in other order"
    for name, text in _same_text(found.chat_template, expected.chat_template):
        return f"chat template{name}: {text}"
    for text in _TEXTS:
        for special_too in (True, False):
            ids = [t(text, add_special_tokens=special_too)["input_ids"] for t in (found, expected)]
            if ids[0] != ids[1]:
                at = _parting(*ids)
                new, old = (row[at : at + 1] for row in ids)
                return f"token {at} of {text!r} is {new}, and was {old}"
    for conversation in _CONVERSATIONS:
        new, old = (_rendered(t, conversation) for t in (found, expected))
        # The templates are equal: one that has a clock differs from itself, too.
        if new != old and new == _rendered(found, conversation):
            return f"a conversation is rendered as {_short(new)}, and was {_short(old)}"
    return None


def _same_text(found: object, expected: object) -> Iterator[tuple[str, str]]:
    """Name and place of each chat template that differs."""
    both = [t if isinstance(t, dict) else {"": t} for t in (found, expected)]
    for name in sorted(both[0].keys() | both[1].keys()):
        new, old = (str(t.get(name) or "") for t in both)
        if new != old:
            at = _parting(new, old)
            yield (
                f" {name}".rstrip(),
                (f"character {at} begins {new[at : at + 30]!r}, and was {old[at : at + 30]!r}"),
            )


def _parting(found: Any, expected: Any) -> int:
    """The first index at which two sequences differ."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A conversation as text; the error when the template refuses it."""
    if tokenizer.chat_template is None:
        return ""
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except _TEMPLATE_FAULTS as error:
        return f"{type(error).__name__}: {error}"
