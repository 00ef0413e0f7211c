"""Learnt judges and critics on the lab's base model: short runs that must learn something."""

import numpy as np
import pytest

from posttrain.batch import pack
from posttrain.composition import BradleyTerry, Dataset
from posttrain.lab.corpus import preference_pairs, taskset, write_rows
from posttrain.lab.settings import CHAINS
from posttrain.lab.tour import BASE
from posttrain.objectives.objective import Objective
from posttrain.protocols import ScalarStart
from posttrain.recipe import Optimizer
from posttrain.sources.dataset import DatasetSource


def turn(role, content):
    return [{"role": role, "content": content}]


def held_out_pairs(setting):
    """Right answers against the habit's, on prompts that no pair for training has."""
    tasks = taskset(setting)
    both = [(t, setting.habit(tasks.entry(t))) for t in tasks.held_out]
    return [
        {
            "prompt": turn("user", t.text),
            "chosen": turn("assistant", str(t.answer)),
            "rejected": turn("assistant", habit),
        }
        for t, habit in both
        if habit != t.answer
    ]


def test_a_reward_model_ranks_pairs_it_never_saw(engine, tmp_path):
    write_rows(tmp_path / "train.jsonl", preference_pairs(CHAINS, seed=0, count=2000))
    write_rows(tmp_path / "test.jsonl", held_out_pairs(CHAINS))
    learner = engine.learner(
        str(BASE),
        name="rm",
        optimizer=Optimizer(lr=1e-3),
        lora=None,
        scalar=ScalarStart(trunk="shared", model=str(BASE)),
    )

    def source(name):
        spec = Dataset(path=name, preference=True)
        renderer = learner.policy.renderer
        return DatasetSource(spec, root=tmp_path, renderer=renderer, context=128, seed=0)

    unseen = source("test.jsonl")
    trajectories = [m.trajectory for g in unseen.draw(unseen.num_groups, step=0) for m in g.members]

    def ranked():
        ends = [s[np.isfinite(s)][-1] for s in learner.policy.scores(trajectories)]
        return np.mean([a > b for a, b in zip(ends[::2], ends[1::2], strict=True)])

    assert ranked() == 0, "a new head says the same of everything"
    objective, train = Objective((BradleyTerry(),)), source("train.jsonl")
    for step in range(40):
        batches = pack(
            train.draw(32, step=step), needs=objective.needs, max_tokens=4096, whole=True
        )
        learner.step(batches, objective, lr_scale=1.0)
    assert unseen.num_groups >= 24
    assert ranked() > 0.8  # chance is 0.5; 0.97 when this was written
    assert learner.policy.version == pytest.approx(40)
