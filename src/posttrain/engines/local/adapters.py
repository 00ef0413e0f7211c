"""The trained weights of a model, with or without LoRA adapters, and what adapters reach."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.core.errors import ConfigError
from posttrain.core.learner import Lora
from posttrain.core.proofs import Proof, Subject
from posttrain.core.provenance import FloatArray, IntArray, Producer
from posttrain.core.trajectory import Trajectory
from posttrain.engines.local.attention import PackedPlan
from posttrain.engines.local.model import Model
from posttrain.numerics.batch import Segment
from posttrain.protocols import Completion, Hidden, Policy, Renderer, Request

# peft reads a transformers attribute by its old name; the user cannot change that.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


ALL_LINEAR = "all-linear"
KINDS_SHOWN = 4
"""Kinds of weights that a message names."""

_NO_PRODUCT = (nn.Embedding, nn.modules.conv._ConvNd)
"""Modules with a 2-dimensional weight that is no matrix product with hidden states."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's warnings: what they hint at is checked, and refused or proved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReach:
    """Which weight matrices have an adapter. A stack of experts counts as one matrix."""

    reached: tuple[str, ...]
    missed: tuple[str, ...]  # without embeddings and output head, unless they were asked for

    @property
    def words(self) -> str:
        """Such as ``adapters reach 8 of 10 weight matrices; not: layers.*.mlp.gate (2)``."""
        total = len(self.reached) + len(self.missed)
        said = f"adapters reach {len(self.reached)} of {total} weight matrices"
        return f"{said}; not: {shortened(self.missed)}" if self.missed else said


def shortened(names: Iterable[str]) -> str:
    """Names of weights in a few words: those of all layers as one, the most frequent first.

    Example:
        >>> shortened(["layers.0.gate", "layers.1.gate", "norm"])
        'layers.*.gate (2), norm'
    """
    kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    named = [f"{kind} ({n})" if n > 1 else kind for kind, n in kinds.most_common(KINDS_SHOWN)]
    more = len(kinds) - len(named)
    return ", ".join([*named, f"{more} more kinds"] if more else named)


def reach(causal: PreTrainedModel) -> AdapterReach:
    """Which matrices of a model with adapters have one."""
    adapted = {id(weight) for weight in _adapted_weights(causal)}
    embeddings = [m.weight for m in causal.modules() if isinstance(m, nn.Embedding)]
    ends = {id(weight) for weight in [*_ends(causal), *embeddings]}
    weights = [
        (name.replace(".base_layer", ""), id(weight) in adapted)
        for name, weight in causal.named_parameters()
        if ".lora_" not in name
        and weight.ndim > 1
        and (id(weight) in adapted or id(weight) not in ends)
    ]
    return AdapterReach(
        reached=tuple(name for name, has in weights if has),
        missed=tuple(name for name, has in weights if not has),
    )


