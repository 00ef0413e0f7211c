"""The trained weights of a model, with or without LoRA adapters, and their export."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import nn

from posttrain.core.errors import ConfigError
from posttrain.core.learner import Lora
from posttrain.core.proofs import Proof
from posttrain.core.provenance import FloatArray, IntArray, Producer
from posttrain.core.trajectory import Trajectory
from posttrain.engines.local.model import Model
from posttrain.protocols import Completion, Hidden, Policy, Renderer, Request

# peft reads a transformers attribute by its old name; the user cannot change that.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def trained_weights(
    model: Model, lora: Lora | None, *, reads: bool = False
) -> list[tuple[str, nn.Parameter]]:
    """The trained weights, by name. A critic only ``reads``: its output head is not trained."""
    if lora is None:
        model.causal.requires_grad_(True)
        out, into = (
            e.weight
            for e in (model.causal.get_output_embeddings(), model.causal.get_input_embeddings())
        )
        if reads and out is not into:
            out.requires_grad_(False)
    return [(n, p) for n, p in model.causal.named_parameters() if p.requires_grad]


def export(model: Model, adapters, folder: Path) -> None:  # type: ignore[no-untyped-def]  # optional
    """Write weights and tokenizer as a model folder: adapters merged, and saved in ``adapter/``."""
    causal = model.causal
    if adapters is not None:
        save_adapters(adapters, folder / "adapter")
        causal = copy.deepcopy(adapters).float().merge_and_unload()
    causal.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def attach(model: Model, lora: Lora, *, seed: int):  # type: ignore[no-untyped-def]  # optional
    """Add adapters to the model, in place, initialised from the seed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(
            "the stage asks for lora, and peft is not installed",
            fix="pip install 'posttrain[lora]'",
        ) from None
    targets = lora.target_modules
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model.causal, config)
        except ValueError as error:
            raise ConfigError(
                f"lora on {targets!r}: {error}",
                expected="names of linear layers of this model, or all-linear",
            ) from error


@final
class WithoutAdapters:
    """The frozen policy that a learner with adapters started from: the same weights, adapters off.

    It needs no second model. Do not call it while the learner computes.

    Args:
        policy: a frozen policy on the model that carries the adapters.
        adapters: the peft model around it.
    """

    def __init__(self, policy: Policy, adapters) -> None:  # type: ignore[no-untyped-def]  # optional
        self._policy, self._adapters = policy, adapters

    @property
    def producer(self) -> Producer:
        """Author of what it writes."""
        return self._policy.producer

    @property
    def version(self) -> int | None:
        """None: it never changes."""
        return self._policy.version

    @property
    def renderer(self) -> Renderer:
        """Its tokenizer and chat template."""
        return self._policy.renderer

    @property
    def context(self) -> int:
        """Longest sequence of the model, in tokens."""
        return self._policy.context

    @property
    def proofs(self) -> Sequence[Proof]:
        """Those of the policy."""
        return self._policy.proofs

    @property
    def vocabulary(self) -> str:
        """Digest of its token ids and the size of its head."""
        return self._policy.vocabulary

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        with self._adapters.disable_adapter():
            return self._policy.generate(requests)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory, at temperature 1; NaN where nothing is trained."""
        with self._adapters.disable_adapter():
            return self._policy.logprobs(trajectories)

    def distributions(
        self, trajectories: Sequence[Trajectory], *, top_k: int | None
    ) -> list[tuple[IntArray, FloatArray]]:
        """([T, K] ids, [T, K] log-probs), or ([T, 0], [T, V]) for the whole vocabulary."""
        with self._adapters.disable_adapter():
            return self._policy.distributions(trajectories, top_k=top_k)

    @property
    def hidden(self) -> Hidden | None:
        """Hidden states with adapters off; None where adapters change the head."""
        own = self._policy.hidden
        if own is None:
            return None

        def states(trajectories: Sequence[Trajectory]) -> list[FloatArray]:
            with self._adapters.disable_adapter():
                return own.states(trajectories)

        return Hidden(head=own.head, states=states)

    def entropies(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: entropy before each trained token; NaN elsewhere."""
        with self._adapters.disable_adapter():
            return self._policy.entropies(trajectories)

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: the scalar head before each trained token; NaN elsewhere."""
        with self._adapters.disable_adapter():
            return self._policy.values(trajectories)

    def scores(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: the scalar head after each trained token; NaN elsewhere."""
        with self._adapters.disable_adapter():
            return self._policy.scores(trajectories)


def save_adapters(adapters, folder: Path) -> None:  # type: ignore[no-untyped-def]  # optional
    """Save adapters so that equal ones give equal files: without local paths, lists in order."""
    config = adapters.peft_config["default"]
    config.base_model_name_or_path = ""  # else the local folder of the base model
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, in any order
    adapters.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a card that holds only that path
