"""posttrain's side: `posttrain run` in a forked process, observed from the outside."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silent_failures.planting import Planter
from silent_failures.processes import in_process
from silent_failures.result import Result, export_digest
from silent_failures.world import STEPS, Setup

MODULES = ["peft", "posttrain.api", "posttrain.cli.main", "posttrain.report.load"]
ROWS = 8
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def run(setup: Setup, name: str, planter: Planter, *, faulty: bool) -> Result:
    """The whole story of one fault, or of its twin."""
    began = time.monotonic()
    out = setup.folder / "out"
    result = Result(end="finished")
    (planter.fault if faulty else planter.twin)(setup)
    parts: list[tuple[int, str]] = [(len(setup.recipe["stages"]), "")]
    if planter.stop or planter.between:
        stops = planter.stop if faulty or planter.twin_stops else ""
        parts = [(planter.stages if planter.between else 99, stops), *parts]
    for number, (stages, stop) in enumerate(parts):
        if number and faulty and planter.between:
            planter.between(setup)
        _write(setup, stages)
        log = setup.folder / f"log-{number}.txt"
        command = ["run", "recipe.yaml", *([] if "--out" in setup.text() else ["--out", "out"])]
        code = in_process(_work, command, name if faulty else "", stop, log=log, home=setup.folder)
        result.before = result.steps
        _see(result, setup, out)
        _end(result, log, code, stopped=bool(stop))
        if result.end != "finished":
            break
    else:
        _then(result, setup, planter, faulty)
    result.seconds = time.monotonic() - began
    return result


def _write(setup: Setup, stages: int) -> None:
    whole = setup.recipe
    setup.recipe = {**whole, "stages": whole["stages"][:stages]}
    (setup.folder / "recipe.yaml").write_text(setup.text(), encoding="utf-8")
    setup.recipe = whole


def _then(result: Result, setup: Setup, planter: Planter, faulty: bool) -> None:
    """Commands on a finished run."""
    for number, command in enumerate(planter.then):
        log = setup.folder / f"then-{number}.txt"
        code = in_process(_work, command.split(), "", "", log=log, home=setup.folder)
        if code:
            result.before = result.steps
            _end(result, log, code, stopped=False)


def _end(result: Result, log: Path, code: int | None, *, stopped: bool) -> None:
    text = ESCAPES.sub("", log.read_text(encoding="utf-8", errors="replace"))
    result.said += [line.strip() for line in text.splitlines() if line.strip()]
    if code is None:
        result.end = "hung"
    elif code and not (stopped and code in (130, 143, -signal.SIGTERM)):
        result.end, result.traceback = "error", "Traceback (most recent" in text
        at = max(text.rfind("Error"), text.rfind("expected:"))
        result.words = text[max(0, text.rfind("\n\n", 0, at)) :].strip()[-600:]


def _see(result: Result, setup: Setup, out: Path) -> None:
    """What the run left behind."""
    from posttrain.core.monitors import Monitors, alarms
    from posttrain.run.folder import RunFolder

    seen = setup.folder / "seen.json"
    if seen.is_file():
        rows = json.loads(seen.read_text(encoding="utf-8"))
        result.trained, result.whole, result.ids = rows["texts"], rows["whole"], rows["ids"]
    result.steps, result.alarms, result.rewards = 0, [], []
    for stage in RunFolder(out).stage_folders():
        path = stage.metrics_file
        lines = [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []
        result.steps += len(lines)
        result.rewards += [line["reward"] for line in lines if "reward" in line]
        result.first = lines[0] if lines else result.first
        result.alarms += [
            (a.step, f"{a.name}: {a.words}") for a in alarms(Monitors(), lines) if a.step < STEPS
        ]
        weights, more = export_digest(stage.model)
        result.weights = weights or result.weights
        result.first |= more


def _work(command: list[str], name: str, stop: str) -> None:
    """`posttrain COMMAND`, with the fault's patch and an observer of what is trained on."""
    from posttrain.cli import main as cli
    from silent_failures.planters import ALL

    if name and (patch := ALL[name].patch):
        patch("posttrain")
    _observe(stop)
    sys.argv = ["posttrain", *command]
    cli.main()


def _observe(stop: str) -> None:
    """Keep what the first step trains on, and stop in the middle."""
    from posttrain.run.journal import Journal

    record = Journal.record

    def observed(self: Any, step: int, admission: Any, metrics: Mapping[str, float]) -> None:
        record(self, step, admission, metrics)
        if step == 0:
            _keep([m.trajectory for g in admission.kept for m in g.members])
        if stop and step == STEPS // 2:
            os.kill(os.getpid(), signal.SIGINT if stop == "interrupt" else signal.SIGTERM)

    Journal.record = observed  # type: ignore[method-assign]


def _keep(trajectories: list[Any]) -> None:
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file("model/tokenizer.json")
    texts, whole, ids = [], [], set[int]()
    for trajectory in trajectories:
        trained = trajectory.tokens[trajectory.trainable].tolist()
        ids |= set(trained)
        if len(texts) < ROWS:
            texts.append(tokens.decode(trained, skip_special_tokens=False))
            whole.append(trajectory.tokens.tolist())
    found = {"texts": texts, "whole": whole, "ids": sorted(ids)}
    Path("seen.json").write_text(json.dumps(found))
