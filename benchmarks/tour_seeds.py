"""Run the tour with several seeds and print its effect sizes as a Markdown table.

    python benchmarks/tour_seeds.py --seeds 0 1 2 3 4 --out out/seeds

A seed varies demonstrations, preference pairs, rollouts and data order; the base and the measured
prompts are the same for all. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from posttrain.api import run
from posttrain.cli.console import Console
from posttrain.lab.tour import write_tour
from posttrain.measure.attribution import ChangeKind, attribute_changes
from posttrain.measure.bootstrap import student_quantile
from posttrain.measure.measurement import Measurement
from posttrain.recipe import load_recipe
from posttrain.run.folder import RunFolder


def measured(out: Path) -> list[Measurement]:
    """Measurements of a finished run, base first."""
    folder = RunFolder(out)
    return [folder.measurement(n) for n in ("base", *(s.name for s in folder.recipe().stages))]


def over_seeds(values: list[float]) -> str:
    """Mean and 95 % Student interval over seeds."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = student_quantile(0.975, degrees=len(values) - 1) * np.std(values, ddof=1)
    half /= np.sqrt(len(values))
    return f"{mean:.2f} ± {half:.2f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/seeds"))
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        out = arguments.out / str(seed)
        path = write_tour(out, seed=seed)
        with Console() as console:
            run(load_recipe(path), out=out, root=path.parent, observe=console.observe)
        runs.append(measured(out))

    tasks = [t.taskset for t in runs[0][0].tasks]
    print(f"\npass@1, mean ± 95 % interval over {len(runs)} seeds\n")
    print(f"| after | {' | '.join(tasks)} |")
    print(f"|---|{'---|' * len(tasks)}")
    for index, policy in enumerate(m.policy for m in runs[0]):
        rates = [[float(r[index].task(t).successes.mean()) for r in runs] for t in tasks]
        print(f"| {policy} | {' | '.join(over_seeds(r) for r in rates)} |")

    spec = RunFolder(arguments.out / str(arguments.seeds[0])).recipe().measure
    changes = [attribute_changes(r[0], r[-1], epsilon=spec.threshold) for r in runs]
    print("\nbase to final: parts of the change, mean ± 95 % interval over seeds;")
    print("in brackets, in how many seeds the part's own interval over prompts excludes zero\n")
    print(f"| task | {' | '.join(ChangeKind)} |")
    print(f"|---|{'---|' * len(ChangeKind)}")
    for task in tasks:
        cells = []
        for part in ChangeKind:
            intervals = [c.task(task).parts[part] for c in changes]
            shown = sum(i.is_positive for i in intervals)
            cells.append(f"{over_seeds([i.value for i in intervals])} ({shown}/{len(intervals)})")
        print(f"| {task} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
