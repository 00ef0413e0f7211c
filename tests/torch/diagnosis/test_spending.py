"""What a stage is expected to cost, in tokens."""

import json

import pytest

from posttrain.diagnosis.spending import expected
from posttrain.parts.policy.presets import Grpo
from posttrain.parts.supervised.rejection import Raft
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.testing import tiny_model


def test_only_what_is_kept_of_a_group_goes_through_a_training_step(tmp_path):
    """Of a group of 8 all are trained on, or the best one; no answer is longer than allowed."""
    rows = [json.dumps({"prompt": f"1+{i}=", "answer": str(1 + i)}) for i in range(4)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(rows), encoding="utf-8")
    folder = tiny_model(tmp_path / "m", seed=1)

    def cost(method, length):
        recipe = Recipe(
            name="r",
            model=str(folder),
            tasks={"t": JsonlTasks(path="tasks.jsonl", reward="exact", held_out=1)},
            stages=(Stage(name="s", method=method, budget=Budget(steps=2), groups_per_step=3),),
        )
        return expected(recipe, root=tmp_path, lengths={"t": length})

    rollouts = {"tasks": ("t",), "group_size": 8, "max_new_tokens": 10}
    groups, length = 2 * 3, 5.0
    practised = cost(Grpo(**rollouts), length)
    imitated = cost(Raft(**rollouts, best=1, at_least=1.0), length)
    sampled = groups * 8 * length
    prompts = practised - 2 * sampled
    assert prompts > 0
    assert imitated == pytest.approx(prompts + sampled * (1 + 1 / 8))
    assert cost(Grpo(**rollouts), 1000.0) == pytest.approx(prompts + 2 * groups * 8 * 10)