def attach(model: Model, lora: Lora, *, seed: int):  # type: ignore[no-untyped-def]  # optional
    """Add adapters to the model, in place, initialised from the seed: (peft model, its proofs).

    ``all-linear`` means every matrix that a decoder multiplies hidden states with. peft finds
    linear layers; the matrices that it leaves out (experts that are stored as one stack, their
    routers, dense layers beside experts) are named to it one by one.

    Raises:
        ConfigError: peft is not installed; a target is not in the model, is tied to another
            weight, or cannot be adapted.
    """
    began, before = time.perf_counter(), _probe(model)
    modules, stacks = _split(model.causal, lora.target_modules)
    adapters = _with_adapters(model, lora, modules, stacks, seed=seed)
    if lora.target_modules == ALL_LINEAR and (left := _adaptable(model.causal)):
        adapters.unload()
        adapters = _with_adapters(model, lora, modules, left, seed=seed)
    _check_targets(adapters, model, lora)
    try:
        after = _probe(model)
    except (TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise _refused(model, lora, f"the model does not run with them: {error}") from error
    if not torch.equal(before, after):
        raise _refused(model, lora, "the model computes something else with them, before training")
    proof = Proof(
        subject=Subject.LOAD,
        of=model.name,
        words=f"new adapters change no bit of the policy; {reach(model.causal).words}",
        seconds=time.perf_counter() - began,
    )
    return adapters, (proof,)


def _probe(model: Model) -> Tensor:
    """Logits [T, V] of a few tokens: new adapters must not change a bit of them."""
    tokens = torch.arange(3, 8, device=model.device) % model.vocab_size
    positions = torch.arange(len(tokens), device=model.device)
    plan = PackedPlan.of((Segment(0, len(tokens), None),), device=model.device)
    with torch.no_grad():
        logits: Tensor = model.head(model.hidden(tokens, positions, plan))
    return logits


def _refused(model: Model, lora: Lora, why: str) -> ConfigError:
    return ConfigError(
        f"lora on {lora.target_modules!r} of {model.name}: {why}",
        expected="names of linear layers of this model, or all-linear",
        fix="name other target_modules, or train all weights (no lora)",
    )


def _split(
    causal: PreTrainedModel, targets: str | tuple[str, ...]
) -> tuple[str | list[str], list[str]]:
    """Targets that are modules, and those that are parameters, such as a stack of experts."""
    if isinstance(targets, str):
        return targets, []
    modules = {name for name, _ in causal.named_modules()}
    weights = {name for name, p in causal.named_parameters() if p.ndim > 1}
    stacks = [t for t in targets if not _among(t, modules) and _among(t, weights)]
    return [t for t in targets if t not in stacks], stacks


def _among(target: str, names: Iterable[str]) -> bool:
    """True when a target, as peft reads it, is one of these names or the end of one."""
    return any(name == target or name.endswith(f".{target}") for name in names)


def _with_adapters(  # type: ignore[no-untyped-def]  # optional
    model: Model, lora: Lora, modules: str | list[str], parameters: list[str], *, seed: int
):
    """The peft model around a model's decoder."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(
            "the stage asks for lora, and peft is not installed",
            fix="pip install 'posttrain[lora]'",
        ) from None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules=modules,
            target_parameters=parameters or None,
            exclude_modules=_own_linear(model.causal) if modules == ALL_LINEAR else None,
            task_type="CAUSAL_LM",
        )
        try:
            with quiet():
                return get_peft_model(model.causal, config)
        except (ValueError, NotImplementedError, AttributeError, re.error) as error:
            words = " ".join(str(error).split())
            raise _refused(model, lora, words[:200]) from error


def _own_linear(causal: PreTrainedModel) -> list[str] | None:
    """Linear layers with a forward pass of their own, such as routers that return a tuple: peft
    would take them for plain ones. Their weights can be adapted as parameters."""
    found = [
        name
        for name, module in causal.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    ]
    return found or None


def _adapted_weights(causal: PreTrainedModel) -> list[Tensor]:
    """The weights under the adapters."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers: list[Any] = [m for m in causal.modules() if isinstance(m, LoraLayer)]
    return [
        layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
        for layer in layers
    ]


def _ends(causal: PreTrainedModel) -> list[Tensor]:
    """The weights of the input embeddings and of the output head."""
    ends: list[Any] = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    return [end.weight for end in ends if end is not None]


def _adaptable(causal: PreTrainedModel) -> list[str]:
    """Matrices without an adapter that hidden states are multiplied with: linear layers, and the
    stacks and routers that a family's own modules hold."""
    adapted = {id(weight) for weight in [*_adapted_weights(causal), *_ends(causal)]}
    found = []
    for name, module in causal.named_modules():
        if isinstance(module, _NO_PRODUCT):
            continue
        # A wrapper around a module cannot be merged after adapters inside of it.
        outer = any(
            isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module
        )
        own = not outer and type(module).__module__.partition(".")[0] not in ("torch", "peft")
        for kind, weight in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear) and kind == "weight"
            stack = own and weight.ndim == 3
            router = own and weight.ndim == 2 and kind == "weight"
            if (linear or stack or router) and id(weight) not in adapted and ".lora_" not in name:
                found.append(f"{name}.{kind}".replace(".base_layer", ""))
    return found


def _check_targets(adapters, model: Model, lora: Lora) -> None:  # type: ignore[no-untyped-def]
    """Raise a ConfigError for targets that nothing has, that nothing is reached by, or whose
    weight another module shares: merging would change both."""
    names = {name.replace(".base_layer", "") for name, _ in model.causal.named_modules()}
    asked = adapters.peft_config["default"].target_modules
    unknown = [] if isinstance(asked, str) else sorted(t for t in asked if not _among(t, names))
    if unknown:
        raise _refused(model, lora, f"no module is called {', '.join(unknown)}")
    if not reach(model.causal).reached:
        raise _refused(model, lora, "they reach no weight matrix")
    adapted = {id(weight) for weight in _adapted_weights(model.causal)}
    into, *out = _ends(model.causal)
    if id(into) in adapted and any(weight is into for weight in out):
        raise _refused(
            model,
            lora,
            "the input embeddings and the output head are one weight here, and an adapter on one "
            "of them would be merged into both",
        )


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
        """Digest of its token ids."""
        return self._policy.vocabulary

    @property
    def rows(self) -> int:
        """Ids of its distributions."""
        return self._policy.rows

    def over(self, rows: int) -> WithoutAdapters:
        """The same policy, its distributions over the first ids only."""
        return (
            self if rows >= self.rows else WithoutAdapters(self._policy.over(rows), self._adapters)
        )

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
    if config.target_parameters is not None:
        config.target_parameters = sorted(config.target_parameters)
    with quiet():
        adapters.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a card that holds only that path
