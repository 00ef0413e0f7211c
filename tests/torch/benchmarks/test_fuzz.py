"""A fast part of the fuzz: nothing ends in a traceback, hangs, or is done with nothing done."""

from __future__ import annotations

import itertools
import os
import random

import pytest
from fuzz import data, folders, options, recipes, world
from fuzz.frame import Tally, Trial, run_trials
from fuzz.mutate import damaged, mutated

from posttrain.core.config import convert
from posttrain.core.errors import ConfigError
from posttrain.engines.local.engine import LocalEngine
from posttrain.recipe import Recipe
from posttrain.run.preview import preview


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The valid inputs."""
    place = tmp_path_factory.mktemp("fuzz")
    world.build(place)
    return place


def faults(trials):
    tally = Tally()
    run_trials(trials, tally)
    assert sum(tally.outcomes.values()) >= 8
    return tally.faults


def test_the_inputs_to_start_from_are_valid(folder):
    valid = {**world.methods(), **world.shipped()}
    assert len(valid) > 90
    for name, tree in valid.items():
        assert preview(convert(tree, Recipe, origin=name), root=folder)


def test_changed_recipes(folder):
    assert faults(recipes.trials(folder, num=60, seed=1)) == []


def test_changed_data_files(folder):
    renderer = LocalEngine(device="cpu", dtype="float32").policy(str(folder / "base")).renderer
    assert faults(data.trials(folder, num=100, seed=1, renderer=renderer)) == []


def test_changed_model_folders(folder):
    assert faults(folders.trials(folder, num=8, seed=1)) == []


CASES = (
    "measure.sampling.stop",
    "measure.seed=3",
    "seed=3",
    "max_age=1",
    "schedule='linear'",
    "activation_checkpointing",
    "sampling.temperature=0.9",
)


def test_what_plans_with_an_option_alone_runs(folder):
    tree = world.methods()["grpo"]
    changed = options.single_changes(tree, options.GROUPS)
    chosen = [(w, t) for w, t in changed if any(case in w for case in CASES)]
    pairs = itertools.islice(options.pairs(tree), 20, 66, 15)
    trials = [
        Trial(n, words, options.Both(made, folder, n))
        for n, (words, made) in enumerate([*chosen, *pairs])
    ]
    assert faults(trials) == []


# --- the frame sees what it should -----------------------------------------------------------


def endless():
    return endless()


@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        (lambda: True, "done"),
        (lambda: None, "nothing"),
        (lambda: 1 / 0, "traceback"),
        (endless, "traceback"),
        (lambda: os.chdir("/") or (_ for _ in ()).throw(SystemExit(0)), "traceback"),
        (lambda: (_ for _ in ()).throw(ConfigError("said")), "refused"),
    ],
)
def test_outcomes(call, outcome):
    tally, here = Tally(), os.getcwd()
    run_trials([Trial(0, "made", call)], tally)
    assert tally.outcomes == {outcome: 1}
    assert bool(tally.faults) == (outcome not in ("done", "refused"))
    assert os.getcwd() == here


def test_a_hang_is_seen(monkeypatch):
    monkeypatch.setattr("fuzz.frame.LIMIT", 1)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    tally = Tally()
    run_trials([Trial(0, "made", lambda: next(i for i in itertools.count() if i < 0))], tally)
    assert tally.outcomes == {"hang": 1}


def test_a_number_names_an_input():
    tree = world.recipe({"name": "sft"})
    first, again = (mutated(tree, random.Random("7"), times=3) for _ in range(2))
    assert repr(first) == repr(again)
    assert damaged(b"abc", random.Random("7")) == damaged(b"abc", random.Random("7"))
    assert tree == world.recipe({"name": "sft"}), "the valid one is not touched"
