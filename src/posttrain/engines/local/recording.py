"""A stock decoder without the Python between its kernels.

    model.forward ──traced once──▶ graph of kernels, with a custom operator for attention
                                        └─▶ posttrain::attend ──▶ the current plan's attend()

At 64 rows, a step of a model with a few million weights spends as long in Python (modules,
decorators, keyword arguments) as in kernels. ``torch.jit.trace`` records the kernels that a
forward pass calls, with sizes as variables, so that one recording works for every number of
tokens. Attention is a custom operator, which calls the current plan.

A recording is rejected, and the stock forward is used, where the two could differ: where a Python
branch depends on a tensor's values, where modules are not the model library's own (adapters can be
switched), or where a probe differs from the stock forward. A recording refers to the weights
themselves, not to a copy, and so follows training. Not used on CUDA, where the tracer's fuser
would change the numbers and CUDA graphs of whole steps save more (``decoding.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, library, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]  # exported at run time
from transformers import PreTrainedModel

from posttrain.engines.local.attention import PLAN, AttentionPlan, PackedPlan
from posttrain.numerics.batch import Segment
from posttrain.numerics.matmul import linear_layers

_OWN = ("torch.nn.", "transformers.")
_NO_WINDOW = -1
_CURRENT: ContextVar[AttentionPlan] = ContextVar("plan")


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int) -> Tensor:
    limit = None if window == _NO_WINDOW else window
    return _CURRENT.get().attend(q, k, v, scaling=scaling, window=limit)


_LIBRARY = library.Library("posttrain", "DEF")
_LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, float scaling, int window) -> Tensor")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")


@dataclass(frozen=True, slots=True, eq=False)
class _CurrentPlan:
    """The plan of a recorded graph: calls the plan that is current when the graph runs."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        limit = _NO_WINDOW if window is None else window
        out: Tensor = torch.ops.posttrain.attend(q, k, v, scaling, limit)
        return out


class _Body(nn.Module):
    """token ids [T], positions [T] -> final hidden states [T, X]."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        return stock_hidden(self.decoder, tokens_T, positions_T, _CurrentPlan())


def stock_hidden(
    decoder: nn.Module, tokens_T: Tensor, positions_T: Tensor, plan: AttentionPlan
) -> Tensor:
    """Final hidden states [T, X] of packed tokens, by the model library's own forward."""
    with linear_layers():
        out = decoder(
            input_ids=tokens_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            **{PLAN: plan},
        )
    states: Tensor = out.last_hidden_state[0]
    return states


@final
class Recording:
    """One model's recorded forward pass, recorded at the first use. For sampling: no gradients."""

    def __init__(self, causal: PreTrainedModel) -> None:
        self._causal = causal
        self._body: torch.jit.ScriptModule | None = None
        self._refusal: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why the stock forward is used; None before the first use, or when it is not used."""
        return self._refusal

    def prepare(self) -> None:
        """Record, or set :attr:`refusal`. Call it once per generation: adapters may be new."""
        if self._causal.device.type != "cpu":
            self._refusal = "only recorded on a CPU"
        elif foreign := _foreign(self._causal):
            self._refusal = f"{foreign} is no module of the model library"
        elif self._body is None and self._refusal is None:
            self._record()

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, plan: AttentionPlan) -> Tensor:
        """Final hidden states [T, X] of packed tokens."""
        if self._body is None or self._refusal is not None:
            return stock_hidden(self._causal.base_model, tokens_T, positions_T, plan)
        before = _CURRENT.set(plan)
        try:
            states: Tensor = self._body(tokens_T, positions_T)
        finally:
            _CURRENT.reset(before)
        return states

    def _record(self) -> None:
        decoder = self._causal.base_model
        probes = [_probe(self._causal, length) for length in (5, 12)]
        before = _CURRENT.set(probes[0][2])
        try:
            with _loss_type_set(decoder), warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                body = torch.jit.trace(_Body(decoder), probes[0][:2], check_trace=False)
        except RuntimeError as error:
            self._refusal = f"the tracer failed: {str(error).strip().splitlines()[0]}"
            return
        finally:
            _CURRENT.reset(before)
        if branches := _branches(seen):
            self._refusal = f"a branch depends on values: {branches[0]}"
            return
        self._body = body
        for probe in probes:
            gap = (self.hidden(*probe) - stock_hidden(decoder, *probe)).abs().max()
            if not gap <= 1e-5:
                self._refusal = f"a probe differs by {float(gap):.2g}"


@contextmanager
def _loss_type_set(decoder: Any) -> Iterator[None]:
    """Set ``loss_type``: the tracer reads every property of a module, and for a decoder without a
    head the model library would warn that the config names no loss."""
    before = getattr(decoder, "loss_type", None)
    decoder.loss_type = "ForCausalLM"
    try:
        yield
    finally:
        decoder.loss_type = before


def _probe(causal: PreTrainedModel, length: int) -> tuple[Tensor, Tensor, PackedPlan]:
    vocab = causal.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(3, 3 + length, device=causal.device) * 7919 % vocab
    positions = torch.arange(length, device=causal.device)
    plan = PackedPlan.of((Segment(0, length, None),), device=causal.device)
    return tokens, positions, plan


def _foreign(causal: nn.Module) -> str | None:
    """The first module whose forward is not the libraries' own."""
    for module in causal.modules():
        if not type(module).__module__.startswith(_OWN):
            return type(module).__name__
    return None


def _branches(seen: list[warnings.WarningMessage]) -> list[str]:
    """Source lines that used a tensor's values in Python during tracing."""
    return [f"{w.filename}:{w.lineno}" for w in seen if issubclass(w.category, TracerWarning)]
