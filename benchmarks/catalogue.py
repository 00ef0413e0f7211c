"""Run every method's situation in the lab with several seeds, and write what each one did.

    python benchmarks/catalogue.py --seeds 0 1 2          # all of them; finished runs are no-ops
    python benchmarks/catalogue.py --only dpo grpo        # some
    python benchmarks/catalogue.py --only                 # none: just write the page again

A situation is an entry of SITUATIONS in a module ``situations/<family>.py``: a function of an
inputs folder and a seed that writes its data there and returns a recipe. The last stage is
the method; *before* is the policy that this stage starts from. A seed varies data, rollouts and
data order; the base and the measured prompts are the same for all. The page shows every finished
run of the results file, also of earlier commands.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import situations
from results_file import RESULTS, ResultsFile

from posttrain.core.config import digest, plain
from posttrain.core.errors import ConfigError, PosttrainError, nearest
from posttrain.core.files import hash_file, hash_folder, write_atomic
from posttrain.measure.bootstrap import student_quantile
from posttrain.parts.registry import known, tag_of
from posttrain.recipe import Recipe
from posttrain.run.folder import RunFolder

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/lab-catalogue.md"

Situation = Callable[[Path, int], Recipe]
Runner = Callable[[Recipe, Path, Path], object]  # recipe, run folder, root of its paths


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What one run did. ``tasks`` holds pass@1 before and after, by task set."""

    family: str
    name: str
    seed: int
    method: str
    start: str
    key: str
    seconds: float = 0.0
    tasks: dict[str, tuple[float, float]] = {}
    failure: str | None = None


# --- what there is ---------------------------------------------------------------------------


def known_situations() -> dict[str, tuple[str, Situation]]:
    """(family, situation) by name, from every module of the folder of situations.

    Raises:
        ConfigError: two families use one name.
    """
    found: dict[str, tuple[str, Situation]] = {}
    for family in sorted(m.name for m in pkgutil.iter_modules(situations.__path__)):
        module = importlib.import_module(f"situations.{family}")
        entries: Mapping[str, Situation] = module.SITUATIONS
        for name, situation in entries.items():
            if name in found:
                raise ConfigError(f"situation {name} in families {found[name][0]} and {family}")
            found[name] = (family, situation)
    return found


def chosen(named: Mapping[str, object], only: Sequence[str] | None) -> list[str]:
    """The names to run: all of them, or those asked for.

    Raises:
        ConfigError: an unknown name.
    """
    for name in only or ():
        if name not in named:
            raise ConfigError(f"no situation {name!r}", fix=nearest(name, named))
    return list(named) if only is None else list(only)


# --- running ---------------------------------------------------------------------------------


def run_here(recipe: Recipe, out: Path, root: Path) -> object:
    """Run a recipe with the local engine, quietly."""
    from posttrain.api import run

    return run(recipe, out=out, root=root)


def results_in(path: Path) -> ResultsFile[Result]:
    """What every run so far has said, by situation and seed."""
    return ResultsFile(path, Result, lambda r: (r.name, r.seed))


def run_one(
    name: str,
    family: str,
    situation: Situation,
    *,
    seed: int,
    folder: Path,
    stored: ResultsFile[Result],
    runner: Runner,
) -> Result:
    """Run one situation with one seed, unless this very run has finished before.

    A run is known by its recipe and the content of its data and base model; another one gets
    another folder. A run that fails with an error of posttrain is a result, and is tried again
    next time.
    """
    inputs = folder / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    recipe = situation(inputs, seed)
    files = {str(p.relative_to(inputs)): hash_file(p) for p in inputs.rglob("*") if p.is_file()}
    base = Path(recipe.model)
    key = digest([plain(recipe), files, hash_folder(base) if base.is_dir() else None])
    before = stored.rows().get((name, seed))
    if before is not None and before.key == key and before.failure is None:
        return before
    last = recipe.stages[-1]
    previous = [s.name for s in recipe.stages[:-1]][-1:] or ["base"]
    start = previous[0] if last.init == "previous" else last.init
    about = Result(
        family=family,
        name=name,
        seed=seed,
        method=tag_of(last.method),
        start=start,
        key=key,
    )
    began = time.perf_counter()
    out = folder / f"run-{key[:8]}"
    try:
        runner(recipe, out, inputs)
        tasks = pass_at_1(out, start, last.name)
        took = time.perf_counter() - began
        result = msgspec.structs.replace(about, tasks=tasks, seconds=round(took, 1))
    except PosttrainError as error:
        result = msgspec.structs.replace(about, failure=str(error).splitlines()[0])
    stored.add(result)
    return result


