"""A run that dies anywhere, or whose disk fails anywhere, ends where an undisturbed run ends.

    python benchmarks/kills.py                    # 200 disturbances over eight methods
    python benchmarks/kills.py --number 400 --seed 1 --write   # and into docs/lab-log.md

    undisturbed run ──▶ trace ◀── equal, to the bit ── run, disturbed again and again until it ends

Every process of a disturbed run meets one disturbance:

    kill      SIGKILL before, half-way through or after its n-th operation on files
    time      SIGKILL after a random time, wherever it is
    disk      its n-th operation on files fails (full, quota, input/output, permission), once or
              from then on; the process must end in words that name a path

Compared are exports, metrics, trajectories, measurements and ledger, without what a clock says;
and every file of the folder is what its ledger records. Processes are forked from one that has
loaded PyTorch, so that one costs seconds.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab_log import write

from posttrain.core.config import convert, differences
from posttrain.core.errors import PosttrainError
from posttrain.core.files import hash_file
from posttrain.recipe import Recipe
from posttrain.run.audit import audit
from posttrain.run.folder import RunFolder
from posttrain.run.ledger import RecordKind, read
from posttrain.testing import tiny_model

SERVER = multiprocessing.get_context("forkserver")
NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS)
ON_FILES = ("write", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "truncate")
SAID, DEFECT = 2, 1
"""Exit codes: an error of the tree, or of the system with its path; anything else."""

LETTERS = "abcdefghijklmnop"
REWARD = """
def score(prompts, completions, answer, **columns):
    return [(c.count(a) + 0.1 * len(set(c))) / 4 for c, a in zip(completions, answer)]
"""
ROLLOUTS = {"tasks": ["say"], "group_size": 2, "max_new_tokens": 4}
METHODS: dict[str, dict[str, object]] = {
    "sft": {"method": {"name": "sft", "data": {"path": "demos.jsonl"}}},
    "lora": {
        "method": {"name": "sft", "data": {"path": "demos.jsonl"}},
        "lora": {"rank": 2, "alpha": 4},
    },
    "grpo": {"method": {"name": "grpo", "kl_weight": 0.01, **ROLLOUTS}, "updates_per_draw": 2},
    "dpo": {"method": {"name": "dpo", "data": {"path": "pairs.jsonl"}}},
    "tr_dpo": {"method": {"name": "tr_dpo", "data": {"path": "pairs.jsonl"}, "every": 2}},
    "opd": {
        "method": {"name": "opd", "tasks": ["say"], "teachers": {"*": "base"}, "max_new_tokens": 4}
    },
    "ppo": {"method": {"name": "ppo", **ROLLOUTS}},
    "chord": {"method": {"name": "chord", "data": {"path": "demos.jsonl"}, **ROLLOUTS}},
}


def make_world(folder: Path) -> None:
    """A model, tasks with a reward, demonstrations, pairs, and a recipe per method."""
    tiny_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows: dict[str, list[dict[str, object]]] = {
        "tasks.jsonl": [{"prompt": f"say {c}", "answer": c} for c in LETTERS],
        "demos.jsonl": [
            {"messages": [turn("user", f"{c} then?"), turn("assistant", f"{c}{c} {i}")]}
            for i, c in enumerate(LETTERS[:7])
        ],
        "pairs.jsonl": [
            {
                "prompt": [turn("user", f"say {c}")],
                "chosen": [turn("assistant", c * 3)],
                "rejected": [turn("assistant", "no " + c)],
            }
            for c in LETTERS[:6]
        ],
    }
    for name, some in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))


def recipe_of(name: str) -> Recipe:
    """One stage of four steps in two commits, measured before and after."""
    stage = {
        "name": "learn",
        "budget": {"steps": 4},
        "groups_per_step": 2,
        "checkpoint_every": 2,
        "optimizer": {"lr": 1e-2},
        **METHODS[name],
    }
    tasks = {
        "type": "jsonl",
        "path": "tasks.jsonl",
        "reward": "reward.py:score",
        "held_out": 3,
        "success": 0.1,
    }
    whole = {
        "name": name,
        "model": "model",
        "threads": 1,
        "tasks": {"say": tasks},
        "measure": {"samples": 2, "max_new_tokens": 3},
        "stages": [stage],
    }
    return convert(whole, Recipe, origin="kills")


# --- disturbances ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What happens to one process."""

    kind: str  # "none", "kill", "time" or "disk"
    at: int = 0  # of its operations on files
    where: str = ""  # of a kill: "before", "half", "after"
    number: int = 0  # of a disk error
    lasts: bool = False
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """Its sort, for the table."""
        if self.kind == "kill":
            return f"kill {self.where}"
        return errno.errorcode[self.number] if self.kind == "disk" else self.kind


