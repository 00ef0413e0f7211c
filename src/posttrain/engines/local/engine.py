"""The local engine: one process, one device, stock models.

:class:`LocalPolicy` samples and scores; :class:`LocalLearner` trains. They share the same weights,
so nothing is copied or synchronised, and the log-probs of a fresh rollout are the learner's own:
a test checks that the ratio is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.core import clock
from posttrain.core.errors import LegalityError, ModelError
from posttrain.core.learner import MOVING, Lora, MovingReference, Optimizer
from posttrain.core.proofs import Proof
from posttrain.core.provenance import Kind, Producer
from posttrain.core.statistics import Wanted
from posttrain.engines.local.adapters import WithoutAdapters, attach, trained_weights
from posttrain.engines.local.checkpoint import Checkpoint, read_checkpoint
from posttrain.engines.local.exporting import export
from posttrain.engines.local.footprint import comfortable_tokens
from posttrain.engines.local.loading import KnownProofs, load_model
from posttrain.engines.local.master_weights import MasterWeights
from posttrain.engines.local.memory import Doing, in_memory
from posttrain.engines.local.model import Dtype, Model
from posttrain.engines.local.moving_average import MovingAverage
from posttrain.engines.local.policy import LocalPolicy, Version, frozen
from posttrain.engines.local.recompute import Recomputation
from posttrain.engines.local.routing import BALANCE, routing
from posttrain.engines.local.scalar import CRITIC, Scalar
from posttrain.models.code import same_code
from posttrain.models.hub import resolve_folder
from posttrain.numerics.batch import PackedBatch
from posttrain.protocols import Objective, ScalarStart, StepReport


@final
class LocalLearner:
    """A model being trained with AdamW: all weights, or low-rank adapters.

    A scalar head is trained with it, on the model's own hidden states or, as a critic, on a
    separate decoder with its own learning rate, gradient norm and adapters.

    A checkpoint holds the trained weights, the optimiser state, the version and the moving
    reference if there is one: a learner that loads it resumes bit for bit on the same machine.
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
        scalar: Scalar | None = None,
        critic_lr: float | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        self._adapters: Any  # of peft, which is optional
        self._adapters, adapted = attach(model, lora, seed=seed) if lora else (None, ())
        self._routing, balanced = routing(model)
        self._model, self._config, self._scalar = model, optimizer, scalar
        self._version = Version()
        producer = Producer(kind=Kind.LEARNER, name=name)
        self._policy = LocalPolicy(
            model,
            producer=producer,
            version=self._version,
            scalar=scalar,
            proofs=(*adapted, *balanced),
        )
        self._critic = scalar.trunk if scalar and scalar.trunk is not model else None
        self._critic_adapters = (
            attach(self._critic, lora, seed=seed)[0] if lora and self._critic is not None else None
        )
        models = [model] if self._critic is None else [model, self._critic]
        self._recomputed = Recomputation(models) if activation_checkpointing else None
        trained, critic = trained_weights(model, lora), list[tuple[str, nn.Parameter]]()
        if self._critic is not None:
            read = trained_weights(self._critic, lora, reads=True)
            critic = [(f"{CRITIC}.{name}", p) for name, p in read]
        policy_only = [name for name, _ in trained]
        if scalar is not None:
            (trained if self._critic is None else critic).extend(scalar.parameters)
        self._masters = MasterWeights([*trained, *critic])
        weights = self._masters.parameters
        rates = (optimizer.lr, optimizer.lr if critic_lr is None else critic_lr)
        groups = (weights[: len(trained)], weights[len(trained) :])
        self._rates = [(lr, params) for lr, params in zip(rates, groups, strict=True) if params]
        self._optimizer = torch.optim.AdamW(
            [{"params": params, "lr": lr} for lr, params in self._rates],
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,  # one pass over weights and state: a quarter of the time on a CPU
        )
        self._state: Mapping[str, float] = {}
        self._average = MovingAverage(model, policy_only, moving) if moving else None
        self._start = None
        if self._adapters is not None:
            own = LocalPolicy(model, scalar=Scalar.load(model, model.folder))
            self._start = WithoutAdapters(own, self._adapters)
        follower = Producer(kind=Kind.TEACHER, name=f"{name}/{MOVING}")
        self._moving = (
            LocalPolicy(self._average.model, producer=follower) if self._average else None
        )

    @property
    def state(self) -> Mapping[str, float]:
        """The objective's state after earlier updates."""
        return self._state

    @property
    def micro_batch_tokens(self) -> int:
        """Default number of tokens of a micro-batch."""
        return comfortable_tokens(self._model.causal.base_model, self._model.device)

    @property
    def start(self) -> WithoutAdapters | None:
        """The policy it started from, if adapters leave its weights unchanged; else None."""
        return self._start

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
            ModelError: the gradient is not finite, or there is too little memory. Of the former
                the weights are unchanged.
        """
        with in_memory(Doing.TRAINING):
            return self._step(batches, objective, lr_scale=lr_scale)

    def _step(
        self, batches: Sequence[PackedBatch], objective: Objective, *, lr_scale: float
    ) -> StepReport:
        self._optimizer.zero_grad(set_to_none=True)
        counts = objective.counts(batches)
        total, metrics = 0.0, dict[str, float]()
        num_tokens = sum(batch.num_tokens for batch in batches)
        for batch in (b.to(self._model.device) for b in batches):
            with clock.timed("forward"):
                with self._computing():
                    hidden, scalars = self._forward(batch, objective)
                loss, shares = objective.loss(
                    hidden,
                    self._model.head,
                    batch,
                    counts=counts,
                    vocab_size=self._model.vocab_size,
                    scalars=scalars,
                )
                if self._routing is not None and self._routing.logits:
                    balance = self._routing.loss() * (batch.num_tokens / num_tokens)
                    loss = loss + self._routing.weight * balance
                    shares = {**shares, BALANCE: float(balance.detach())}
            with clock.timed("backward"):
                loss.backward()
                total += float(loss.detach())
            for name, share in shares.items():
                metrics[name] = metrics.get(name, 0.0) + share
        with clock.timed("optimizer"):
            before = self._masters.sample()
            norm, *critic = self._update(lr_scale, loss=total)
            metrics["moved"] = float((self._masters.sample() - before).norm())
            metrics |= {f"{CRITIC}/grad_norm": n for n in critic}
        self._state = objective.after(metrics)
        return StepReport(
            loss=total,
            grad_norm=norm,
            num_tokens=num_tokens,
            num_trained=sum(len(b.target_N) for b in batches),
            metrics=metrics,
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """A forward pass with a gradient: activations recomputed, routers listened to."""
        with (
            self._recomputed.on() if self._recomputed else nullcontext(),
            self._routing.listening() if self._routing else nullcontext(),
        ):
            yield

    def _update(self, lr_scale: float, *, loss: float) -> list[float]:
        """Clip and apply the accumulated gradients; returns the norm of each group."""
        self._masters.take_gradients()
        limit = self._config.max_grad_norm
        norms = [float(nn.utils.clip_grad_norm_(params, limit)) for _, params in self._rates]
        if not np.isfinite(norms).all():
            raise ModelError(
                f"the gradient is not finite at version {self._version.steps} (loss {loss})",
                expected="finite losses and gradients",
                fix="lower the learning rate; the last checkpoint is intact",
            )
        for group, (lr, _) in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * lr_scale
        self._optimizer.step()
        self._masters.write_back()
        self._version.steps += 1
        if self._average is not None:
            self._average.follow(self._masters.state(), step=self._version.steps)
        return norms

    def _forward(
        self, batch: PackedBatch, objective: Objective
    ) -> tuple[Tensor, Mapping[Wanted, Tensor]]:
        """Hidden states [N, X] that predict the trained tokens, and scalar head statistics [N]."""
        if not objective.scalars:
            return self._model.predicting(batch), {}
        scalar = self._scalar
        if scalar is None:
            raise LegalityError(
                f"a term reads {', '.join(sorted(objective.scalars))}, and the learner has no "
                "scalar head",
                fix="give the composition a scalar_head",
            )
        read = scalar.trunk.packed(batch)
        scalars = scalar.stats(read, batch, objective.scalars)
        if scalar.trunk is self._model or not objective.reads_logits:
            return read[batch.predict_N], scalars
        return self._model.predicting(batch), scalars

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            weights=self._masters.state(),
            optimizer=self._optimizer.state_dict(),
            version=self._version.steps,
            moving=self._average.state() if self._average else {},
            state=self._state,
        )

    def save(self, folder: Path) -> None:
        """Trained weights, optimiser state and version, as ``learner.pt``."""
        self._checkpoint().save(folder)

    def load(self, folder: Path) -> None:
        """Load what :meth:`save` wrote.

        Raises:
            RunError: the file is damaged, or belongs to another learner. Nothing is changed.
        """
        groups = [params for _, params in self._rates]
        saved = read_checkpoint(folder, like=self._checkpoint(), groups=groups)
        if self._average is not None:
            self._average.load(saved.moving)
        self._masters.load(saved.weights)
        self._optimizer.load_state_dict(dict(saved.optimizer))
        self._version.steps, self._state = saved.version, saved.state

    def export(self, folder: Path) -> tuple[Proof, ...]:
        """A plain model folder. Adapters are merged, and saved beside it in ``adapter/``.

        Merged weights are float32: rounding to bfloat16 would lose much of a small adapter, and
        the export would differ from the trained policy.

        A scalar head is saved beside its trunk; a critic's trunk is a separate model folder,
        ``critic/`` inside the policy's.
        """
        with in_memory(Doing.EXPORTING):
            return tuple(self._exported(folder))

    def _exported(self, folder: Path) -> list[Proof]:
        proofs = export(self._model, self._adapters, folder)
        if self._scalar is not None:
            home = folder if self._critic is None else folder / CRITIC
            if self._critic is not None:
                proofs += export(self._critic, self._critic_adapters, home)
            proofs.append(self._scalar.export(home))
        return proofs


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LocalEngine:
    """Policies and learners in this process.

    Args:
        device: where the weights are.
        dtype: of the weights.
        remote_code: the model whose repository code may run, there and in folders that hold the
            same code; None for none.
    """

    device: torch.device
    dtype: Dtype = "float32"
    remote_code: str | None = None
    proved: KnownProofs = field(default_factory=dict, init=False, repr=False, compare=False)

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
        scalar: ScalarStart | None = None,
        activation_checkpointing: bool = False,
    ) -> LocalLearner:
        """A learner that starts from a folder or a hub id."""
        loaded = self._load(model)
        return LocalLearner(
            loaded,
            name=name,
            optimizer=optimizer,
            lora=lora,
            seed=seed,
            moving=moving,
            scalar=self._scalar(scalar, loaded) if scalar else None,
            critic_lr=scalar.lr if scalar else None,
            activation_checkpointing=activation_checkpointing,
        )

    def _scalar(self, start: ScalarStart, policy: Model) -> Scalar:
        """The initial scalar head of a learner; a critic loads a second copy of its model."""
        folder = resolve_folder(start.model)
        if start.trunk == "shared":
            trunk = policy
        else:
            folder = folder / CRITIC if (folder / CRITIC).is_dir() else folder
            trunk = self._load(str(folder))
            if trunk.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
                raise ModelError(
                    f"the critic {start.model} and the policy {policy.name} have different "
                    "vocabularies",
                    expected="the same token ids",
                    fix="start the critic from the policy, or from a model of its family",
                )
        return Scalar.load(trunk, folder) or Scalar.zero(trunk)

    def _load(self, model: str) -> Model:
        with in_memory(Doing.LOADING):
            return load_model(
                model,
                dtype=self.dtype,
                device=self.device,
                remote_code=self._may_run(model),
                known=self.proved,
            )

    def _may_run(self, model: str) -> bool:
        """True for the model whose code may run, and for what has the same code: its exports."""
        if self.remote_code is None or model == self.remote_code:
            return model == self.remote_code
        return same_code(resolve_folder(model), resolve_folder(self.remote_code))
