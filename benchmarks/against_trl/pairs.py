"""Two worker processes stepping in turn, seen from the process that tells them to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec
import psutil

from against_trl.flops import step, trees_of, units
from against_trl.machine import ROOT, Watch
from against_trl.plan import Dims, Job
from against_trl.results import Conditions, Measured, Pairs

WARM_UP = 1


class WorkerError(RuntimeError):
    """A worker died. The message names its log."""


@dataclass(slots=True, eq=False)
class Worker:
    """One side's process. Its first steps are warm-up."""

    job: Job
    process: subprocess.Popen[str]
    log: Path
    imported: int = 0
    ready: int = 0
    steps: list[dict[str, object]] = field(default_factory=list)

    @classmethod
    def start(cls, job: Job, *, folder: Path) -> Worker:
        """Start the process, and wait until everything is built."""
        name = f"{job.work}-{job.side}"
        file, log = folder / f"{name}.json", folder / f"{name}.log"
        file.write_bytes(msgspec.json.encode(job))
        command = [sys.executable, "-m", "against_trl.worker", str(file)]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(job.threads),
            )
        worker = cls(job, process, log)
        worker.imported = int(worker._hear()["imported"])  # type: ignore[call-overload]
        worker.ready = int(worker._hear()["ready"])  # type: ignore[call-overload]
        return worker

    def step(self) -> None:
        """Have it take one step, and wait for the end of it."""
        self._tell("step")
        self.steps.append(self._hear())

    def stop(self) -> Measured:
        """End it; returns what its steps took."""
        self._tell("stop")
        peak = int(self._hear()["peak"])  # type: ignore[call-overload]
        self.process.wait(timeout=60)
        kept = self.steps[WARM_UP:]
        timed: list[dict[str, float]] = [s["parts"] for s in kept]  # type: ignore[misc]
        names = dict.fromkeys(name for step in timed for name in step)
        parts = {name: [step.get(name, 0.0) for step in timed] for name in names}
        return Measured(
            seconds=[float(s["seconds"]) for s in kept],  # type: ignore[arg-type]
            cpu=[float(s["cpu"]) for s in kept],  # type: ignore[arg-type]
            units=_units(self.job, parts, len(kept)),
            parts=parts,
            imported=self.imported,
            ready=self.ready,
            peak=peak,
        )

    def kill(self) -> None:
        """End it at once, if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _stream(self, stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def _tell(self, word: str) -> None:
        stream = self._stream(self.process.stdin)
        try:
            stream.write(word + "\n")
            stream.flush()
        except BrokenPipeError:
            raise self._dead() from None

    def _hear(self) -> dict[str, object]:
        line = self._stream(self.process.stdout).readline()
        if not line:
            raise self._dead()
        reply: dict[str, object] = json.loads(line)
        return reply

    def _dead(self) -> WorkerError:
        last = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        return WorkerError(f"worker ended; see {self.log}\n  " + "\n  ".join(last))


def environment(threads: int) -> dict[str, str]:
    """A worker's environment: its threads, our code, and no way to the network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")]),
    }


def _units(job: Job, parts: dict[str, list[float]], count: int) -> list[float]:
    """What each step was worth: tokens for SFT, pairs for DPO, itself for the others."""
    if job.work == "sft":
        return parts["tokens"]
    return [float(job.load.groups if job.work == "dpo" else 1)] * count


def run_pairs(jobs: tuple[Job, Job], *, dims: Dims, count: int, folder: Path) -> Pairs:
    """Step both sides in turn: ours, TRL, ours, TRL …, after a warm-up step of each."""
    measured, conditions = run_in_turn(jobs, count=count, folder=folder)
    ours, theirs = jobs
    trees = trees_of(ours.work, folder, ours.load)
    worth = units(ours.work, trees, ours.load)
    return Pairs(
        work=ours.work,
        size=dims.name,
        operations=step(ours.work, dims, trees) / worth,
        load=ours.load,
        settings=theirs.theirs,
        own=ours.ours,
        ours=measured[0],
        trl=measured[1],
        conditions=conditions,
    )


def run_in_turn(
    jobs: Sequence[Job], *, count: int, folder: Path
) -> tuple[list[Measured], Conditions]:
    """Step any number of workers in turn.

    Raises:
        WorkerError: one of them died.
    """
    workers: list[Worker] = []
    try:
        for job in jobs:
            workers.append(Worker.start(job, folder=folder))
        watch = Watch([psutil.Process(w.process.pid) for w in workers])
        for _ in range(WARM_UP + count):
            for worker in workers:
                worker.step()
            watch.look()
        conditions = watch.conditions()
        return [w.stop() for w in workers], conditions
    finally:
        for worker in workers:
            worker.kill()
