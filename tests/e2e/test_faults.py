"""A disk that fills and a reward function that misbehaves: an error in words, and nothing lost."""

import errno
import os

import pytest
import torch
from world import (
    REWARD,
    grpo,
    intervals,
    make_world,
    recipe,
    rows,
    run_recipe,
    sft,
    tiles,
    trace,
    write_recipe,
)

from posttrain.core import files
from posttrain.run.ledger import verify

FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Refuses the n-th write of one kind, and every one after it."""

    def __init__(self, after: int) -> None:
        self.left = after

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(*FULL.args)


def fill_syscalls(monkeypatch, disk):
    """os.write: atomic files and the ledger. It may first write a part, as a real disk does."""
    write = os.write

    def refuse(fd, content):
        try:
            disk.check()
        except OSError:
            if len(content) > 100:
                write(fd, content[:7])
            raise
        return write(fd, content)

    monkeypatch.setattr(files.os, "write", refuse)


def fill_sync(monkeypatch, disk):
    """os.fsync: file systems that only notice late."""
    sync = os.fsync

    def refuse(fd):
        disk.check()
        return sync(fd)

    monkeypatch.setattr(files.os, "fsync", refuse)


def fill_checkpoint(monkeypatch, disk):
    """torch.save writes through its own stream."""
    save = torch.save

    def refuse(state, path):
        path.write_bytes(b"half")
        disk.check()
        return save(state, path)

    monkeypatch.setattr(torch, "save", refuse)


def fill_metrics(monkeypatch, disk):
    """Appending a line of metrics: half of it is written."""
    from pathlib import Path

    opened = Path.open

    def refuse(self, mode="r", *args, **kwargs):
        if self.name == "metrics.jsonl" and mode == "ab":
            with opened(self, "ab") as file:
                try:
                    disk.check()
                except OSError:
                    file.write(b'{"step": 1, "lo')
                    raise
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)


def fill_export(monkeypatch, disk):
    """safetensors reports a full disk in words only."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def refuse(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        disk.check_words()

    def words():
        try:
            disk.check()
        except OSError:
            raise RuntimeError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ) from None

    disk.check_words = words
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)


CASES = [
    *((fill_syscalls, n) for n in (0, 2, 5, 8, 9, 12, 14, 20)),
    *((fill_sync, n) for n in (0, 3, 9, 14)),
    *((fill_checkpoint, n) for n in (0, 1)),
    *((fill_metrics, n) for n in (0, 1, 3)),
    (fill_export, 0),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("whole") / "world")
    path = write_recipe(world, recipe(sft(), grpo(budget={"steps": 2})))
    code, words = run_recipe(path, world / "out")
    assert code == 0, words
    return path, trace(world / "out")


@pytest.mark.parametrize(("fill", "after"), CASES)
def test_a_disk_that_fills(whole, tmp_path, monkeypatch, posttrain, fill, after):
    path, expected = whole
    out = tmp_path / "out"
    with monkeypatch.context() as full:
        fill(full, Disk(after))
        code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "DiskFull: the disk is full" in errors
    assert "free some space, then run the same command again" in errors
    assert str(out) in errors
    if (out / "ledger.jsonl").exists():
        verify(out / "ledger.jsonl")
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 0, errors
    assert trace(out) == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_real_thing_says_the_same():
    """What the fakes above raise is what a full device raises."""
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left") as caught:
        os.write(fd, b"x")
    os.close(fd)
    assert files.as_disk_full(caught.value) is not None


# --- reward functions ------------------------------------------------------------------------

LATE = """
calls = 0
def score(prompts, completions, answer, **columns):
    global calls
    calls += 1
    good = [(c.count(a) + 0.1 * len(set(c))) / 4 for c, a in zip(completions, answer)]
    return good if calls <= {calls} else {bad}
"""
WRONGS = {
    "raises": ("good[99]", "IndexError: list index out of range"),
    "wrong length": ("good[1:]", "reward reward.py:score returned 5 scores"),
    "nan": ("[float('nan')] * len(good)", "reward reward.py:score returned nan for row 1"),
    "text": ("['well'] * len(good)", "reward reward.py:score returned 'well' for row 1"),
    "none": ("None", "reward reward.py:score returned NoneType"),
}


@pytest.mark.parametrize("name", WRONGS)
def test_a_reward_function_that_misbehaves(world, posttrain, name):
    """It works while it is tried and while the base is measured (scored twice each, to see that
    it is steady) and for two steps, and fails at the third."""

    bad, words = WRONGS[name]
    path = write_recipe(world, recipe(grpo(checkpoint_every=1)))
    out = world / "out"
    (world / "reward.py").write_text(LATE.format(calls=6, bad=bad))
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "TaskError: " in errors
    assert "reward.py:score" in errors
    assert words in errors
    assert tiles(intervals(out, "grpo"), 2), "the two good steps are committed"
    verify(out / "ledger.jsonl")

    # The mended function is another function, and the stage has started with this one.
    (world / "reward.py").write_text(REWARD)
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 2
    assert "ResumeRefused: stage grpo has started" in errors
    assert "tasks.say.reward: " in errors
    code, _, errors = posttrain("run", path, "--out", out, "--accept", "reward")
    assert code == 0, errors
    assert tiles(intervals(out, "grpo"), 4), "from its last checkpoint"
    verify(out / "ledger.jsonl")
    judged = [b for kind, b in rows(out) if kind == "eval"]
    assert len(judged) == 3, "the base was measured again: the scorer is another one"


def test_a_reward_function_that_never_works(world, posttrain):
    """Nothing has started, so the mended function just runs."""
    path, out = write_recipe(world, recipe(grpo())), world / "out"
    (world / "reward.py").write_text(LATE.format(calls=0, bad="good[99]"))
    assert posttrain("run", path, "--out", out)[0] == 2
    (world / "reward.py").write_text(REWARD)
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 0, errors
    assert tiles(intervals(out, "grpo"), 4)


def test_an_edit_of_equal_length_within_a_second_counts(world, posttrain):
    """Python's cached bytecode would miss it."""
    path, out = write_recipe(world, recipe(grpo())), world / "out"
    (world / "reward.py").write_text("def score(prompts, completions, **_):\n    return 1 / 0\n")
    assert posttrain("run", path, "--out", out)[0] == 2
    text = "def score(prompts, completions, **_):\n    return [1.0] * len(completions)\n"
    (world / "reward.py").write_text(text)
    assert posttrain("run", path, "--out", out)[0] == 0
    assert not list(world.glob("**/__pycache__"))
