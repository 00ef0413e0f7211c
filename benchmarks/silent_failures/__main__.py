"""``python -m silent_failures``: plant the faults, and write what became of them.

PYTHONPATH=benchmarks python -m silent_failures --only weights-nan reward-nan
PYTHONPATH=benchmarks python -m silent_failures --against trl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from silent_failures import plant_environment, plant_models, plant_options, plant_rows
from silent_failures.bench import FAULTS, Bench
from silent_failures.planting import PLANTERS

PLANTED = (plant_models, plant_rows, plant_options, plant_environment)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="silent_failures", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ID", help="some faults")
    parser.add_argument("--against", choices=["trl"], help="run TRL's trainers instead of ours")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    chosen = parser.parse_args(arguments)
    missing = FAULTS.keys() - PLANTERS.keys()
    if missing:
        parser.error(f"faults without a planter: {sorted(missing)}")
    bench = Bench("trl" if chosen.against else "posttrain", keep=chosen.keep)
    for found in bench.judged(chosen.only or FAULTS):
        words = " ".join(found.words.split())[:150]
        mark = " (traceback)" if found.traceback else ""
        print(f"{found.id:32} {found.verdict:14} {found.seconds:5.1f} s{mark}  {words}", flush=True)
    bench.close()


if __name__ == "__main__":
    main()
