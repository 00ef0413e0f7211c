"""``python -m silent_failures``: plant the faults, and write what became of them.

PYTHONPATH=benchmarks python -m silent_failures --only weights-nan reward-nan
PYTHONPATH=benchmarks python -m silent_failures --against trl
PYTHONPATH=benchmarks python -m silent_failures --clean      # 100 runs with nothing wrong
PYTHONPATH=benchmarks python -m silent_failures --mutants    # break our own code instead
PYTHONPATH=benchmarks python -m silent_failures --page       # just write the page again
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from silent_failures import page
from silent_failures.bench import FAULTS, Bench
from silent_failures.clean import planned
from silent_failures.mutation import mutated
from silent_failures.planters import ALL
from silent_failures.world import ROOT


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the bench, keep the results, and write the page."""
    parser = argparse.ArgumentParser(prog="silent_failures", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ID", help="some faults, or some mutants")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--against", choices=["trl"], help="run TRL's trainers instead of ours")
    what.add_argument("--clean", action="store_true", help="100 runs with nothing wrong")
    what.add_argument("--mutants", action="store_true", help="break our own code instead")
    what.add_argument("--page", action="store_true", help="write the page again")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    chosen = parser.parse_args(arguments)
    if chosen.mutants:
        _mutants(chosen.only)
    elif chosen.clean:
        _clean(chosen.keep)
    elif not chosen.page:
        missing = FAULTS.keys() - ALL.keys()
        if missing:
            parser.error(f"faults without a planter: {sorted(missing)}")
        _faults(chosen.only, against=chosen.against, keep=chosen.keep)
    print(page.write())


def _faults(only: Sequence[str] | None, *, against: str | None, keep: Path | None) -> None:
    bench = Bench("trl" if against else "posttrain", keep=keep)
    for found in bench.judged(only or FAULTS):
        # Where the project lies on this machine is nobody's result.
        found = msgspec.structs.replace(found, words=found.words.replace(f"{ROOT}/", ""))
        page.VERDICTS.add(found)
        words = " ".join(found.words.split())[:150]
        mark = " (traceback)" if found.traceback else ""
        print(f"{found.id:32} {found.verdict:14} {found.seconds:5.1f} s{mark}  {words}", flush=True)
    bench.close()


def _clean(keep: Path | None) -> None:
    bench = Bench("posttrain", keep=keep)
    for run in bench.clean(planned()):
        page.CLEAN.add(run)
        said = "; ".join(run.alarms) or run.failure or ""
        print(f"{run.name:20} seed {run.seed}  {' '.join(said.split())[:170]}", flush=True)
    bench.close()


def _mutants(only: Sequence[str] | None) -> None:
    for fate in mutated(only):
        page.FATES.add(fate)
        print(f"{fate.id:34} {'killed' if fate.killed else 'SURVIVED'}  {fate.by}", flush=True)


if __name__ == "__main__":
    main()
