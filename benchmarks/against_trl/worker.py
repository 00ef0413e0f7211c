"""One side of a comparison in a process of its own, stepping when its parent asks.

    parent ── "step" ──▶ child: one optimiser step ──▶ {"seconds": …, "cpu": …, "parts": …}
           ── "stop" ──▶ child: {"peak": …} and exit

The other side's threads and memory are then out of the way, and the high-water mark of the resident
set belongs to one library and one kind of work alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import msgspec

from against_trl.plan import Device, Job, Steps


class Stopped(Exception):
    """The parent asked to stop."""


@dataclass(slots=True, eq=False)
class Gate:
    """Holds a training loop between steps. Time outside the gate is what is measured."""

    replies: TextIO
    commands: TextIO
    device: Device = "cpu"
    started: float = 0.0
    started_cpu: float = 0.0

    def open(self) -> None:
        """Before the first step: say that everything is built, and wait."""
        self._reply(ready=in_use(self.device)[0])
        self._wait()

    def step_done(self, parts: Mapping[str, float]) -> None:
        """After a step: report it, and wait for the next command.

        Args:
            parts: seconds or counts of the step by name.

        Raises:
            Stopped: the parent has seen enough.
        """
        finished(self.device)
        seconds = time.perf_counter() - self.started
        cpu = time.process_time() - self.started_cpu
        self._reply(seconds=seconds, cpu=cpu, parts=dict(parts))
        self._wait()

    def _wait(self) -> None:
        if self.commands.readline().strip() != "step":
            raise Stopped
        self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def _reply(self, **values: object) -> None:
        self.replies.write(json.dumps(values) + "\n")
        self.replies.flush()


def resident() -> tuple[int, int]:
    """Bytes of the resident set of this process: now, and its high-water mark (Linux)."""
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def finished(device: Device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def in_use(device: Device) -> tuple[int, int]:
    """Bytes now and at most: of tensors on the GPU where that is the device, else resident."""
    if device == "cuda":
        import torch

        return int(torch.cuda.memory_allocated()), int(torch.cuda.max_memory_allocated())
    return resident()


def main() -> None:
    """``python -m against_trl.worker JOB.json``: replies on stdout, everything else on stderr."""
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the replies
    gate = Gate(replies, sys.stdin, job.device)
    import torch

    torch.set_num_threads(job.threads)
    train: Callable[[Job, Steps], None]
    if job.side == "ours":
        from against_trl.ours import train
    else:
        from against_trl.theirs import train
    replies.write(json.dumps({"imported": in_use(job.device)[0]}) + "\n")
    with contextlib.suppress(Stopped):
        train(job, gate)
    replies.write(json.dumps({"peak": in_use(job.device)[1]}) + "\n")
    replies.flush()
    os._exit(0)  # nothing here is worth saving, and some libraries tidy up slowly


if __name__ == "__main__":
    main()
