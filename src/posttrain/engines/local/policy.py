"""A model in this process as a policy, frozen or live: sampling and log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

import numpy as np
import torch
from torch import Tensor

from posttrain.chat.renderer import ChatRenderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.core import clock
from posttrain.core.config import digest
from posttrain.core.errors import LegalityError, ModelError
from posttrain.core.proofs import Proof
from posttrain.core.provenance import FloatArray, IntArray, Kind, Producer
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Trajectory
from posttrain.engines.local.memory import Doing, in_memory
from posttrain.engines.local.model import Model
from posttrain.engines.local.sampler import generate
from posttrain.engines.local.scalar import Scalar
from posttrain.numerics.batch import PackedBatch, pack_trajectories
from posttrain.numerics.head import token_stats
from posttrain.numerics.logits import CHUNK_ELEMENTS, LinearHead
from posttrain.protocols import Completion, Hidden, Request

SCORE_TOKENS = 16384
"""Tokens of a scoring batch, which needs no gradient."""


@dataclass(slots=True)
class Version:
    """Optimiser steps taken. Shared by a learner and its policy."""

    steps: int = 0


@final
class LocalPolicy:
    """A model in this process that samples completions and computes log-probs."""

    def __init__(
        self,
        model: Model,
        *,
        producer: Producer | None = None,
        version: Version | None = None,
        scalar: Scalar | None = None,
        proofs: tuple[Proof, ...] | None = None,
    ) -> None:
        self._model, self._version, self._scalar = model, version, scalar
        self._proofs = model.proofs if proofs is None else proofs
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
        """Longest sequence of the model, in tokens."""
        return self._model.context

    @property
    def vocabulary(self) -> str:
        """Digest of its token ids. The rows of its head do not count: some are padding."""
        return digest(self._model.tokenizer.get_vocab())

    @property
    def rows(self) -> int:
        """Rows of its output head, padding included."""
        return self._model.vocab_size

    def over(self, rows: int) -> LocalPolicy:
        """The same policy, its distributions over the first ids only; itself if it has no more."""
        if rows >= self.rows:
            return self
        return LocalPolicy(
            self._model.over(rows),
            producer=self._producer,
            version=self._version,
            scalar=self._scalar,
        )

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """What was compared when its model was loaded, or when a learner's adapters were added."""
        return self._proofs

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        self._check_speaks()
        with clock.timed("decode"), in_memory(Doing.SAMPLING):
            return generate(
                self._model,
                requests,
                end_tokens=self._renderer.end_tokens,
                decode=lambda tokens: self._renderer.text(np.array(tokens, np.int32)),
            )

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory, at temperature 1; NaN where nothing is trained."""
        return self._scored(trajectories, Stat.LOGPROB)

    def entropies(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory, in nats; NaN where nothing is trained."""
        return self._scored(trajectories, Stat.ENTROPY)

    @in_memory(Doing.SCORING)
    def _scored(self, trajectories: Sequence[Trajectory], stat: Stat) -> list[FloatArray]:
        self._check_speaks()
        out: list[FloatArray] = []
        for batch, members in pack_trajectories(trajectories, max_tokens=SCORE_TOKENS):
            with torch.inference_mode():
                on_device = batch.to(self._model.device)
                stats = token_stats(
                    self._model.predicting(on_device),
                    self._model.head,
                    on_device,
                    wanted=frozenset({stat}),
                    vocab_size=self._model.vocab_size,
                )
            values = stats[stat].cpu().numpy()
            out.extend(_spread(values, batch, [trajectories[m] for m in members]))
        return out

    @in_memory(Doing.SCORING)
    def distributions(
        self, trajectories: Sequence[Trajectory], *, top_k: int | None
    ) -> list[tuple[IntArray, FloatArray]]:
        """([T, K] ids, [T, K] log-probs), or ([T, 0], [T, V]) for the whole vocabulary."""
        self._check_speaks()
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

    @property
    def hidden(self) -> Hidden | None:
        """Its hidden states and head, if it is frozen and has a digest; else None.

        None for the live learner and a moving reference: an update may come between, and states
        of one version must not be used with the head of another.
        """
        reads = self._model.causal.get_output_embeddings()
        changes = any(weight.requires_grad for weight in reads.parameters())
        if self._version is not None or self._producer.digest is None or changes:
            return None
        head = self._model.head
        if isinstance(head, LinearHead):
            return Hidden(head=head, states=self._states)
        dtype = self._model.causal.dtype
        return Hidden(head=lambda hidden_NX: head(hidden_NX.to(dtype)), states=self._states)

    @in_memory(Doing.SCORING)
    def _states(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T, X] per trajectory, NaN where nothing is trained."""
        self._check_speaks()
        out: list[FloatArray] = []
        for batch, members in pack_trajectories(trajectories, max_tokens=SCORE_TOKENS):
            with torch.inference_mode():
                states_NX = self._model.predicting(batch.to(self._model.device))
            values = states_NX.float().cpu().numpy()
            out.extend(_spread(values, batch, [trajectories[m] for m in members]))
        return out

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: the scalar head before each trained token; NaN elsewhere."""
        return self._read(trajectories, Stat.VALUE)

    def scores(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """[T] per trajectory: the scalar head after each trained token; NaN elsewhere."""
        return self._read(trajectories, Stat.SCORE)

    @in_memory(Doing.SCORING)
    def _read(self, trajectories: Sequence[Trajectory], stat: Stat) -> list[FloatArray]:
        scalar = self._scalar
        if scalar is None:
            raise LegalityError(
                f"{self._producer.name} has no scalar head, and its {stat} is asked for",
                expected="a reward model, or a learner whose stage has a scalar_head",
                fix="train one (bradley_terry, orm, prm, …), or name the folder of a classifier "
                "with one or two labels",
            )
        out: list[FloatArray] = []
        for batch, members in pack_trajectories(
            trajectories, max_tokens=SCORE_TOKENS, whole=stat is Stat.SCORE
        ):
            with torch.inference_mode():
                on_device = batch.to(scalar.trunk.device)
                hidden = scalar.trunk.packed(on_device)
                values = scalar.stats(hidden, on_device, frozenset({stat}))[stat]
            out.extend(_spread(values.cpu().numpy(), batch, [trajectories[m] for m in members]))
        return out

    def _check_speaks(self) -> None:
        """Raise a ModelError when the output head is untrained."""
        if not self._model.speaks:
            raise ModelError(
                f"{self._model.name} is a classifier: its output head was never trained",
                expected="a causal language model",
                fix="use it as a reward model only",
            )

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


def frozen(model: Model) -> LocalPolicy:
    """A policy whose weights never change: a reference model, a teacher, a policy to measure."""
    model.causal.requires_grad_(False)
    scalar = Scalar.load(model, model.folder)
    if scalar is not None:
        for _, weight in scalar.parameters:
            weight.requires_grad_(False)
    return LocalPolicy(model, scalar=scalar)
