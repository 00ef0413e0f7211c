"""A tiny world to run whole recipes in, and processes that can be killed at any moment of one.

Processes are forked from a server that has imported torch once, so a process starts in
milliseconds and is a process of its own all the same: it locks, it dies, it is resumed.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import yaml

from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder
from posttrain.run.ledger import head_file
from posttrain.testing import tiny_model

REWARD = """
def score(prompts, completions, answer, **columns):
    return [(c.count(a) + 0.1 * len(set(c))) / 4 for c, a in zip(completions, answer)]
"""
LETTERS = "abcdefghijklmnop"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["peft", "posttrain.api", "posttrain.cli.main", "posttrain.report.load"]
)


# --- what a recipe needs ---------------------------------------------------------------------


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_world(folder: Path, **model) -> Path:
    """A model, tasks with a reward function, demonstrations and pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(folder / "model", **model)
    (folder / "reward.py").write_text(REWARD)
    tasks = [{"prompt": f"say {c}", "answer": c} for c in LETTERS]
    write_rows(folder / "tasks.jsonl", tasks)
    demos = [
        {"messages": [turn("user", f"{c} then?"), turn("assistant", f"{c}{c} {i}")]}
        for i, c in enumerate(LETTERS[:7])
    ]
    write_rows(folder / "demos.jsonl", demos)
    pairs = [
        {
            "prompt": [turn("user", f"say {c}")],
            "chosen": [turn("assistant", c * 3)],
            "rejected": [turn("assistant", "no " + c)],
        }
        for c in LETTERS[:6]
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def recipe(*stages, **changes) -> dict:
    return {
        "name": "world",
        "model": "model",
        "threads": 1,
        "tasks": {"say": task_set()},
        "measure": {"samples": 4, "max_new_tokens": 5},
        "stages": list(stages),
        **changes,
    }


def task_set(**changes) -> dict:
    return {
        "type": "jsonl",
        "path": "tasks.jsonl",
        "reward": "reward.py:score",
        "held_out": 5,
        "success": 0.1,
        **changes,
    }


def stage(name: str, method: dict, **changes) -> dict:
    return {
        "name": name,
        "method": method,
        "budget": {"steps": 4},
        "groups_per_step": 2,
        "checkpoint_every": 2,
        "optimizer": {"lr": 1e-2},
        **changes,
    }


def sft(name="sft", **changes) -> dict:
    data = changes.pop("data", {"path": "demos.jsonl"})
    return stage(name, {"name": "sft", "data": data}, **changes)


def grpo(name="grpo", method=(), **changes) -> dict:
    options = {"tasks": ["say"], "group_size": 3, "max_new_tokens": 4, "kl_weight": 0.01}
    return stage(name, {"name": "grpo", **options, **dict(method)}, **changes)


def ppo(name="ppo", **changes) -> dict:
    options = {"tasks": ["say"], "group_size": 2, "max_new_tokens": 4}
    return stage(name, {"name": "ppo", **options}, **changes)


def dpo(name="dpo", **changes) -> dict:
    data = changes.pop("data", {"path": "pairs.jsonl"})
    return stage(name, {"name": "dpo", "data": data}, **changes)


def opd(name="opd", **changes) -> dict:
    method = {"name": "opd", "tasks": ["say"], "teachers": {"*": "base"}, "max_new_tokens": 4}
    return stage(name, method, **changes)


def write_recipe(folder: Path, content: dict, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


# --- processes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Where a process kills itself. One of the two."""

    moment: int | None = None  # the n-th change of a file or event of the run
    before_row: str | None = None  # just before the ledger row of this kind
    before_file: str | None = None  # just before a file of this name takes its place


NEVER = Fault()
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class _Moments:
    """Counts everything that a kill could fall between, and kills at the chosen one."""

    def __init__(self, fault: Fault, out: Path) -> None:
        self.fault, self.out, self.count = fault, str(out), 0

    def audit(self, event: str, args: tuple) -> None:
        if event == "open":
            writes = args[1] is None or set(args[1]) & set("wax+")
            if not writes or (args[1] is None and not args[2] & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event not in _CHANGES:
            return
        if not str(args[0]).startswith(self.out):
            return
        if event == "os.rename" and Path(str(args[1])).name == self.fault.before_file:
            die()
        self.tick()

    def tick(self, event: object = None) -> None:
        self.count += 1
        if self.count == self.fault.moment:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_recipe(path: Path, out: Path, fault: Fault, report: Path, accept: list[str]) -> None:
    import torch

    from posttrain import api
    from posttrain.core.errors import PosttrainError
    from posttrain.recipe import load_recipe
    from posttrain.run.ledger import Ledger

    torch.set_num_threads(1)
    moments = _Moments(fault, out)
    append = Ledger.append

    def watched(self, kind, body):
        if kind == fault.before_row:
            die()
        return append(self, kind, body)

    Ledger.append = watched
    sys.addaudithook(moments.audit)
    try:
        known = load_recipe(path)
        api.run(known, out=out, root=path.parent, observe=moments.tick, accept=accept)
    except PosttrainError as error:
        report.write_text(f"{type(error).__name__}: {error}")
        os._exit(2)
    except:
        report.write_text(traceback.format_exc())
        raise
    report.write_text(str(moments.count))


def run_recipe(path: Path, out: Path, fault: Fault = NEVER, *, accept=()) -> tuple[int, str]:
    """One process that runs a recipe; returns its exit code and last words."""
    report = path.parent / "last-words"
    report.unlink(missing_ok=True)
    process = SERVER.Process(target=_run_recipe, args=(path, out, fault, report, list(accept)))
    process.start()
    process.join()
    words = report.read_text() if report.exists() else ""
    assert process.exitcode in (0, 2, -signal.SIGKILL), words
    return process.exitcode, words


def _command(arguments: list[str], log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    import torch

    from posttrain.cli import main as cli

    torch.set_num_threads(1)
    sys.argv = ["posttrain", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start tests without it
    cli.main()


def start_command(*arguments: object, log: Path):
    """`posttrain ARGUMENTS` in a process of its own, output in ``log``."""
    process = SERVER.Process(target=_command, args=([str(a) for a in arguments], log))
    process.start()
    return process


# --- what a run left behind ------------------------------------------------------------------


def stage_folder(out: Path, name: str) -> Path:
    (folder,) = (p for p in (out / "stages").glob(f"{name}-*") if p.name.count("-") == 1)
    return folder


def metrics(folder: Path) -> list[dict]:
    """Lines without what a clock says."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith("seconds/")} for x in lines]


TIMED = ("metrics.jsonl", "progress.json")
"""Files that hold what a clock says."""


def rows(out: Path, *, run_rows: bool = False) -> list[tuple[str, dict]]:
    """Ledger rows without clocks, without those of kind ``run``, one per process, and without
    those of kind ``file``, which a process that died may have written in vain."""
    from posttrain.run.ledger import read

    left_out = {"file"} if run_rows else {"file", "run"}
    found = []
    for record in read(out / "ledger.jsonl"):
        # A proof's figures hold times; its words do not.
        body = {k: v for k, v in record.body.items() if k not in ("seconds", "figures")}
        if "files" in body:
            body["files"] = {k: v for k, v in body["files"].items() if not k.endswith(TIMED)}
        if record.kind not in left_out:
            found.append((str(record.kind), body))
    return found


def unnamed(out: Path) -> set[str]:
    """Files of a run that its folder has no name for."""
    run = RunFolder(out)
    named = {
        *(run.recipe_file, run.ledger_file, run.report_file, run.treatment_file, out / "lock"),
        *(head_file(run.ledger_file), *out.glob(f"{run.ledger_file.name}.torn-*")),
        *(run.measurement_file(policy) for policy in run.measured()),
        *(run.diagnosis_file(n) for n in run.diagnoses()),
        *(run.diagnosis_page(n) for n in run.diagnoses()),
    }
    whole = set[Path]()  # folders that belong to whoever saves into them
    for stage in run.stages():
        named |= {stage.record_file, stage.metrics_file, stage.result_file}
        named |= {*stage.trajectory_files(), *stage.use_files()}
        whole |= {stage.checkpoint, stage.model}
    whole.add(out / "aside")
    files = (p for p in out.rglob("*") if p.is_file() and not whole & set(p.parents))
    return {str(p.relative_to(out)) for p in files} - {str(p.relative_to(out)) for p in named}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file with its time and content."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha(p)) for p in files}


def trace(out: Path) -> dict:
    """Everything of a run that must not depend on where it was interrupted."""
    assert unnamed(out) == set()
    assert audit(RunFolder(out)) == []
    found: dict = {"rows": rows(out)}
    for folder in sorted((out / "stages").iterdir()):
        assert folder.name[0] != ".", folder
        partial = [p.name for p in folder.rglob(".*")]
        assert not partial, partial
        found[folder.name] = {
            "metrics": metrics(folder),
            "model": {p.name: sha(p) for p in sorted((folder / "model").iterdir()) if p.is_file()},
            "shards": {p.name: sha(p) for p in sorted((folder / "shards").iterdir())},
        }
    found["measurements"] = {p.name: sha(p) for p in sorted((out / "measurements").iterdir())}
    return found


def intervals(out: Path, stage_name: str) -> list[list[int]]:
    return [b["steps"] for kind, b in rows(out) if kind == "update" and b["stage"] == stage_name]


def tiles(parts: list[list[int]], steps: int) -> bool:
    """True when the intervals cover 0..steps once, in order."""
    borders = [0, *(end for _, end in parts)]
    return [start for start, _ in parts] == borders[:-1] and borders[-1] == steps
