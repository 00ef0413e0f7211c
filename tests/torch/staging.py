"""A stage of any method on a tiny model, run in this process: for resume and for identities."""

import json
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.errors import Interrupted
from posttrain.core.events import StepDone
from posttrain.core.learner import Optimizer
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.build import StageBuilder
from posttrain.run.journal import Journal
from posttrain.run.ledger import Ledger
from posttrain.run.plan import make_plan
from posttrain.run.stage_folder import StageWriter
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.training.stage import run_stage

REWARD = (
    "def reward(prompts, completions, **columns):\n"
    "    return [float(sum(map(ord, c)) % 2) for c in completions]\n"
)


@dataclass(frozen=True)
class World:
    """Files, an engine and a model folder."""

    root: Path
    engine: object
    model: Path

    def plan(self, method, *, steps=4, lr=1e-2, **options):
        stage = Stage(
            name="s",
            method=method,
            budget=Budget(steps=steps),
            optimizer=Optimizer(lr=lr),
            checkpoint_every=1,
            **{"groups_per_step": 3, **options},
        )
        tasks = {"rows": JsonlTasks(path="rows.jsonl", reward="reward.py:reward", held_out=2)}
        recipe = Recipe(name="r", model=str(self.model), tasks=tasks, stages=(stage,))
        (planned,) = make_plan(recipe, root=self.root, base="-").stages
        return planned

    def run(self, method, out, *, steps=4, stop_after=None, **options):
        """(learner, metrics of every step taken). The folder decides where it goes on."""
        planned = self.plan(method, steps=steps, **options)
        spec = JsonlTasks(path="rows.jsonl", reward="reward.py:reward", held_out=2)
        taskset = spec.build("rows", root=self.root, chat=True)
        learner = self.engine.learner(
            str(self.model),
            name="s",
            optimizer=planned.spec.optimizer,
            lora=planned.spec.lora,
            moving=planned.composition.moving,
        )
        builder = StageBuilder(
            root=self.root,
            seed=0,
            tasksets={"rows": taskset},
            policy=lambda ref: self.engine.policy(str(self.model)),
        )
        seen = []
        folder = self.root / out
        journal = Journal(
            StageWriter(folder / "stage", Ledger.open(folder / "ledger.jsonl")),
            stage="s",
            identity=planned.identity,
            facts={},
        )
        try:
            run_stage(
                planned.spec,
                builder.parts(planned, learner),
                steps=steps,
                journal=journal,
                observe=lambda event: seen.append(event) if isinstance(event, StepDone) else None,
                stop=lambda: stop_after is not None and len(seen) >= stop_after,
            )
        except Interrupted:
            assert stop_after is not None
        return learner, [event.metrics for event in seen]


def make_world(root, engine, model):
    rows = [
        {"prompt": f"say {i}", "completion": "abcdef"[: 3 + i % 3], "answer": "abcdef"[: 3 + i % 3]}
        for i in range(12)
    ]
    pairs = [
        {"prompt": f"say {i}", "chosen": "abcd"[: 1 + i % 4], "rejected": "xyz"[: 1 + i % 3]}
        for i in range(12)
    ]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    (root / "reward.py").write_text(REWARD)
    return World(root, engine, model)


def untimed(metrics):
    return [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in metrics]


def check_resume(world, method, *, steps=4, stop_after=2, **options):
    """A stage stopped in the middle ends where the undisturbed one ends, bit for bit."""
    import torch

    straight, metrics = world.run(method, "straight", steps=steps, **options)
    _, first = world.run(method, "cut", steps=steps, stop_after=stop_after, **options)
    assert len(first) == stop_after
    resumed, second = world.run(method, "cut", steps=steps, **options)
    assert untimed(first + second) == untimed(metrics)
    for policy in ("policy", "moving"):
        ours, theirs = getattr(straight, policy), getattr(resumed, policy)
        if ours is None:
            continue
        expected = dict(ours.model.causal.named_parameters())
        for name, weight in theirs.model.causal.named_parameters():
            assert torch.equal(weight, expected[name]), (policy, name)
    return straight, metrics
