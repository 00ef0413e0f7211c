"""A scalar head: one number per token from a decoder's hidden states.

    trunk ──hidden [T, X]──▶ w·h (+ b) ──▶ VALUE [N] before each trained token
                                      └──▶ SCORE [N] after it

On disk it is ``scalar_head.safetensors`` beside an ordinary model folder, with the key ``weight``
[1, X] (and ``bias`` [1]), as ``torch.nn.Linear`` names them:

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.score.load_state_dict(load_file(folder / "scalar_head.safetensors"))

Folders of stock sequence and token classifiers are read too. Of two labels the head is the
difference of their rows: its logit is the log-odds of label 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from posttrain.core.errors import LegalityError, ModelError
from posttrain.core.proofs import Proof, Subject
from posttrain.core.statistics import Stat, Wanted
from posttrain.engines.local.model import Model
from posttrain.numerics.batch import PackedBatch

FILE = "scalar_head.safetensors"
CRITIC = "critic"
"""Folder of a separate trunk, inside of the policy's model folder."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """A scalar head on a trunk. The head is float32 for every dtype of the trunk."""

    trunk: Model
    weight: nn.Parameter  # [1, X]
    bias: nn.Parameter | None  # [1]; only where a stock classifier came with one

    @classmethod
    def load(cls, trunk: Model, folder: Path) -> Scalar | None:
        """The head that a folder holds, on ``trunk``; None when it holds none.

        Raises:
            ModelError: it has more than two labels, or another width than the trunk.
        """
        found = _read(folder)
        if found is None:
            return None
        weight, bias = found
        width = _width(trunk)
        if weight.shape != (1, width):
            raise ModelError(
                f"{folder}: a scalar head of shape {list(weight.shape)}, on {trunk.name}",
                expected=f"[1, {width}]",
                fix="start the head from a model of the same size",
            )
        return cls(
            trunk, _parameter(weight, trunk), None if bias is None else _parameter(bias, trunk)
        )

    @classmethod
    def zero(cls, trunk: Model) -> Scalar:
        """A head that gives 0 for every hidden state."""
        return cls(trunk, _parameter(torch.zeros(1, _width(trunk)), trunk), None)

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The head's own weights by name, without the trunk's."""
        named = [("scalar_head.weight", self.weight), ("scalar_head.bias", self.bias)]
        return [(name, p) for name, p in named if p is not None]

    def read(self, hidden_NX: Tensor) -> Tensor:
        """[N] the head's number for each hidden state."""
        out_N1 = nn.functional.linear(hidden_NX.float(), self.weight, self.bias)
        return out_N1[:, 0]

    def stats(
        self, hidden_TX: Tensor, batch: PackedBatch, wanted: frozenset[Stat]
    ) -> Mapping[Wanted, Tensor]:
        """The wanted statistics [N] of a packed batch.

        Raises:
            LegalityError: scores of a batch whose last tokens were not computed.
        """
        if Stat.SCORE in wanted and bool((batch.after_N < 0).any()):
            raise LegalityError(
                "a score after a token that was not computed", fix="pack with whole=True"
            )
        places = {Stat.VALUE: batch.predict_N, Stat.SCORE: batch.after_N}
        return {stat: self.read(hidden_TX[places[stat]]) for stat in sorted(wanted)}

    def export(self, folder: Path) -> Proof:
        """Write :data:`FILE` into a model folder, and read it again.

        Raises:
            ModelError: what is read is not what was written.
        """
        began = time.perf_counter()
        named = {name.partition(".")[2]: p for name, p in self.parameters}
        held = {name: p.detach().cpu().contiguous() for name, p in named.items()}
        save_file(held, folder / FILE)
        again = _read(folder)
        parts = {} if again is None else dict(zip(("weight", "bias"), again, strict=True))
        for name, values in held.items():
            read = parts.get(name)
            if read is None or not torch.equal(read, values):
                raise ModelError(
                    f"{folder / FILE}: the head's {name} is not the one that was trained",
                    expected="the very numbers that were written",
                    fix="run again: the same run exports again from its last checkpoint",
                )
        return Proof(
            subject=Subject.EXPORT,
            of=folder.name,
            words="the scalar head reads back bit for bit",
            seconds=time.perf_counter() - began,
        )


def _width(trunk: Model) -> int:
    return int(trunk.causal.config.get_text_config().hidden_size)


def _parameter(values: Tensor, trunk: Model) -> nn.Parameter:
    return nn.Parameter(values.float().to(trunk.device))


def _read(folder: Path) -> tuple[Tensor, Tensor | None] | None:
    """Weight [1, X] and bias [1] of our file, else of a stock classifier."""
    if (folder / FILE).is_file():
        with safe_open(folder / FILE, framework="pt") as file:
            return file.get_tensor("weight"), _optional(file, "bias")
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if "score.weight" in file.keys():  # noqa: SIM118  # no mapping
                weight, bias = file.get_tensor("score.weight"), _optional(file, "score.bias")
                return _one_row(weight, folder), None if bias is None else _one_row(bias, folder)
    return None


def _optional(file: safe_open, name: str) -> Tensor | None:
    return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118


def _one_row(rows: Tensor, folder: Path) -> Tensor:
    """One row as it is; for two rows their difference, which is the log-odds of label 1."""
    if rows.shape[0] > 2:
        raise ModelError(
            f"{folder}: a classifier of {rows.shape[0]} labels",
            expected="one number, or two labels (bad and good, in this order)",
        )
    return rows if rows.shape[0] == 1 else rows[1:] - rows[:1]
