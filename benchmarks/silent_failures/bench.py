"""Run faults and twins, several at a time, and judge them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from silent_failures import ours, theirs
from silent_failures.clean import VARIANTS, Clean
from silent_failures.environment import ENVIRONMENT
from silent_failures.faults import Fault
from silent_failures.inputs import INPUTS
from silent_failures.planters import ALL
from silent_failures.planting import Planter, Side, nothing
from silent_failures.processes import preload
from silent_failures.result import Result
from silent_failures.score import Judged, Verdict, judge
from silent_failures.world import make_world, setup

FAULTS = {f.id: f for f in (*INPUTS, *ENVIRONMENT)}
WORKERS = 2


class Bench:
    """Faults on one side, in a folder of their own.

    Args:
        side: whose trainers run.
        keep: a folder for the runs; None for one that is removed.
    """

    def __init__(self, side: Side, *, keep: Path | None = None) -> None:
        self.side = side
        _import_all()
        self._home = keep or Path(tempfile.mkdtemp(prefix="silent-"))
        self._kept = keep is not None
        self._world = self._home / "world"
        if not self._world.is_dir():
            make_world(self._world)
        self._run: Callable[..., Result] = (ours if side == "posttrain" else theirs).run
        preload((ours if side == "posttrain" else theirs).MODULES)
        self._twins: dict[tuple[object, ...], Result] = {}

    def close(self) -> None:
        """Remove the folder."""
        if not self._kept:
            shutil.rmtree(self._home)

    def judged(self, ids: Iterable[str]) -> Iterator[Judged]:
        """Verdicts in the order of the ids."""
        with ThreadPoolExecutor(WORKERS) as pool:
            yield from pool.map(self._one, ids)

    def clean(self, runs: Iterable[tuple[str, int]]) -> Iterator[Clean]:
        """Runs with nothing wrong, in their order."""
        with ThreadPoolExecutor(WORKERS) as pool:
            yield from pool.map(self._clean, runs)

    def _clean(self, run: tuple[str, int]) -> Clean:
        name, seed = run
        base, change = VARIANTS[name]
        folder = self._home / f"clean-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        inputs = setup(self._world, folder, base, seed=seed)
        found = self._run(inputs, "", Planter(twin=change), faulty=False)
        if not self._kept:
            shutil.rmtree(folder, ignore_errors=True)
        failed = None if found.end == "finished" else found.words or found.end
        alarms = [f"step {step + 1}: {words}" for step, words in found.alarms]
        return Clean(name=name, seed=seed, alarms=alarms, failure=failed)

    def _one(self, name: str) -> Judged:
        fault, planter = FAULTS[name], ALL[name]
        reason = fault.not_ours if self.side == "posttrain" else fault.not_trl
        if reason is not None:
            return Judged(id=name, side=self.side, verdict=Verdict.LEFT_OUT, words=reason)
        twin = self._twin(fault, planter)
        result = self.result(fault, planter, faulty=True)
        verdict, words = judge(fault, planter, result, twin)
        return Judged(
            id=name,
            side=self.side,
            verdict=verdict,
            words=words,
            traceback=result.traceback and verdict is Verdict.REFUSED,
            seconds=result.seconds,
        )

    def _twin(self, fault: Fault, planter: Planter) -> Result:
        """The run without the fault; faults with nothing special share one."""
        shared = planter.twin is nothing and not planter.then
        stops = planter.stop if planter.twin_stops else ""
        again = bool(planter.between) or bool(stops)
        key = (fault.base, stops, again, planter.stages) if shared else (fault.id,)
        if key not in self._twins:
            self._twins[key] = self.result(fault, planter, faulty=False)
        return self._twins[key]

    def result(self, fault: Fault, planter: Planter, *, faulty: bool) -> Result:
        """One run, with its fault or without."""
        folder = self._home / f"{self.side}-{fault.id}-{'fault' if faulty else 'twin'}"
        shutil.rmtree(folder, ignore_errors=True)
        inputs = setup(self._world, folder, fault.base)
        found = self._run(inputs, fault.id, planter, faulty=faulty)
        if not self._kept:
            shutil.rmtree(folder, ignore_errors=True)
        return found


def _import_all() -> None:
    """Import what planters use, before threads race to it: transformers loads its parts on use."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    assert all((LoraConfig, get_peft_model, AutoConfig, AutoModelForCausalLM, AutoTokenizer))
