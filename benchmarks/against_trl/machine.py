"""The machine: what it is, how busy others keep it, and how fast it multiplies matrices.

``python -m against_trl.machine SIZE THREADS [DEVICE DTYPE]`` prints the rate for a model's shapes
as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from against_trl.plan import SIZES, Device, Dims, Dtype
from against_trl.results import Conditions, Machine
from against_trl.worker import finished

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "numpy")
ROWS = 2048
"""Rows of the left matrix when the rate is measured: about a micro-batch of training."""
REPEATS = 7


def describe(threads: int, device: Device = "cpu") -> Machine:
    """This machine and these libraries."""
    return Machine(
        processor=_processor() if device == "cpu" else f"{_gpu()}; {_processor()}",
        cores=psutil.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        threads=threads,
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions={name: version(name) for name in LIBRARIES},
    )


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def _processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    about = psutil.cpu_freq()
    clock = f", {about.current / 1000:.1f} GHz" if about else ""
    return (names[0] if names else platform.machine()) + clock


@dataclass(slots=True, eq=False)
class Watch:
    """Watches what others do with the processor while an entry is measured."""

    workers: Sequence[psutil.Process]
    wall: float = field(init=False)
    busy: float = field(init=False)
    own: float = field(init=False)
    loads: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wall, self.busy, self.own = time.monotonic(), _busy(), self._own()

    def _own(self) -> float:
        times = [p.cpu_times() for p in (psutil.Process(), *self.workers)]
        return sum(t.user + t.system for t in times)

    def look(self) -> None:
        """Note the load average."""
        self.loads.append(os.getloadavg()[0])

    def conditions(self) -> Conditions:
        """How it was since the watch began. The workers must still be there."""
        self.look()
        wall = time.monotonic() - self.wall
        others = (_busy() - self.busy) - (self._own() - self.own)
        return Conditions(
            when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            commit=_commit(),
            load=max(self.loads),
            others=max(others, 0.0) / (wall * (psutil.cpu_count() or 1)),
        )


def _busy() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def shapes(dims: Dims) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how often) of every matrix that a token meets."""
    queries, keys = dims.heads * dims.head_size, dims.kv_heads * dims.head_size
    layers = dims.layers
    return [
        (dims.hidden, queries, layers),
        (dims.hidden, keys, 2 * layers),
        (queries, dims.hidden, layers),
        (dims.hidden, dims.inner, 2 * layers),
        (dims.inner, dims.hidden, layers),
        (dims.hidden, dims.vocab, 1),
    ]


def multipliers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Ways to x wᵀ in float32 that this torch has, whichever of them it would take."""
    import torch

    from posttrain.numerics.matmul import has_both, onednn

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": torch.nn.functional.linear}
    return ways | {"oneDNN": onednn} if has_both() else ways


def measure_rate(
    dims: Dims, threads: int, device: Device = "cpu", dtype: Dtype = "float32"
) -> tuple[float, float]:
    """Operations per second: over all of a model's shapes, and for the best of them.

    Each product is timed several times by every library in torch that has it, and the fastest time
    counts: a limit is what the machine can do, not what it did while something else ran.
    """
    import torch

    torch.set_num_threads(threads)
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    exact = device == "cpu" and dtype == "float32"
    libraries = multipliers() if exact else {"torch": torch.nn.functional.linear}
    operations = seconds = best = 0.0
    for inputs, outputs, often in shapes(dims):
        x, w = torch.randn(ROWS, inputs, **kind), torch.randn(outputs, inputs, **kind)
        once = 2 * ROWS * inputs * outputs
        calls = max(int(2e9 // once), 1)
        fastest = float("inf")
        for multiply in [*libraries.values()] * REPEATS:
            finished(device)
            started = time.perf_counter()
            for _ in range(calls):
                multiply(x, w)
            finished(device)
            fastest = min(fastest, (time.perf_counter() - started) / calls)
        operations += often * once
        seconds += often * fastest
        best = max(best, once / fastest)
    return operations / seconds, best


if __name__ == "__main__":
    size, threads, *kind = sys.argv[1:]
    print(json.dumps(measure_rate(SIZES[size], int(threads), *kind)))  # type: ignore[arg-type]