def pass_at_1(out: Path, before: str, after: str) -> dict[str, tuple[float, float]]:
    """pass@1 of two policies of a run, by task set."""
    first, second = map(RunFolder(out).measurement, (before, after))
    return {
        t.taskset: (float(t.successes.mean()), float(second.task(t.taskset).successes.mean()))
        for t in first.tasks
    }


def finished(stored: ResultsFile[Result], named: Mapping[str, object]) -> list[Result]:
    """Every result whose situation still exists."""
    order = list(named)
    found = [r for r in stored.rows().values() if r.name in named]
    return sorted(found, key=lambda r: (order.index(r.name), r.seed))


# --- the page --------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean with its 95 % Student interval over seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = student_quantile(0.975, degrees=len(values) - 1) * spread
    return mean, mean - half, mean + half


def reading(bounds: tuple[float, float, float] | None) -> str:
    """What the bounds of an effect support. Read off a bound, never off the middle."""
    if bounds is None:
        return "one seed"
    _, low, high = bounds
    return "up" if low > 0 else "down" if high < 0 else "undetermined"


def rows(results: Sequence[Result]) -> Iterator[str]:
    """A row per situation and task set."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    for name, runs in by_name.items():
        done = [r for r in runs if r.failure is None]
        failed = [r for r in runs if r.failure is not None]
        for task in dict.fromkeys(t for r in done for t in r.tasks):
            both = [r.tasks[task] for r in done if task in r.tasks]
            before, after = (float(np.mean([b[i] for b in both])) for i in (0, 1))
            effects = [b - a for a, b in both]
            bounds = interval(effects)
            effect = f"{np.mean(effects):+.2f}"
            if bounds is not None:
                effect += f" [{bounds[1]:+.2f}, {bounds[2]:+.2f}]"
            start = "" if done[0].start == "base" else f" (from {done[0].start})"
            yield (
                f"| {name} | {task} | {len(both)} | {before:.2f}{start} → {after:.2f} | {effect} "
                f"| {reading(bounds)} |"
            )
        for r in failed:
            yield f"| {name} | – | seed {r.seed} | – | – | failed: {r.failure} |"


def page(results: Sequence[Result], named: Mapping[str, tuple[str, object]]) -> str:
    """The whole page."""
    lines = [
        "# What every method did in the lab",
        "",
        "<!-- Written by benchmarks/catalogue.py: run it instead of editing. -->",
        "",
        "Small situations, one per method, chosen to learn in some 40 steps on a tiny model; "
        "judges take up to 200. They show that a method works as built. They do not rank methods: "
        "tasks, data and "
        "learning rates differ, and none was tuned.",
        "",
        "pass@1 on 32 held-out prompts, from the policy that the stage started from to the one it "
        "ended with, means over seeds. The effect has a 95 % Student interval over seeds; *up* "
        "and *down* mean that it excludes zero.",
        "",
    ]
    for family in dict.fromkeys(f for f, _ in named.values()):
        mine = [r for r in results if named[r.name][0] == family]
        if not mine:
            continue
        lines += [f"## {family}", "", "| situation | task | seeds | pass@1 | effect | reading |"]
        lines += ["|---|---|---|---|---|---|", *rows(mine), ""]
    done = {r.name for r in results}
    waiting = [n for n in named if n not in done]
    lines.append(f"Not run yet: {', '.join(waiting) or 'nothing'}.")
    return "\n".join(lines) + "\n"


def uncovered(recipes: Sequence[Result]) -> list[str]:
    """Named methods that no finished situation shows; one of a judge ends with who asks it."""
    shown = {m for r in recipes if r.failure is None for m in (r.method, r.name)}
    return [n for n, m in known("method").items() if n not in shown and not m.spelt_out]


def main(arguments: Sequence[str] | None = None, *, runner: Runner = run_here) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="situations to run")
    parser.add_argument("--out", type=Path, default=Path("out/lab-catalogue"))
    parser.add_argument("--results", type=Path, default=RESULTS / "catalogue.jsonl")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    named, stored = known_situations(), results_in(options.results)
    for name in chosen(named, options.only):
        family, situation = named[name]
        for seed in options.seeds:
            folder = options.out / family / name / str(seed)
            result = run_one(
                name, family, situation, seed=seed, folder=folder, stored=stored, runner=runner
            )
            words = result.failure or ", ".join(
                f"{t} {a:.2f} → {b:.2f}" for t, (a, b) in result.tasks.items()
            )
            print(f"{name} seed {seed}: {words} ({result.seconds:.0f} s)", file=sys.stderr)
            # After every run: a long table should be readable before it is complete.
            write_atomic(options.page, page(finished(stored, named), named))
    text = page(finished(stored, named), named)
    write_atomic(options.page, text)
    print(text, end="")
    if missing := uncovered(finished(stored, named)):
        print(f"methods that no finished run shows: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
