"""The balancing loss that a mixture of experts asks for in its configuration.

    router modules ──hooks──▶ logits of every layer [T, E] ──the family's own function──▶ loss

``output_router_logits: true`` in a config.json means that training adds ``router_aux_loss_coef``
times the load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6). It is
computed by the model library's function from the logits of a micro-batch. Packed rows have no
padding, and a prompt that rows share counts once. Over micro-batches the mean is taken, weighted
by tokens.

Shape legend: ``T`` packed tokens, ``E`` experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.core.errors import ModelError
from posttrain.core.proofs import Proof, Subject
from posttrain.engines.local.comparing import probe_rows, stock_attention
from posttrain.engines.local.model import Model
from posttrain.models.routers import ASKED, balance_weight, balance_words

BALANCE = "router/balance_loss"
"""Metric of a step: the balancing loss, before its coefficient."""

_FUNCTION = "load_balancing_loss_func"


@final
@dataclass(slots=True, eq=False)
class Routing:
    """The routers of a model that is trained, and the loss on their choices."""

    weight: float
    function: Callable[..., Any]  # the family's own: (logits per layer, E, top k) -> loss
    num_experts: int
    top_k: int
    routers: list[nn.Module]
    place: int  # of the logits in what a router returns
    logits: list[Tensor] = field(default_factory=list)  # [T, E] of each layer, of the last pass

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the logits of one forward pass. In a backward pass layers may run again."""
        self.logits = []

        def keep(module: nn.Module, inputs: object, out: Any) -> None:
            self.logits.append(out if isinstance(out, Tensor) else out[self.place])

        hooks = [router.register_forward_hook(keep) for router in self.routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self) -> Tensor:
        """The balancing loss of the last forward pass, before its coefficient; frees its logits."""
        out: Tensor = self.function(tuple(self.logits), self.num_experts, self.top_k)
        self.logits = []
        return out


def routing(model: Model) -> tuple[Routing | None, tuple[Proof, ...]]:
    """The balancing loss of a model, as its configuration asks for it, and what was compared.

    Raises:
        ModelError: the configuration asks for it, and it cannot be computed as the library does.
    """
    config = model.causal.config.get_text_config().to_dict()
    words = balance_words(config)
    if words is None:
        return None, ()
    proof = Proof(subject=Subject.LOAD, of=model.name, words=f"routers: {words}")
    if config.get(ASKED) is not True:
        return None, (proof,)
    weight = balance_weight(config)
    found = _routing(model.causal, weight)
    if found is None:
        raise _refused(model, "this family's library code has no balancing loss that can be used")
    rows = probe_rows(model.vocab_size, model.tokenizer)[:1].to(model.device)
    with torch.inference_mode(), stock_attention(model.causal):
        with found.listening():
            out = model.causal(input_ids=rows, use_cache=False, output_router_logits=True)
        ours = float(found.loss())
    own = float(out.aux_loss)
    if not abs(ours - own) <= 1e-4 * max(abs(own), 1.0):
        raise _refused(model, f"it is {ours:.4g} on a probe, and by the library {own:.4g}")
    return found, (replace(proof, words=f"{proof.words}; on a probe it is the library's own"),)


def _routing(causal: PreTrainedModel, weight: float) -> Routing | None:
    """The family's function and routers; None where the library does not name them."""
    function = vars(sys.modules[type(causal).__module__]).get(_FUNCTION)
    decoder: Any = causal.base_model
    recorded = (decoder._can_record_outputs or {}).get("router_logits")
    recorder = recorded[0] if isinstance(recorded, list) else recorded
    experts, top_k = (vars(causal).get(n) for n in ("num_experts", "num_experts_per_tok"))
    if function is None or recorder is None or not (experts and top_k):
        return None
    kind = recorder if isinstance(recorder, type) else recorder.target_class
    routers = [module for module in causal.modules() if isinstance(module, kind)]
    place = 0 if isinstance(recorder, type) else recorder.index
    return Routing(weight, function, experts, top_k, routers, place) if routers else None


def _refused(model: Model, why: str) -> ModelError:
    return ModelError(
        f"{model.name}: its config asks for the routers' balancing loss ({ASKED}), and {why}",
        expected="a loss that is computed as the model library computes it",
        fix=f"set {ASKED} to false in its config.json to train without it",
    )
