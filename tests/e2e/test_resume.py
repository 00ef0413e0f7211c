"""A run that dies anywhere ends where the undisturbed run ends, bit for bit."""

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
    recipe,
    rows,
    sft,
    sit,
    start_command,
    stage_folder,
    tiles,
    trace,
    write_recipe,
)

from posttrain.ledger import verify
from posttrain.store import read_trajectories, read_uses

STEPS = {"sft": 5, "adapt": 4, "grpo": 4, "dpo": 3, "opd": 4}
EVERYTHING = recipe(
    sft(budget={"steps": 5}),
    sft("adapt", lora={"rank": 2, "alpha": 4}),
    grpo(groups_per_step=4, updates_per_draw=2),
    dpo(budget={"steps": 3}),
    opd(checkpoint_every=3),
)


@pytest.fixture(scope="module")
def undisturbed(shared):
    path = write_recipe(shared, EVERYTHING, "everything.yaml")
    out = shared / "undisturbed"
    code, words = sit(path, out)
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
        assert [m["step"] for m in found[stage_folder(out, name).name]["metrics"]] == [*range(steps)]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_again_and_again(undisturbed, tmp_path, seed):
    path, _, expected, moments = undisturbed
    out, rng, kills = tmp_path / "out", random.Random(seed), 0
    while True:
        code, words = sit(path, out, Fault(moment=rng.randint(1, moments // 4)))
        if code == 0:
            break
        assert code == -signal.SIGKILL, words
        kills += 1
    assert kills >= 3
    check_whole(out)
    found = trace(out)
    assert found["rows"] == expected["rows"]
    assert found == expected
