"""The local engine: one process, one device, stock models.

:class:`LocalPolicy` samples and scores; :class:`LocalLearner` trains. On one device they share
the very same weights, so nothing is copied or synchronised, and a fresh rollout's log-probs are
the learner's own: ratio 1 is a test, not a hope.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

import numpy as np
import torch
from torch import Tensor

from posttrain import clock
from posttrain.batch import PackedBatch, pack_trajectories
from posttrain.chat import ChatRenderer, Tokenizer
from posttrain.composition.moving import MOVING, MovingReference
from posttrain.config import digest
from posttrain.engines.masters import MasterWeights
from posttrain.engines.model import Dtype, Model, load_model
from posttrain.engines.sampler import generate
from posttrain.engines.shadow import Shadow
from posttrain.errors import ConfigError, ModelError
from posttrain.head import CHUNK_ELEMENTS, Stat, token_stats
from posttrain.protocols import Completion, Objective, Request, StepReport
from posttrain.provenance import FloatArray, IntArray, Kind, Producer
from posttrain.recipe import Lora, Optimizer
from posttrain.trajectory import Trajectory

# peft asks transformers for an attribute by its old name; nothing a user could act on.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)

SCORE_TOKENS = 16384
"""Tokens scored together when no gradient is needed."""


@dataclass(slots=True)
class Version:
    """Optimiser steps taken. Shared by a learner and its policy."""

    steps: int = 0


@final
class LocalPolicy:
    """A model in this process that can be sampled and asked for log-probs."""

    def __init__(
        self, model: Model, *, producer: Producer | None = None, version: Version | None = None
    ) -> None:
        self._model, self._version = model, version
        self._renderer = ChatRenderer(cast(Tokenizer, model.tokenizer), end_tokens=model.end_tokens)
        self._producer = producer or Producer(
            kind=Kind.TEACHER, name=model.name, digest=model.digest
        )

    @property
    def model(self) -> Model:
        """The model behind it."""
        return self._model

    @property
    def producer(self) -> Producer:
        """Author of what it writes."""
        return self._producer

    @property
    def version(self) -> int | None:
        """Steps taken, for a live learner; None for a frozen policy."""
        return self._version.steps if self._version else None

    @property
    def renderer(self) -> ChatRenderer:
        """Its tokenizer and chat template."""
        return self._renderer

    @property
    def context(self) -> int:
        """Longest sequence it was made for."""
        return self._model.context

    @property
    def vocabulary(self) -> str:
        """Digest of its token ids and the size of its head."""
        return digest([self._model.vocab_size, self._model.tokenizer.get_vocab()])

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        with clock.measure("decode"):
            return generate(self._model, requests, end_tokens=self._renderer.end_tokens)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory, at temperature 1; NaN where nothing is trained."""
        out: list[FloatArray] = []
        for batch, members in pack_trajectories(trajectories, max_tokens=SCORE_TOKENS):
            with torch.inference_mode():
                on_device = batch.to(self._model.device)
                stats = token_stats(
                    self._model.predicting(on_device),
                    self._model.head,
                    on_device,
                    wanted=frozenset({Stat.LOGPROB}),
                    vocab_size=self._model.vocab_size,
                )
            values = stats[Stat.LOGPROB].cpu().numpy()
            out.extend(_spread(values, batch, [trajectories[m] for m in members]))
        return out

    def distributions(
        self, trajectories: Sequence[Trajectory], *, top_k: int | None
    ) -> list[tuple[IntArray, FloatArray]]:
        """([T, K] ids, [T, K] log-probs), or ([T, 0], [T, V]) for the whole vocabulary."""
        out: list[tuple[IntArray, FloatArray]] = []
        for batch, members in pack_trajectories(trajectories, max_tokens=SCORE_TOKENS):
            with torch.inference_mode():
                on_device = batch.to(self._model.device)
                hidden = self._model.predicting(on_device)
                ids, values = self._top(hidden, top_k)
            chosen = [trajectories[m] for m in members]
            spread_ids = _spread(ids, batch, chosen, fill=-1)
            out.extend(zip(spread_ids, _spread(values, batch, chosen), strict=True))
        return out

    def _top(self, hidden_NX: Tensor, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Top-k ids and log-probs [N, K]; no ids and all log-probs [N, V] for None."""
        rows = max(CHUNK_ELEMENTS // self._model.vocab_size, 1)
        ids, values = [], []
        for hidden in hidden_NX.split(rows):
            logp = self._model.head(hidden).log_softmax(-1)
            if top_k is None:
                ids.append(np.zeros((len(hidden), 0), np.int32))
                values.append(logp.cpu().numpy())
            else:
                top = logp.topk(min(top_k, logp.shape[1]), -1)
                ids.append(top.indices.cpu().numpy().astype(np.int32))
                values.append(top.values.cpu().numpy())
        return np.concatenate(ids), np.concatenate(values)


def _spread(
    values_N: np.ndarray,
    batch: PackedBatch,
    trajectories: Sequence[Trajectory],
    *,
    fill: float = np.nan,
) -> list[np.ndarray]:
    """Values at trained tokens -> one [T, ...] array per trajectory, ``fill`` elsewhere."""
    per_sequence = np.bincount(batch.sequence_N.numpy(), minlength=batch.num_sequences)
    parts = np.split(values_N, np.cumsum(per_sequence)[:-1])
    out = []
    for trajectory, part in zip(trajectories, parts, strict=True):
        trained = np.flatnonzero(trajectory.trainable)
        full = np.full((len(trajectory), *values_N.shape[1:]), fill, values_N.dtype)
        full[trained[trained > 0]] = part
        out.append(full)
    return out


@final
class LocalLearner:
    """A model being trained with AdamW, all of it or through low-rank adapters.

    Saving keeps the trained weights, the optimiser state, the version and the moving reference if
    there is one: a learner that loads them goes on bit for bit on the same machine.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        optimizer: Optimizer,
        lora: Lora | None = None,
        seed: int = 0,
        moving: MovingReference | None = None,
    ) -> None:
        self._adapters = _attach(model, lora, seed=seed) if lora else None
        self._model, self._config = model, optimizer
        self._version = Version()
        producer = Producer(kind=Kind.LEARNER, name=name)
        self._policy = LocalPolicy(model, producer=producer, version=self._version)
        if lora is None:
            model.causal.requires_grad_(True)
        self._masters = MasterWeights(
            [(n, p) for n, p in model.causal.named_parameters() if p.requires_grad]
        )
        self._optimizer = torch.optim.AdamW(
            self._masters.parameters,
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        self._state: Mapping[str, float] = {}
        self._shadow = Shadow(model, [*self._masters.state()], moving) if moving else None
        follower = Producer(kind=Kind.TEACHER, name=f"{name}/{MOVING}")
        self._moving = LocalPolicy(self._shadow.model, producer=follower) if self._shadow else None

    @property
    def state(self) -> Mapping[str, float]:
        """What the objective remembers of earlier updates."""
        return self._state

    @property
    def moving(self) -> LocalPolicy | None:
        """The policy that follows the learner, if the stage declares one."""
        return self._moving

    @property
    def policy(self) -> LocalPolicy:
        """The live policy: the same weights, sampled and scored."""
        return self._policy

    def step(
        self, batches: Sequence[PackedBatch], objective: Objective, *, lr_scale: float
    ) -> StepReport:
        """One optimiser step over the micro-batches.

        Raises:
            ModelError: the gradient is not finite. Nothing was changed.
        """
        self._optimizer.zero_grad(set_to_none=True)
        counts = objective.counts(batches)
        total, metrics = 0.0, dict[str, float]()
        for batch in (b.to(self._model.device) for b in batches):
            with clock.measure("forward"):
                loss, shares = objective.loss(
                    self._model.predicting(batch),
                    self._model.head,
                    batch,
                    counts=counts,
                    vocab_size=self._model.vocab_size,
                )
            with clock.measure("backward"):
                loss.backward()
                total += float(loss.detach())
            for name, share in shares.items():
                metrics[name] = metrics.get(name, 0.0) + share
        with clock.measure("optimizer"):
            norm = self._update(lr_scale, loss=total)
        self._state = objective.after(metrics)
        return StepReport(
            loss=total,
            grad_norm=norm,
            num_tokens=sum(b.num_tokens for b in batches),
            num_trained=sum(len(b.target_N) for b in batches),
            metrics=metrics,
        )

    def _update(self, lr_scale: float, *, loss: float) -> float:
        """Clip and apply the gradients that were collected; returns their norm."""
        self._masters.take_gradients()
        weights = self._masters.parameters
        norm = float(torch.nn.utils.clip_grad_norm_(weights, self._config.max_grad_norm))
        if not np.isfinite(norm):
            raise ModelError(
                f"the gradient is not finite at version {self._version.steps} (loss {loss})",
                expected="finite losses and gradients",
                fix="lower the learning rate; the last checkpoint is intact",
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * lr_scale
        self._optimizer.step()
        self._masters.write_back()
        self._version.steps += 1
        if self._shadow is not None:
            self._shadow.follow(self._masters.state(), step=self._version.steps)
        return norm

    def save(self, folder: Path) -> None:
        """Trained weights, optimiser state and version, as ``learner.pt``."""
        state = {
            "weights": self._masters.state(),
            "optimizer": self._optimizer.state_dict(),
            "version": self._version.steps,
            "moving": self._shadow.state() if self._shadow else {},
            "state": dict(self._state),
        }
        torch.save(state, folder / "learner.pt")

    def load(self, folder: Path) -> None:
        """Go on from :meth:`save`.

        Raises:
            ModelError: the file belongs to another model or adapter configuration.
        """
        state = torch.load(folder / "learner.pt", weights_only=True, map_location="cpu")
        trained = self._masters.state()
        if trained.keys() != state["weights"].keys():
            raise ModelError(
                f"{folder}/learner.pt holds {len(state['weights'])} weights, "
                f"the learner trains {len(trained)}",
                expected="the checkpoint of this very stage",
            )
        if self._shadow is not None:
            self._shadow.load(state.get("moving", {}))
        self._masters.load(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._version.steps, self._state = state["version"], state.get("state", {})

    def export(self, folder: Path) -> None:
        """A plain model folder. Adapters are merged, and saved beside it in ``adapter/``.

        Merged weights are float32: rounded to bfloat16, a good part of a small adapter would be
        lost, and the export would be another policy than the one that was trained.
        """
        causal = self._model.causal
        if self._adapters is not None:
            _save_adapters(self._adapters, folder / "adapter")
            causal = copy.deepcopy(self._adapters).float().merge_and_unload()
        causal.save_pretrained(folder)
        self._model.tokenizer.save_pretrained(folder)


def _attach(model: Model, lora: Lora, *, seed: int):  # type: ignore[no-untyped-def]  # optional
    """Put adapters into the model, in place. Their random start follows from the seed."""
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


def _save_adapters(adapters, folder: Path) -> None:  # type: ignore[no-untyped-def]  # optional
    """Save adapters so that equal ones give equal files: without local paths, lists in order."""
    config = adapters.peft_config["default"]
    config.base_model_name_or_path = ""  # else the folder that the base happened to lie in
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, in any order
    adapters.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a card with nothing but that path


def frozen(model: Model) -> LocalPolicy:
    """A policy whose weights never change: a reference, a teacher, a policy to measure."""
    model.causal.requires_grad_(False)
    return LocalPolicy(model)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LocalEngine:
    """Policies and learners in this process.

    Args:
        device: where weights live.
        dtype: of the weights.
        remote_code: the one model whose own code may run; None for none.
    """

    device: torch.device
    dtype: Dtype = "float32"
    remote_code: str | None = None

    def policy(self, model: str) -> LocalPolicy:
        """A frozen policy from a folder or a hub id."""
        return frozen(self._load(model))

    def learner(
        self,
        model: str,
        *,
        name: str,
        optimizer: Optimizer,
        lora: Lora | None,
        seed: int = 0,
        moving: MovingReference | None = None,
    ) -> LocalLearner:
        """A learner that starts from a folder or a hub id."""
        return LocalLearner(
            self._load(model), name=name, optimizer=optimizer, lora=lora, seed=seed, moving=moving
        )

    def _load(self, model: str) -> Model:
        return load_model(
            model,
            dtype=self.dtype,
            device=self.device,
            remote_code=self.remote_code == model,
        )
