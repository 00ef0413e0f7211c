"""``learner.pt``: what a learner must remember to go on bit for bit, checked before it is used.

A checkpoint is read whole and compared with the learner that it is for. Only then is anything
copied: a refused one leaves the learner as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.core.errors import RunError
from posttrain.core.guard import reading, regular_file

FILE = "learner.pt"
_KINDS = {"weights": dict, "optimizer": dict, "version": int, "moving": dict, "state": dict}
_LATER: Mapping[str, Any] = {"moving": {}, "state": {}}
"""Entries that the first versions did not write, and what they mean then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A learner's state between two updates."""

    weights: Mapping[str, Tensor]  # float32, by name
    optimizer: Mapping[str, Any]  # as torch.optim has it
    version: int  # optimiser steps
    moving: Mapping[str, Tensor]  # of the moving reference, float32, by name; empty without one
    state: Mapping[str, float]  # the objective's

    def save(self, folder: Path) -> None:
        """Write :data:`FILE`."""
        content = {
            "weights": dict(self.weights),
            "optimizer": dict(self.optimizer),
            "version": self.version,
            "moving": dict(self.moving),
            "state": dict(self.state),
        }
        torch.save(content, folder / FILE)


def read_checkpoint(
    folder: Path, *, like: Checkpoint, groups: Sequence[Sequence[Tensor]]
) -> Checkpoint:
    """Read :data:`FILE` of a checkpoint.

    Args:
        folder: the checkpoint.
        like: the state of the learner that it is for.
        groups: the learner's parameters, per group of its optimiser.

    Raises:
        RunError: the file is missing, damaged, or belongs to another learner.
    """
    path = folder / FILE
    if not path.exists():
        raise _unusable(path, "it is missing")
    try:
        regular_file(path, error=RunError)
        with reading(path, kind="a checkpoint", error=RunError):
            content = torch.load(path, weights_only=True, map_location="cpu")
    except RunError as error:
        # The library's own words advise to switch off the protection against hostile pickles.
        cause = type(error.__cause__ or error).__name__
        raise _unusable(path, f"it is damaged ({cause})") from None
    if not isinstance(content, dict):
        raise _unusable(path, f"it holds a {type(content).__name__}")
    content = {**_LATER, **content}
    wrong = [n for n, kind in _KINDS.items() if type(content.get(n)) is not kind]
    if wrong:
        raise _unusable(path, f"it has no {', '.join(wrong)}: another program or version wrote it")
    found = Checkpoint(
        weights=content["weights"],
        optimizer=content["optimizer"],
        version=content["version"],
        moving=content["moving"],
        state=content["state"],
    )
    for what in (
        _difference(found.weights, like.weights, of="weights"),
        _difference(found.moving, like.moving, of="weights of a moving reference"),
        *_optimizer_faults(found.optimizer, groups),
    ):
        if what is not None:
            raise _unusable(path, f"it belongs to another learner: {what}")
    return found


def _unusable(path: Path, why: str) -> RunError:
    return RunError(
        f"{path} cannot be resumed from: {why}",
        expected="the file that the last commit of this very stage wrote",
        fix="put the file back from a copy, or choose another --out: the stage starts again there",
    )


def _difference(
    found: Mapping[str, object], expected: Mapping[str, Tensor], *, of: str
) -> str | None:
    """The first difference in names or shapes, in words."""
    if found.keys() != expected.keys():
        odd = sorted(map(str, found.keys() ^ expected.keys()))[0]
        return f"{len(found)} {of}, and the learner has {len(expected)}; {odd} is in one only"
    for name, tensor in expected.items():
        value = found[name]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            return f"{name} is {shape}, and the learner's is {list(tensor.shape)}"
    return None


def _optimizer_faults(
    found: Mapping[str, Any], groups: Sequence[Sequence[Tensor]]
) -> Iterator[str]:
    """What in an optimiser's state does not fit the parameters."""
    held, states = found.get("param_groups"), found.get("state")
    if not isinstance(held, list) or not isinstance(states, dict):
        yield "it has no state of an optimiser"
        return
    numbers = [g.get("params") if isinstance(g, dict) else None for g in held]
    parameters = [p for group in groups for p in group]
    if [n if n is None else len(n) for n in numbers] != [len(group) for group in groups]:
        yield "its optimiser has other groups of parameters"
    elif any(type(i) is not int or not 0 <= i < len(parameters) for i in states):
        yield "its optimiser has a state without a parameter"
    else:
        for i, state in states.items():
            tensors = state.values() if isinstance(state, dict) else [None]
            fits = (isinstance(t, Tensor) and t.shape in ((), parameters[i].shape) for t in tensors)
            if not all(fits):
                yield f"the optimiser's state of parameter {i} has another shape"
                return
