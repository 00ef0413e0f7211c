"""Learnt judges and critics on the lab's base model: short runs that must learn something."""

import numpy as np
from situations.judges import STEPPED, write_inputs

from posttrain.core.learner import Optimizer
from posttrain.core.trajectory import Column
from posttrain.lab.corpus import preference_pairs, taskset, write_rows
from posttrain.lab.settings import CHAINS
from posttrain.lab.tour import BASE
from posttrain.numerics.batch import pack
from posttrain.parts.rewards.reward_models import BradleyTerry, StepBCE
from posttrain.parts.rewards.steps import Steps
from posttrain.parts.sources.dataset import Dataset, DatasetRows
from posttrain.protocols import ScalarStart
from posttrain.training.objective import StageObjective


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


def judge_from(engine, lr):
    """A learner with a scalar head on the base model's own trunk."""
    start = ScalarStart(trunk="shared", model=str(BASE))
    optimizer = Optimizer(lr=lr)
    return engine.learner(str(BASE), name="j", optimizer=optimizer, lora=None, scalar=start)


def train(learner, source, term, *, steps, groups):
    objective = StageObjective((term,))
    for step in range(steps):
        drawn = source.draw(groups, step=step)
        batches = pack(drawn, needs=objective.needs, max_tokens=8192, whole=True)
        learner.step(batches, objective, lr_scale=1.0)


def test_a_process_model_finds_slips_in_answers_it_never_saw(engine, tmp_path):
    """Answers of three steps; from the first slip on every step is wrong."""
    write_inputs(tmp_path, seed=0)
    lines = (tmp_path / STEPPED.path).read_text().splitlines()
    (tmp_path / "unseen.jsonl").write_text("\n".join(lines[:128]) + "\n")
    asked = {line.partition('"completions"')[0] for line in lines[:128]}
    rest = [line for line in lines if line.partition('"completions"')[0] not in asked]
    (tmp_path / "train.jsonl").write_text("\n".join(rest) + "\n")
    learner = judge_from(engine, 3e-3)

    def source(name):
        spec = Dataset(path=name, steps=Steps())
        renderer = learner.policy.renderer
        return DatasetRows(spec, root=tmp_path, renderer=renderer, context=128, seed=0)

    train(learner, source("train.jsonl"), StepBCE(), steps=90, groups=64)
    members = [m for g in source("unseen.jsonl").draw(128, step=0) for m in g.members]
    scores = np.concatenate(learner.policy.scores([m.trajectory for m in members]))
    labels = np.concatenate([m.columns[Column.STEP_LABEL] for m in members])
    ends = labels >= 0
    assert ends.sum() == 3 * 128
    right = labels[ends] > 0.5
    assert 0.5 < right.mean() < 0.75, "always saying right would be worth this much"
    assert ((scores[ends] > 0) == right).mean() > 0.85  # 0.95 when this was written


def test_a_reward_model_ranks_pairs_it_never_saw(engine, tmp_path):
    write_rows(tmp_path / "train.jsonl", preference_pairs(CHAINS, seed=0, count=2000))
    write_rows(tmp_path / "test.jsonl", held_out_pairs(CHAINS))
    learner = judge_from(engine, 1e-3)

    def source(name):
        spec = Dataset(path=name, preference=True)
        renderer = learner.policy.renderer
        return DatasetRows(spec, root=tmp_path, renderer=renderer, context=128, seed=0)

    unseen = source("test.jsonl")
    trajectories = [m.trajectory for g in unseen.draw(unseen.num_groups, step=0) for m in g.members]

    def ranked():
        ends = [s[np.isfinite(s)][-1] for s in learner.policy.scores(trajectories)]
        return np.mean([a > b for a, b in zip(ends[::2], ends[1::2], strict=True)])

    assert ranked() == 0, "a new head says the same of everything"
    train(learner, source("train.jsonl"), BradleyTerry(), steps=40, groups=32)
    assert unseen.num_groups >= 24
    assert ranked() > 0.8  # chance is 0.5; 0.97 when this was written
