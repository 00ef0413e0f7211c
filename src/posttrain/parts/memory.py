"""What a frozen policy said of a trajectory, remembered: a data set comes round every epoch.

    trajectories ──seen before?──▶ log-probs          no forward pass
                 ──else──────────▶ policy.logprobs ──▶ remembered, the oldest forgotten

The memory is part of a stage's checkpoint. Log-probs computed beside other trajectories differ in
their last bits, so a resumed run that asked again would not go on bit for bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np

from posttrain.core import clock
from posttrain.core.provenance import FloatArray
from posttrain.core.trajectory import Trajectory
from posttrain.protocols import Policy

LIMIT_BYTES = 2**26
"""Most log-probs kept (64 MiB: 16 million tokens)."""

KEY_BYTES = 16
FILE = "logprobs.npz"


@final
class Memory:
    """Log-probs by policy and trajectory, within a limit.

    Args:
        limit_bytes: what all values together may take. What was not asked for longest goes first.
    """

    def __init__(self, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._values: OrderedDict[bytes, FloatArray] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """What the values take now."""
        return self._bytes

    def logprobs(self, policy: Policy, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """``policy.logprobs``, asked only for what is not known yet.

        A policy without a digest of its weights, or whose weights move, is always asked. Metrics
        count what was known as ``logprobs_remembered``.
        """
        author = policy.producer.digest
        if author is None or policy.version is not None:
            return policy.logprobs(trajectories)
        keys = [_key(author, t) for t in trajectories]
        known = {k: self._values[k] for k in keys if k in self._values}
        missing = {k: t for k, t in zip(keys, trajectories, strict=True) if k not in known}
        clock.count("logprobs_remembered", len(keys) - len(missing))
        if missing:
            fresh = policy.logprobs(list(missing.values()))
            known |= dict(zip(missing, fresh, strict=True))
        for key in dict.fromkeys(keys):
            self._remember(key, known[key])
        return [known[k] for k in keys]

    def _remember(self, key: bytes, values: FloatArray) -> None:
        if key in self._values:
            self._values.move_to_end(key)
            return
        self._values[key] = values
        self._bytes += values.nbytes
        while self._bytes > self._limit:
            _, forgotten = self._values.popitem(last=False)
            self._bytes -= forgotten.nbytes

    def save(self, folder: Path) -> None:
        """Everything known, in the order in which it would be forgotten, as ``logprobs.npz``."""
        values = list(self._values.values())
        with (folder / FILE).open("wb") as file:
            np.savez(
                file,
                keys=np.frombuffer(b"".join(self._values), np.uint8).reshape(-1, KEY_BYTES),
                lengths=np.array([len(v) for v in values], np.int64),
                values=np.concatenate([np.zeros(0, np.float32), *values], dtype=np.float32),
            )

    def load(self, folder: Path) -> None:
        """Take over :meth:`save`; a folder without the file knows nothing."""
        self._values.clear()
        self._bytes = 0
        if not (folder / FILE).is_file():
            return
        with np.load(folder / FILE) as file:
            keys, lengths, values = file["keys"], file["lengths"], file["values"]
        parts = np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
        for key, part in zip(keys, parts, strict=True):
            self._remember(key.tobytes(), part)


def _key(author: str, trajectory: Trajectory) -> bytes:
    """What the log-probs depend on: whose they are, the tokens, and which of them are asked for."""
    content = hashlib.blake2b(author.encode(), digest_size=KEY_BYTES)
    content.update(np.ascontiguousarray(trajectory.tokens, np.int32).tobytes())
    content.update(np.packbits(trajectory.trainable).tobytes())
    return content.digest()
