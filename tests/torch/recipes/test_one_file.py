"""The one-file GRPO and the library are the same algorithm: token for token, loss for loss."""

import importlib.util
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from posttrain.core.events import StepDone
from posttrain.core.learner import Optimizer
from posttrain.engines.local.engine import LocalEngine
from posttrain.lab.settings import PRODUCTS
from posttrain.parts.policy.presets import Grpo
from posttrain.protocols import PureStream
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.build import StageBuilder
from posttrain.run.journal import Journal
from posttrain.run.ledger import Ledger
from posttrain.run.plan import make_plan
from posttrain.run.stage_folder import StageWriter
from posttrain.tasks.jsonl import JsonlTasks, JsonlTaskSet
from posttrain.tasks.reasoning_gym import ReasoningGymTaskSet
from posttrain.training.stage import run_stage

FILE = Path(__file__).parents[3] / "recipes/one_file_grpo.py"
UNEVEN = JsonlTasks(path="rows.jsonl", reward="reward.py:reward", held_out=2)


@pytest.fixture(scope="module")
def one_file():
    spec = importlib.util.spec_from_file_location("one_file_grpo", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up here
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@dataclass
class Trace:
    """What a run did, and the weights it ended with."""

    seed: int = 0
    losses: list = field(default_factory=list)
    norms: list = field(default_factory=list)
    rewards: list = field(default_factory=list)
    answers: list = field(default_factory=list)
    weights: dict = field(default_factory=dict)


class Recorder(PureStream):
    """A source that remembers the answers it drew, in the order the updates consume them."""

    def __init__(self, source, updates):
        self.source, self.updates, self.answers = source, updates, []

    def draw(self, num_groups, *, step):
        groups = self.source.draw(num_groups, step=step)
        for update in range(self.updates):
            trajectories = [m.trajectory for g in groups[update :: self.updates] for m in g.members]
            self.answers.append([t.tokens[t.prompt_length :].tolist() for t in trajectories])
        return groups


def composed(folder, spec, taskset, settings, *, root, out) -> Trace:
    """The same run through the library's own loop, in micro-batches smaller than a step."""
    method = Grpo(
        tasks=(taskset.name,),
        group_size=settings.group_size,
        max_new_tokens=settings.max_new_tokens,
        clip_low=settings.clip,
        clip_high=settings.clip,
        aggregate=settings.aggregate,
    )
    stage = Stage(
        name="same",
        method=method,
        budget=Budget(steps=settings.steps),
        optimizer=Optimizer(lr=settings.lr, max_grad_norm=settings.max_grad_norm),
        groups_per_step=settings.prompts_per_draw,
        updates_per_draw=settings.updates_per_draw,
        micro_batch_tokens=150,
    )
    recipe = Recipe(name="same", model=str(folder), tasks={taskset.name: spec}, stages=(stage,))
    (planned,) = make_plan(recipe, root=root, base="-").stages
    engine = LocalEngine(device=torch.device("cpu"))
    learner = engine.learner(str(folder), name="same", optimizer=stage.optimizer, lora=None)
    builder = StageBuilder(
        root=root,
        seed=settings.seed,
        tasksets={taskset.name: taskset},
        policy=lambda ref: pytest.fail(f"GRPO without a leash asked for {ref}"),
    )
    parts = builder.parts(planned, learner)
    recorder = Recorder(parts.source, settings.updates_per_draw)
    trace = Trace(seed=parts.source.seed)

    def observe(event):
        if not isinstance(event, StepDone):
            return  # an alarm about a tiny model's answers
        trace.losses.append(event.metrics["loss"])
        trace.norms.append(event.metrics["grad_norm"])
        trace.rewards.append(event.metrics["reward"])

    journal = Journal(
        StageWriter(out / "stage", Ledger.open(out / "ledger.jsonl")),
        stage="same",
        identity=planned.identity,
        facts={},
    )
    run_stage(
        stage,
        replace(parts, source=recorder),
        steps=settings.steps,
        journal=journal,
        observe=observe,
    )
    trace.answers = recorder.answers
    trace.weights = dict(learner.policy.model.causal.named_parameters())
    return trace


def by_hand(one_file, folder, taskset, settings) -> Trace:
    trace = Trace()

    def watch(**row):
        trace.losses.append(row["loss"])
        trace.norms.append(row["grad_norm"])
        trace.rewards.append(row["reward"])
        trace.answers.append(row["answers"])

    model, tokenizer = one_file.load(folder)
    one_file.train(model, tokenizer, taskset, settings, watch=watch)
    trace.weights = dict(model.named_parameters())
    return trace


@pytest.fixture(scope="module")
def products():
    return ReasoningGymTaskSet("products", PRODUCTS.tasks, chat=True)


@pytest.fixture
def uneven(tmp_path):
    """Prompts of many lengths, and a reward that a random model varies in."""
    rows = [{"prompt": "say something " * (1 + i % 4) + str(i)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n"
        "    return [sum(c.isalpha() for c in text) / 8 for text in completions]\n"
    )
    return JsonlTaskSet("uneven", UNEVEN, root=tmp_path, chat=True)


def agree(ours: Trace, theirs: Trace, start: dict) -> None:
    assert ours.answers == theirs.answers
    assert ours.rewards == pytest.approx(theirs.rewards, rel=1e-12)
    # Losses are means of advantage-weighted ratios that nearly cancel. A ratio is exp of the
    # difference of two log-probs of size 1 to 8, each rounded to 1e-7 of that by single precision.
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-6)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-5)
    assert ours.weights.keys() == theirs.weights.keys()
    apart, moved = (
        torch.cat([(ours.weights[n] - other[n]).detach().flatten() for n in start])
        for other in (theirs.weights, start)
    )
    assert moved.abs().max() > 1e-3, "weights must move by far more than they may differ"
    assert apart.norm() < 1e-3 * moved.norm()
    # AdamW divides a gradient by its own size, so rounding shows in full where it is almost zero.
    assert (apart.abs() > 1e-5).float().mean() < 1e-3
    assert apart.abs().max() < 1e-4


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_one_file_is_the_library_on_the_lab_base(
    one_file, products, tmp_path, aggregate, updates
):
    settings = one_file.Settings(
        steps=6, prompts_per_draw=8, updates_per_draw=updates, aggregate=aggregate, seed=3
    )
    start = dict(one_file.load(one_file.BASE)[0].named_parameters())
    theirs = composed(
        one_file.BASE, PRODUCTS.tasks, products, settings, root=tmp_path, out=tmp_path
    )
    # A stage has its own stream of randomness, derived from the recipe's seed and its name.
    settings = replace(settings, seed=theirs.seed)
    agree(by_hand(one_file, one_file.BASE, products, settings), theirs, start)
    assert len(theirs.losses) == 6
    if updates == 2:
        assert max(abs(x) for x in theirs.losses) > 1e-3, "the trace must say something"


