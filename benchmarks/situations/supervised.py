"""A small situation in the lab for every supervised, rejection-sampling and offline method.

    inputs folder, seed ──▶ data files, and a recipe of one stage that should move one task

``products`` is answered rightly about one time in ten, by a habit otherwise: there is something to
learn, and something to choose from. ``calculate`` is known well, and can only be sharpened.
Settings are chosen to learn quickly; they are no recommendations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from types import MappingProxyType

from posttrain.core.learner import Optimizer
from posttrain.core.sampling import SamplingSpec
from posttrain.lab.corpus import demonstrations, taskset, write_rows
from posttrain.lab.settings import CALCULATE, PRODUCTS, Setting
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.composition import Method, method
from posttrain.parts.offline.presets import ALol, Awr, RGold
from posttrain.parts.registry import tag_of
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Asft, Sft, WeightedSft
from posttrain.parts.supervised.rejection import Raft, RestEm, Rft, Ssd, Star
from posttrain.recipe import Budget, Recipe, Stage

Situation = Callable[[Path, int], Recipe]
STEPS = 40


def demonstrated(
    method: Callable[[Dataset], Method], inputs: Path, seed: int, *, updates: int = 1
) -> Recipe:
    """Right answers to ``products``."""
    rows = (d.row for d in demonstrations(PRODUCTS, seed=seed, count=1000))
    write_rows(inputs / "demonstrations.jsonl", rows)
    data = Dataset(path="demonstrations.jsonl", name="lab-demonstrations", licence="CC0-1.0")
    return _recipe(PRODUCTS, method(data), seed=seed, updates=updates)


def logged(method: Callable[[Dataset], Method], inputs: Path, seed: int) -> Recipe:
    """Answers to ``products``, half of them the habit's, with the reward that each got."""
    rng, tasks = Random(seed), taskset(PRODUCTS)
    assert PRODUCTS.habit is not None
    rows = []
    for task in tasks.train:
        habit = rng.random() < 0.5
        answer = PRODUCTS.habit(tasks.entry(task)) if habit else str(task.answer)
        reward = float(answer == task.answer)
        turns = [("user", task.text), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"messages": messages, "score": reward})
    write_rows(inputs / "logged.jsonl", rows)
    return _recipe(PRODUCTS, method(_log()), seed=seed)


def own_answers(method: Method, inputs: Path, seed: int) -> Recipe:
    """No data: the policy answers the prompts of ``products`` itself."""
    return _recipe(PRODUCTS, method, seed=seed)


def sharpened(inputs: Path, seed: int) -> Recipe:
    """Own answers, unverified, to ``calculate``, which the base answers rightly when it is sampled
    with care. Measured by careless sampling, which is what learning from careful samples mends."""
    ssd = Ssd(tasks=(CALCULATE.name,), max_new_tokens=ANSWER)
    return _recipe(CALCULATE, ssd, seed=seed, lr=3e-4, sampling=SamplingSpec(temperature=2.0))


def _log() -> Dataset:
    """One column serves as reward and as weight."""
    return Dataset(
        path="logged.jsonl", name="lab-log", licence="CC0-1.0", reward="score", weight="score"
    )


def _recipe(
    setting: Setting,
    method: Method,
    *,
    seed: int,
    lr: float = 1e-3,
    sampling: SamplingSpec = SamplingSpec(),
    updates: int = 1,
) -> Recipe:
    return Recipe(
        name=f"catalogue-{tag_of(method)}",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={setting.name: setting.tasks},
        measure=Measure(samples=32, max_new_tokens=ANSWER, sampling=sampling, seed=7),
        stages=(
            Stage(
                name="learn",
                method=method,
                budget=Budget(steps=STEPS),
                groups_per_step=32 * updates,
                updates_per_draw=updates,
                optimizer=Optimizer(lr=lr, warmup_steps=4),
            ),
        ),
    )


TASKS = (PRODUCTS.name,)
# The base's likeliest answers follow the habit, so the paper's greedy sampling finds none to keep.
SAMPLED = Star(tasks=TASKS, max_new_tokens=ANSWER, sampling=SamplingSpec())

SITUATIONS: Mapping[str, Situation] = MappingProxyType(
    {
        "sft": partial(demonstrated, lambda d: Sft(data=d)),
        "dft": partial(demonstrated, lambda d: method("dft", data=d)),
        "asft": partial(demonstrated, lambda d: Asft(data=d)),
        "probability_sft": partial(
            demonstrated, lambda d: method("probability_sft", data=d, alpha=0.5)
        ),
        "psft": partial(demonstrated, lambda d: method("psft", data=d), updates=8),
        "weighted_sft": partial(logged, lambda d: WeightedSft(data=d)),
        "awr": partial(logged, lambda d: Awr(data=d, beta=0.25)),
        "a_lol": partial(logged, lambda d: ALol(data=d)),
        "r_gold": partial(logged, lambda d: RGold(data=d)),
        "rft": partial(own_answers, Rft(tasks=TASKS, max_new_tokens=ANSWER)),
        "raft": partial(own_answers, Raft(tasks=TASKS, max_new_tokens=ANSWER)),
        "star": partial(own_answers, SAMPLED),
        "rest_em": partial(own_answers, RestEm(tasks=TASKS, max_new_tokens=ANSWER)),
        "ssd": sharpened,
    }
)
"""By the name of the method."""
