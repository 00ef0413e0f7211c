"""The command: every kind, its figures, and exit code 1 on any fault."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzz import data, folders, options, recipes, rewards, world
from fuzz.frame import Tally, Trial, run_commands, run_trials, scratch

KINDS = {"recipes": 2000, "files": 1000, "models": 300, "rewards": 300, "options": 60}


def trials_of(kind: str, folder: Path, *, num: int, seed: int) -> Iterator[Trial]:
    """The trials of a kind; the valid inputs lie in the folder already."""
    if kind == "recipes":
        return recipes.trials(folder, num=num, seed=seed)
    if kind == "files":
        from posttrain.engines.local.engine import LocalEngine

        renderer = LocalEngine(device="cpu", dtype="float32").policy(str(folder / "base")).renderer
        return data.trials(folder, num=num, seed=seed, renderer=renderer)
    if kind == "models":
        return folders.trials(folder, num=num, seed=seed)
    if kind == "rewards":
        return rewards.trials(folder, num=num, seed=seed)
    return options.trials(folder, num=num, seed=seed)


def main() -> None:
    """Parse, fuzz, say."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], default=[])
    parser.add_argument("--num", type=int, help="inputs of each kind")
    parser.add_argument("--commands", type=int, default=50, help="of them through the command line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input, by its number, with its traceback")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    faults = 0
    for kind in given.kinds or KINDS:
        num = given.num or KINDS[kind]
        tally, commands = Tally(), Tally()
        with scratch() as folder:
            world.build(folder)
            (folder / "probe.yaml").write_text(
                "tasks: {sums: {type: jsonl, path: data/products_tasks.jsonl, held_out: 3}}\n"
                "measure: {max_new_tokens: 2}\n"
            )
            os.chdir(folder)

            def made(kind: str = kind, folder: Path = folder, num: int = num) -> Iterator[Trial]:
                return trials_of(kind, folder, num=num, seed=given.seed)

            if given.only is not None:
                trial = next(t for t in made() if t.number == given.only)
                print(trial.words)
                run_trials([trial], tally, loud=True)
            else:
                run_trials(made(), tally)
                run_commands(_spread(made, num, given.commands), commands, where=folder)
            os.chdir("/")
        print(tally.line(kind), flush=True)
        if commands.outcomes:
            print(commands.line(f"{kind}, as commands"), flush=True)
        faults += len(tally.faults) + len(commands.faults)
    sys.exit(1 if faults else 0)


def _spread(made: Callable[[], Iterator[Trial]], num: int, commands: int) -> Iterator[Trial]:
    """Some of the trials that have a command, spread over all."""
    step = max(1, num // commands) if commands else 1
    chosen = (t for t in made() if t.command and t.number % step == 0)
    return itertools.islice(chosen, commands)


if __name__ == "__main__":
    main()