def test_the_one_file_is_the_library_on_prompts_of_many_lengths(
    one_file, uneven, tiny_folder, tmp_path
):
    settings = one_file.Settings(
        steps=6, prompts_per_draw=4, group_size=5, max_new_tokens=9, aggregate="sequence_mean"
    )
    start = dict(one_file.load(tiny_folder)[0].named_parameters())
    theirs = composed(tiny_folder, UNEVEN, uneven, settings, root=tmp_path, out=tmp_path)
    ours = by_hand(one_file, tiny_folder, uneven, replace(settings, seed=theirs.seed))
    agree(ours, theirs, start)
    assert len({len(a) for step in ours.answers for a in step}) > 2


def test_the_one_file_reads_nothing_of_the_machinery_and_is_short():
    source = FILE.read_text()
    ours = [line.split()[1] for line in source.splitlines() if line.startswith("from posttrain")]
    assert set(ours) <= {
        "posttrain.lab.settings",
        "posttrain.core.task",
        "posttrain.tasks.reasoning_gym",
    }
    assert source.count("\n") <= 200


def test_the_one_file_learns(one_file, products):
    rewards = []
    model, tokenizer = one_file.load(one_file.BASE)
    torch.set_num_threads(1)
    one_file.train(
        model,
        tokenizer,
        products,
        one_file.Settings(),
        watch=lambda **row: rewards.append(row["reward"]),
    )
    assert sum(rewards[:4]) / 4 < 0.2
    assert sum(rewards[-8:]) / 8 > 0.8
