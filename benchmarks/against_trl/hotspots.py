"""Where our own step spends its processor time, by operator: ``python -m against_trl --hotspots``.

``python -m against_trl.hotspots JOB.json`` prints a Markdown table of one step after a warm-up.
Operators are those of torch, with the share of the step's time that each took by itself. Profiling
slows small operators down, so their shares are upper bounds.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from against_trl.ours import train
from against_trl.plan import Job
from against_trl.worker import Stopped

SHOWN = 14


@dataclass(slots=True, eq=False)
class Profiler:
    """Two steps to warm up, the second of them timed; then one step under torch's profiler."""

    profile: torch.profiler.profile
    done: int = 0
    started: float = 0.0
    plain: float = 0.0
    profiled: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def open(self) -> None:
        self.started = time.process_time()

    def step_done(self, parts: Mapping[str, float]) -> None:
        spent = time.process_time() - self.started
        self.done += 1
        if self.done == 2:
            self.plain, self.parts = spent, parts
            self.profile.start()
        if self.done == 3:
            self.profiled = spent
            self.profile.stop()
            raise Stopped
        self.started = time.process_time()


def table(job: Job) -> str:
    """The operators of one step, most expensive first."""
    torch.set_num_threads(job.threads)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    watch = Profiler(profile)
    with contextlib.suppress(Stopped):
        train(job, watch)
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    inside = sum(e.self_cpu_time_total for e in events) / 1e6
    whole = max(watch.profiled, inside)
    words = ", ".join(f"{n} {v:.2f}" for n, v in watch.parts.items() if n != "tokens")
    return "\n".join(
        [
            f"{job.work}: {watch.plain:.2f} processor seconds ({words})",
            "",
            "| operator | calls | share |",
            "|---|---|---|",
            *(
                f"| {e.key} | {e.count} | {e.self_cpu_time_total / 1e6 / whole:.0%} |"
                for e in events[:SHOWN]
            ),
            f"| outside torch | | {1 - inside / whole:.0%} |",
        ]
    )


def main() -> None:
    """Command line."""
    print(table(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)))


if __name__ == "__main__":
    main()
