"""``python -m against_trl``: measure, and write the page. ``make bench`` runs it.

On a GPU, which nobody has tried yet, with shapes of real models and random weights:

    make bench BENCH="--device cuda --dtype bfloat16 --sizes qwen3-0.6b qwen3-1.7b --sections pairs"
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from against_trl.flops import generated, step
from against_trl.machine import ROOT, describe
from against_trl.page import page, summary
from against_trl.pairs import environment, run_in_turn, run_pairs
from against_trl.plan import (
    LOADS,
    ON_CPU,
    QUICK,
    SIZES,
    THEIRS,
    WORKS,
    Dims,
    Job,
    Load,
    Ours,
    Side,
    Theirs,
    Work,
)
from against_trl.results import Conditions, Exact, Point, Rate, Results, load_results, save_results
from posttrain.core.clock import GROUPS

SECTIONS = ("pairs", "exact", "scaling")
SERIES: dict[str, tuple[str, tuple[int, ...]]] = {
    "group size": ("group_size", (4, 8, 16, 32, 64)),
    "prompt": ("prompt_tokens", (32, 128, 512, 1024)),
    "completion": ("completion_tokens", (32, 64, 128, 256, 512)),
}
VOCABULARY = (1024, 4096, 16384, 65536)
POINT_STEPS = 3
CANDIDATES: dict[Work, list[Theirs]] = {
    "sft": [Theirs(rows=r, block=b) for b in (512, 1024, 2048) for r in (1, 2)],
    "dpo": [Theirs(rows=r) for r in (4, 8, 16)],
    "grpo": [
        *(Theirs(rows=r) for r in (4, 8, 16, 64)),
        Theirs(rows=8, cache="static"),
        Theirs(rows=8, continuous=True),
    ],
    "opd": [*(Theirs(rows=r) for r in (4, 8, 16, 64)), Theirs(rows=8, cache="static")],
    "opd_distinct": [Theirs(rows=r) for r in (8, 16)],
}


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="against_trl", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(ON_CPU))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--scaling-size", choices=SIZES, default="7m")
    parser.add_argument("--scaling-prompts", type=int, default=2)
    parser.add_argument("--micro", type=int, help="our micro_batch_tokens; default: the stage's")
    parser.add_argument("--quick", action="store_true", help="small loads, 1m, two pairs, own page")
    parser.add_argument("--tune", action="store_true", help="time TRL's settings; no page")
    parser.add_argument("--hotspots", action="store_true", help="profile our side; no page")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--page", type=Path, help="default: benchmarks/results.md, or beside --out")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    chosen = parser.parse_args(arguments)
    usual = (chosen.device, chosen.dtype) == ("cpu", "float32") and not chosen.quick
    if (chosen.device, chosen.dtype) != ("cpu", "float32"):
        chosen.out = chosen.out / f"{chosen.device}-{chosen.dtype}"
    if chosen.quick:
        chosen.sizes, chosen.pairs, chosen.scaling_size = ["1m"], 2, "1m"
        chosen.out = chosen.out / "quick"
    chosen.page = chosen.page or (Path("benchmarks") if usual else chosen.out) / "results.md"
    chosen.loads = QUICK if chosen.quick else LOADS
    return chosen


class Bench:
    """One session: every entry is saved, and the page written again, as soon as it is there."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen, self._file = chosen, chosen.out / "results.json"
        if chosen.fresh:
            self._file.unlink(missing_ok=True)
        self._results = load_results(self._file, machine=describe(chosen.threads, chosen.device))

    @property
    def results(self) -> Results:
        """What there is so far."""
        return self._results

    def keep(self) -> None:
        """Save, and write the page."""
        save_results(self._file, self._results)
        self._chosen.page.parent.mkdir(parents=True, exist_ok=True)
        self._chosen.page.write_text(page(self._results), encoding="utf-8")

    def pairs(self) -> None:
        """Both sides in turn, for every work and size; then the rate of the machine."""
        chosen = self._chosen
        for size in chosen.sizes:
            for work in chosen.only:
                load = chosen.loads[work]
                folder = self._material(SIZES[size], work, load, steps=chosen.pairs + 2)
                jobs = tuple(self._job(side, work, folder, load) for side in ("ours", "trl"))
                entry = run_pairs(jobs, dims=SIZES[size], count=chosen.pairs, folder=folder)
                self._results.pairs[f"{work}/{size}"] = entry
                _tell(summary(entry))
                self._rate(size, entry.conditions)
                self.keep()

    def _rate(self, size: str, conditions: Conditions) -> None:
        """The highest rate seen in this session: what it is divided by should not flatter us."""
        command = [sys.executable, "-m", "against_trl.machine", size, str(self._chosen.threads)]
        command += [self._chosen.device, self._chosen.dtype]
        rate, best = json.loads(_last(_output(command, threads=self._chosen.threads)))
        known = self._results.rates.get(size)
        if known is None or rate > known.per_second:
            self._results.rates[size] = Rate(
                size=size, per_second=rate, best_shape=best, conditions=conditions
            )

    def exact(self) -> None:
        """Loss and gradients of both sides on one small batch."""
        for size in self._chosen.sizes:
            for work in self._chosen.only:
                if work == "opd_distinct":
                    continue
                load = QUICK[work]
                folder = self._material(SIZES[size], work, load, steps=1, name="exact")
                job = replace(
                    self._job("ours", work, folder, load),
                    theirs=replace(THEIRS[work], rows=1),
                    max_grad_norm=1e9,
                )
                file = folder / "exact.json"
                file.write_bytes(msgspec.json.encode(job))
                command = [sys.executable, "-m", "against_trl.equivalence", str(file)]
                for case in json.loads(_last(_output(command, threads=job.threads))):
                    found = Exact(size=size, **case)
                    self._results.exact[f"{found.case}/{size}"] = found
                    _tell(
                        f"{found.case} {size}: loss gap {found.loss_gap:.1e}, "
                        f"gradient gap {found.gradient_gap:.1e}"
                    )
                self.keep()

    def scaling(self) -> None:
        """Our GRPO step alone, one number changed at a time."""
        for series, value, dims, load in self._series():
            folder = self._material(dims, "grpo", load, steps=1, name=f"{dims.vocab}")
            job = self._job("ours", "grpo", folder, load)
            (measured,), conditions = run_in_turn([job], count=POINT_STEPS, folder=folder)
            self._results.points[f"{series}/{value}"] = Point(
                series=series,
                value=value,
                size=self._chosen.scaling_size,
                load=load,
                seconds=measured.seconds,
                cpu=measured.cpu,
                draw=[
                    sum(measured.parts.get(n, [0.0] * POINT_STEPS)[i] for n in GROUPS["sampling"])
                    for i in range(POINT_STEPS)
                ],
                operations=step("grpo", dims, generated(load)),
                conditions=conditions,
            )
            _tell(f"{series} {value}: {min(measured.seconds):.2f} s")
            self.keep()

    def _series(self) -> Iterator[tuple[str, int, Dims, Load]]:
        dims = SIZES[self._chosen.scaling_size]
        base = Load(groups=self._chosen.scaling_prompts, group_size=8)
        for series, (field, values) in SERIES.items():
            for value in values[: 2 if self._chosen.quick else None]:
                yield series, value, dims, replace(base, **{field: value})
        for value in VOCABULARY[: 2 if self._chosen.quick else None]:
            yield "vocabulary", value, replace(dims, vocab=value), base
        long = replace(base, prompt_tokens=512, completion_tokens=32)
        for value in (8, 32):
            name = "group size, prompt 512, completion 32"
            yield name, value, dims, replace(long, group_size=value)

    def tune(self) -> None:
        """Time TRL alone with every candidate setting."""
        for size in self._chosen.sizes:
            for work in self._chosen.only:
                load = self._chosen.loads[work]
                folder = self._material(SIZES[size], work, load, steps=4)
                for setting in CANDIDATES[work]:
                    job = replace(self._job("trl", work, folder, load), theirs=setting)
                    try:
                        (done,), _ = run_in_turn([job], count=2, folder=folder)
                    except RuntimeError as error:
                        _tell(f"{work} {size} {setting}: {error}")
                        continue
                    _tell(
                        f"{work} {size} {setting}: {min(done.costs):.4g} s, processor "
                        f"{min(done.cpu_costs):.4g} s, peak {done.peak / 2**20:.0f} MiB"
                    )

    def hotspots(self) -> None:
        """Our side alone, under torch's profiler."""
        for size in self._chosen.sizes:
            for work in self._chosen.only:
                load = self._chosen.loads[work]
                folder = self._material(SIZES[size], work, load, steps=4)
                file = folder / "hotspots.json"
                file.write_bytes(msgspec.json.encode(self._job("ours", work, folder, load)))
                command = [sys.executable, "-m", "against_trl.hotspots", str(file)]
                print(f"## {size}\n\n{_output(command, threads=self._chosen.threads)}\n")

    def _material(
        self, dims: Dims, work: Work, load: Load, *, steps: int, name: str = "pairs"
    ) -> Path:
        from against_trl.material import make

        size = f"{load.groups}x{load.group_size}-{load.prompt_tokens}-{load.completion_tokens}"
        folder = self._chosen.out / "material" / dims.name / f"{name}-{work}-{size}"
        return make(folder.resolve(), dims, load, steps=steps)

    def _job(self, side: Side, work: Work, folder: Path, load: Load) -> Job:
        rows = load.groups * (1 if work in ("sft", "dpo") else load.group_size)
        setting = THEIRS[work]
        fitting = setting if work == "sft" else replace(setting, rows=min(setting.rows, rows))
        return Job(
            side=side,
            work=work,
            folder=str(folder),
            load=load,
            threads=self._chosen.threads,
            device=self._chosen.device,
            dtype=self._chosen.dtype,
            theirs=fitting,
            ours=Ours(micro_batch_tokens=self._chosen.micro),
        )


def _output(command: list[str], *, threads: int) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(threads), check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def _last(text: str) -> str:
    """The last line: libraries may print before it."""
    return text.splitlines()[-1]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    os.chdir(ROOT)
    chosen = options(arguments)
    bench = Bench(chosen)
    if chosen.tune:
        bench.tune()
        return
    if chosen.hotspots:
        bench.hotspots()
        return
    for section in SECTIONS:
        if section in chosen.sections:
            {"pairs": bench.pairs, "exact": bench.exact, "scaling": bench.scaling}[section]()
    bench.keep()
    print(page(bench.results), end="")


if __name__ == "__main__":
    main()
