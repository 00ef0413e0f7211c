"""What the proofs of a run cost: in seconds at a size, and as a share of the tour.

    python benchmarks/proofs_cost.py --size 40M   # load, sampler, export; all weights and LoRA
    python benchmarks/proofs_cost.py --tour               # the share of the tour
    python benchmarks/proofs_cost.py --size 40M --tour --write   # and into docs/lab-log.md

A proof measures its own wall time, so that other work on the machine enters: run it alone. A
rehearsal counts in full, though the tour's process is warmer after it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lab_log import processor, write
from sampler_profile import SIZES, save_random

from posttrain import api
from posttrain.core.events import Event, Proved
from posttrain.core.learner import Lora, Optimizer
from posttrain.lab.tour import write_tour
from posttrain.measure.spec import Measure
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Sft
from posttrain.recipe import Budget, Recipe, Stage, load_recipe

ROWS = '{"prompt": "say a", "completion": "a b c"}\n{"prompt": "say b", "completion": "b c d"}\n'


@dataclass(slots=True)
class Costs:
    """Seconds by what was proved."""

    seconds: Counter[str] = field(default_factory=Counter)

    def observe(self, event: Event) -> None:
        """Add up proofs."""
        if isinstance(event, Proved):
            self.seconds[str(event.proof.subject)] += event.proof.seconds

    @property
    def words(self) -> str:
        """Every kind with its seconds, the dearest first."""
        return ", ".join(f"{kind} {spent:.2f}" for kind, spent in self.seconds.most_common())


def of_size(size: str, folder: Path, *, lora: Lora | None) -> Costs:
    """The proofs of one SFT stage of two steps on a random model."""
    save_random(SIZES[size], folder / "model")
    (folder / "rows.jsonl").write_text(ROWS)
    stage = Stage(
        name="sft",
        method=Sft(data=Dataset(path="rows.jsonl")),
        budget=Budget(steps=2),
        groups_per_step=2,
        optimizer=Optimizer(lr=1e-4),
        lora=lora,
    )
    recipe = Recipe(
        name="cost", model="model", stages=(stage,), measure=Measure(samples=2), threads=1
    )
    costs = Costs()
    api.run(recipe, out=folder / "out", root=folder, observe=costs.observe)
    return costs


def of_tour(folder: Path) -> tuple[Costs, float]:
    """The proofs of the tour, and the seconds of the whole."""
    path = write_tour(folder)
    costs, began = Costs(), time.monotonic()
    api.run(load_recipe(path), out=folder / "out", root=path.parent, observe=costs.observe)
    return costs, time.monotonic() - began


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, help="of a random model")
    parser.add_argument("--tour", action="store_true")
    parser.add_argument("--write", action="store_true", help="put it into docs/lab-log.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"* Processor: {processor()}, one thread."]
    for lora in (None, Lora(rank=8)) if args.size else ():
        with tempfile.TemporaryDirectory() as folder:
            costs = of_size(args.size, Path(folder), lora=lora)
        kind = "LoRA" if lora else "all weights"
        lines.append(
            f"* An SFT stage at {args.size}, {kind}: {sum(costs.seconds.values()):.2f} s "
            f"({costs.words})."
        )
    if args.tour:
        with tempfile.TemporaryDirectory() as folder:
            costs, whole = of_tour(Path(folder))
        spent = sum(costs.seconds.values())
        lines.append(
            f"* The tour: {spent:.1f} of {whole:.0f} s, {spent / whole:.1%} ({costs.words})."
        )
    print("\n".join(lines))
    if args.write:
        repeat = "How to repeat it: `python benchmarks/proofs_cost.py --size 40M --tour`."
        write("\n".join(["## What proofs cost", "", *lines, "", repeat, ""]))


if __name__ == "__main__":
    main()