NONE = Disturbance(kind="none")


@dataclass(slots=True)
class _Trap:
    """Counts the operations of this process on files, and springs at the chosen one."""

    disturbance: Disturbance
    count: int = 0
    arms: Callable[[], None] = field(default=lambda: None)

    def around(
        self, call: Callable[..., object], half: Callable[..., None]
    ) -> Callable[..., object]:
        """The operation with the trap around it; ``half`` does a part of it."""

        def trapped(*args: object, **options: object) -> object:
            self.count += 1
            d = self.disturbance
            now = self.count == d.at
            if now and d.kind == "kill" and d.where != "after":
                if d.where == "half":
                    half(*args, **options)
                die()
            if d.kind == "disk" and (now or (d.lasts and self.count > d.at)):
                half(*args, **options)
                named = args[0] if args and not isinstance(args[0], int) else None
                raise OSError(d.number, os.strerror(d.number), named)
            result = call(*args, **options)
            if now and d.kind == "kill":
                die()
            return result

        return trapped


def die() -> None:
    """As a machine does whose power fails."""
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing(*args: object, **options: object) -> None:
    """No part of the operation."""


def _set(trap: _Trap) -> None:
    """Put the trap around every operation that a run uses to write."""
    import torch

    plain = os.write

    def half_write(fd: int, content: bytes) -> None:
        plain(fd, bytes(content)[: len(content) // 2])

    for name in ON_FILES:
        half = half_write if name == "write" else _nothing
        os.__dict__[name] = trap.around(os.__dict__[name], half)

    def half_save(state: object, path: object, **options: object) -> None:
        Path(str(path)).write_bytes(b"half of a checkpoint")

    torch.__dict__["save"] = trap.around(torch.save, half_save)
    opened = io.open
    appends = trap.around(opened, _nothing)

    def watched(file: object, mode: str = "r", *args: object, **options: object) -> object:
        return (appends if set(mode) & set("wax+") else opened)(file, mode, *args, **options)

    io.__dict__["open"] = watched


def _work(name: str, out: str, root: str, disturbance: Disturbance, words: str) -> None:
    """The process: run the recipe, and leave its last words."""
    import torch

    from posttrain import api

    torch.set_num_threads(1)
    os.dup2(os.open(f"{words}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    trap = _Trap(disturbance)
    write_words = Path(words).write_text
    recipe = recipe_of(name)
    _set(trap)
    code = 0
    try:
        api.run(recipe, out=Path(out), root=Path(root))
        last = str(trap.count)
    except PosttrainError as error:
        code, last = SAID, f"{type(error).__name__}: {error}"
    except OSError as error:
        code = SAID if error.filename else DEFECT
        last = f"OSError: {error}"
    trap.disturbance = NONE
    write_words(last)
    os._exit(code)


def process(name: str, out: Path, root: Path, disturbance: Disturbance) -> tuple[int, str, float]:
    """Run one process; returns its exit code, last words and seconds."""
    words = root / "words"
    words.unlink(missing_ok=True)
    began = time.monotonic()
    child = SERVER.Process(target=_work, args=(name, str(out), str(root), disturbance, str(words)))
    child.start()
    if disturbance.kind == "time":
        child.join(disturbance.seconds)
        child.kill()
    child.join()
    last = words if words.is_file() else root / "words.stderr"  # a traceback
    said = last.read_text(errors="replace")[-2000:] if last.is_file() else ""
    return child.exitcode or 0, said, time.monotonic() - began


# --- what is compared ------------------------------------------------------------------------


def trace(out: Path) -> dict[str, object]:
    """Everything of a run that must not depend on its disturbances."""
    run = RunFolder(out)
    found: dict[str, object] = {"faults": [str(fault) for fault in audit(run)]}
    timed = {file.name for s in run.stage_folders() for file in (s.metrics_file, s.progress_file)}
    rows = []
    for record in read(run.ledger_file):
        if record.kind in (RecordKind.RUN, RecordKind.FILE):
            continue  # one per process; one per write, also of what a kill undid
        # A proof's figures hold times; its words do not.
        body = {k: v for k, v in record.body.items() if k not in ("seconds", "figures")}
        files = body.get("files")
        if isinstance(files, dict):
            body["files"] = {k: v for k, v in files.items() if k.rpartition("/")[2] not in timed}
        rows.append((record.kind.value, body))
    found["rows"] = {str(number): row for number, row in enumerate(rows)}
    for stage in run.stage_folders():
        lines = stage.metrics()
        found["metrics"] = [{k: v for k, v in x.items() if "seconds/" not in k} for x in lines]
        files = [*stage.trajectory_files(), *stage.use_files(), *stage.model.rglob("*")]
        found["files"] = {
            str(p.relative_to(out)): hash_file(p) for p in sorted(files) if p.is_file()
        }
    found["measured"] = {n: hash_file(run.measurement_file(n)) for n in run.measured()}
    return found


@dataclass(slots=True)
class Tally:
    """What happened."""

    disturbances: Counter[str] = field(default_factory=Counter)
    chains: int = 0
    lost: list[str] = field(default_factory=list)  # what differed, in words
    unsaid: list[str] = field(default_factory=list)  # processes that ended in a traceback


def drawn(rng: random.Random, operations: int, seconds: float) -> Disturbance:
    """A disturbance that comes early enough for several of them in one run."""
    sort = rng.choices(("kill", "time", "disk"), (5, 1, 3))[0]
    if sort == "time":
        return Disturbance(kind=sort, seconds=rng.uniform(0.3, 1.0) * seconds)
    at = rng.randint(1, max(2, operations // rng.choice((1, 2, 4))))
    if sort == "kill":
        return Disturbance(kind=sort, at=at, where=rng.choice(("before", "half", "after")))
    return Disturbance(kind=sort, at=at, number=rng.choice(NUMBERS), lasts=rng.random() < 0.5)


def chain(name: str, root: Path, expected: dict[str, object], tally: Tally, *,
          rng: random.Random, operations: int, seconds: float, most: int) -> None:  # fmt: skip
    """One run, disturbed until it ends or ``most`` disturbances came."""
    out = root / "disturbed"
    shutil.rmtree(out, ignore_errors=True)
    tally.chains += 1
    story: list[str] = []
    while True:
        met = drawn(rng, operations, seconds) if len(story) < most else NONE
        code, said, _ = process(name, out, root, met)
        if code == 0:
            break
        story.append(f"{met.words} at {met.at}")
        tally.disturbances[f"{name}: {met.words}"] += 1
        if code == DEFECT or (met is NONE and code):
            tally.unsaid.append(f"{name}, {story[-3:]}: {said[-300:]}")
            return
    found = trace(out)
    for part, value in expected.items():
        if differs := differences(value, found.get(part)):
            tally.lost.append(f"{name}, {part} after {story}: {differs[0][:300]}")


def main() -> None:
    """Disturb, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=200, help="of disturbances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=METHODS, help="methods")
    parser.add_argument("--write", action="store_true", help="put the result into docs/lab-log.md")
    asked = parser.parse_args()
    SERVER.set_forkserver_preload(["peft", "posttrain.api", "posttrain.testing"])
    names = asked.only or list(METHODS)
    tally, began, rng = Tally(), time.monotonic(), random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as top:
        for index, name in enumerate(names):
            root = Path(top, name)
            root.mkdir()
            make_world(root)
            code, said, seconds = process(name, root / "undisturbed", root, NONE)
            if code:
                sys.exit(f"{name}: the undisturbed run failed: {said}")
            expected = trace(root / "undisturbed")
            quota = asked.number * (index + 1) // len(names)
            while (left := quota - sum(tally.disturbances.values())) > 0:
                chain(name, root, expected, tally, rng=rng, operations=int(said),
                      seconds=seconds, most=min(left, 12))  # fmt: skip
            print(f"{name}: {int(said)} operations on files, {sum(tally.disturbances.values())} "
                  f"disturbances so far, {len(tally.lost)} differences", flush=True)  # fmt: skip
            shutil.rmtree(root)
    report = section(tally, asked.seed, time.monotonic() - began)
    print(report)
    if asked.write:
        write(report)
    sys.exit(1 if tally.lost or tally.unsaid else 0)


def section(tally: Tally, seed: int, seconds: float) -> str:
    """The result as a section of the lab log."""
    sorts, methods = Counter[str](), Counter[str]()
    for key, count in tally.disturbances.items():
        method, _, sort = key.partition(": ")
        sorts[sort] += count
        methods[method] += count
    total = sum(sorts.values())
    lines = [
        "## Kills and disk faults",
        "",
        f"{total} disturbances in {tally.chains} runs ({', '.join(methods)}), seed {seed}, "
        f"{seconds / 60:.0f} minutes of one thread: **{len(tally.lost)} differences** to the "
        f"undisturbed runs, {len(tally.unsaid)} processes that ended in a traceback. Compared to "
        "the bit: exports, metrics, trajectories, measurements, ledger; times left out.",
        "",
        "| disturbance | " + " | ".join(sorts) + " |",
        "|---" * (len(sorts) + 1) + "|",
        "| processes | " + " | ".join(str(n) for n in sorts.values()) + " |",
        "",
        *(f"* differs: {words}" for words in tally.lost),
        *(f"* traceback: {words}" for words in tally.unsaid),
        f"How to repeat it: `python benchmarks/kills.py --number {total} --seed {seed}`.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
