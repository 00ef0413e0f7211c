"""A run that dies anywhere ends where the undisturbed run ends, bit for bit."""

import os
import random
import signal
import time

import pytest
from world import (
    Fault,
    dpo,
    grpo,
    intervals,
    listing,
    opd,
    ppo,
    recipe,
    rows,
    run_recipe,
    sft,
    stage_folder,
    start_command,
    tiles,
    trace,
    write_recipe,
)

from posttrain.run.ledger import verify
from posttrain.run.store import read_trajectories, read_uses

STEPS = {"sft": 5, "adapt": 4, "grpo": 4, "dpo": 3, "opd": 4, "ppo": 3}
EVERYTHING = recipe(
    sft(budget={"steps": 5}),
    sft("adapt", lora={"rank": 2, "alpha": 4}),
    grpo(groups_per_step=4, updates_per_draw=2),
    dpo(budget={"steps": 3}),
    opd(checkpoint_every=3),
    ppo(budget={"steps": 3}),
)


@pytest.fixture(scope="module")
def undisturbed(shared):
    path = write_recipe(shared, EVERYTHING, "everything.yaml")
    out = shared / "undisturbed"
    code, words = run_recipe(path, out)
    assert code == 0, words
    return path, out, trace(out), int(words)


def check_whole(out):
    verify(out / "ledger.jsonl")
    for name, steps in STEPS.items():
        assert tiles(intervals(out, name), steps), (name, intervals(out, name))


def test_the_undisturbed_run_is_whole(undisturbed):
    _, out, found, moments = undisturbed
    check_whole(out)
    assert moments > 300
    assert len(found["rows"]) == len({str(r) for r in found["rows"]}), "a row stands twice"
    for name, steps in STEPS.items():
        assert [m["step"] for m in found[stage_folder(out, name).name]["metrics"]] == [
            *range(steps)
        ]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_again_and_again(undisturbed, tmp_path, seed):
    path, _, expected, moments = undisturbed
    out, rng, kills = tmp_path / "out", random.Random(seed), 0
    while True:
        code, words = run_recipe(path, out, Fault(moment=rng.randint(1, moments // 4)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, words
        kills += 1
    assert kills >= 3
    check_whole(out)
    found = trace(out)
    assert found["rows"] == expected["rows"]
    assert found == expected


BETWEEN = {
    "checkpoint and its shard row": Fault(before_row="shard"),
    "shard row and update row": Fault(before_row="update"),
    "shards and checkpoint": Fault(before_file="checkpoint"),
    "export and its row": Fault(before_row="checkpoint"),
    "export and done.json": Fault(before_file="done.json"),
    "model written and moved in": Fault(before_file="model"),
    "measurement and its row": Fault(before_row="eval"),
}


@pytest.mark.parametrize("where", BETWEEN)
def test_killed_between(shared, tmp_path, where, short):
    path, expected = short
    out = tmp_path / "out"
    code, words = run_recipe(path, out, BETWEEN[where])
    assert code == -signal.SIGKILL, f"the kill never came: {words}"
    code, words = run_recipe(path, out)
    assert code == 0, words
    verify(out / "ledger.jsonl")
    assert rows(out) == expected["rows"]
    assert trace(out) == expected


@pytest.fixture(scope="module")
def short(shared):
    path = write_recipe(shared, recipe(sft(), name="short"), "short.yaml")
    code, words = run_recipe(path, shared / "short")
    assert code == 0, words
    return path, trace(shared / "short")


def wait_for(condition, process, log):
    for _ in range(600):
        if condition():
            return
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"waited in vain: {log.read_text()}")


def num_steps(out, name):
    """Steps in the metrics file of a stage, 0 before there is one."""
    files = list((out / "stages").glob(f"{name}-*/metrics.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def test_ctrl_c_commits_and_resumes(shared, tmp_path):
    long = recipe(sft(budget={"steps": 120}, checkpoint_every=50), tasks={}, name="long")
    path = write_recipe(shared, long, "long.yaml")
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    assert run_recipe(path, whole)[0] == 0

    process = start_command("run", path, "--out", out, log=log)
    wait_for(lambda: num_steps(out, "sft") >= 3, process, log)
    signal_now(process, signal.SIGINT)
    assert process.exitcode == 130, log.read_text()
    assert "stopped. The same command goes on from the last checkpoint." in log.read_text()
    assert "Traceback" not in log.read_text()
    (stopped,) = intervals(out, "sft")
    assert 3 <= stopped[1] < 120
    assert stopped[1] == num_steps(out, "sft")

    assert run_recipe(path, out)[0] == 0
    assert tiles(intervals(out, "sft"), 120)
    a, b = trace(whole), trace(out)
    (name,) = (n for n in a if n.startswith("sft"))
    assert a[name]["model"] == b[name]["model"]
    assert a[name]["metrics"] == b[name]["metrics"]
    # Ctrl-C commits where it comes, so the shards are cut elsewhere; what they hold is the same.
    assert shards(whole) == shards(out)


def signal_now(process, number):
    os.kill(process.pid, number)
    process.join(30)


def shards(out):
    folder = stage_folder(out, "sft") / "shards"
    uses = [u for p in sorted(folder.glob("*.uses.*")) for u in read_uses(p)]
    held = {t.id for p in folder.glob("*.trajectories.*") for t in read_trajectories(p)}
    return uses, held


def test_two_ctrl_c_stop_at_once_and_lose_only_the_draw(shared, tmp_path):
    path = write_recipe(shared, recipe(sft(budget={"steps": 4000}), tasks={}), "endless.yaml")
    out, log = tmp_path / "out", tmp_path / "log"
    process = start_command("run", path, "--out", out, log=log)
    wait_for(lambda: num_steps(out, "sft") >= 3, process, log)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130, log.read_text()
    assert verify(out / "ledger.jsonl").num_records > 2
    last = intervals(out, "sft")[-1][1]
    assert tiles(intervals(out, "sft"), last)


def test_a_finished_run_is_left_alone(undisturbed, posttrain):
    path, out, expected, _ = undisturbed
    before = listing(out)
    started = time.monotonic()
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 0
    assert time.monotonic() - started < 5
    assert errors.count("already finished") == len(STEPS)
    after = listing(out)
    assert {k: v for k, v in before.items() if k.startswith("stages/")} == {
        k: v for k, v in after.items() if k.startswith("stages/")
    }
    assert before["ledger.jsonl"] == after["ledger.jsonl"]
    assert trace(out) == expected


def test_two_runs_on_one_folder(shared, tmp_path, posttrain):
    path = write_recipe(shared, recipe(sft(budget={"steps": 4000}), tasks={}), "endless.yaml")
    out, log = tmp_path / "out", tmp_path / "log"
    process = start_command("run", path, "--out", out, log=log)
    try:
        wait_for(lambda: num_steps(out, "sft") >= 1, process, log)
        code, _, errors = posttrain("run", path, "--out", out)
        assert code == 2
        assert f"RunLocked: {out} is in use by process {process.pid}" in errors
        assert f"kill {process.pid}" in errors
    finally:
        process.kill()
        process.join()
    verify(out / "ledger.jsonl")
