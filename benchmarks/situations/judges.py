"""Learnt judges in situations in which they must be worth asking, on the lab's base model.

    pairs or labelled answers ──▶ reward model ──asked by──▶ GRPO on products
    careless step-by-step answers ──SFT──▶ walker ──math_shepherd──▶ process model
                                              └────────asked by──────────▲──▶ GRPO on walks

The verifier judges only what is measured: every gain went through the judge. A judge is the last
stage but one, and its own policy is not measured against anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from types import MappingProxyType

from posttrain.core.learner import Optimizer
from posttrain.lab.corpus import preference_pairs, taskset, write_rows
from posttrain.lab.settings import CALCULATE, PRODUCTS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.base import Signal
from posttrain.parts.composition import Method, method
from posttrain.parts.policy.presets import Grpo
from posttrain.parts.rewards.judges import RewardModel
from posttrain.parts.rewards.presets import MathShepherd, Orm, OrmOnRollouts, Prm
from posttrain.parts.rewards.process import ProcessReward
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Sft
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.tasks.base import TaskSetSpec
from posttrain.tasks.jsonl import JsonlTasks
from situations.preference import labelled_rows

WALK = 10
"""Longest answer in steps, in tokens."""

CARELESS = 0.35
"""Chance of a slip at each step of a demonstration but the first."""

TIMES = 4
"""How often each question is demonstrated."""

WALKS = "walks"
"""The terms of a calculation, to be listed line by line. All of them are verified."""

_LICENCE = "CC0-1.0"
PAIRS = Dataset(path="products-pairs.jsonl", name="lab-products-pairs", licence=_LICENCE)
LABELLED = Dataset(path="products-labelled.jsonl", name="lab-products-labelled", licence=_LICENCE)
WALKED = Dataset(path="walks.jsonl", name="lab-walks", licence=_LICENCE)
STEPPED = Dataset(path="walks-labelled.jsonl", name="lab-walks-labelled", licence=_LICENCE)


def walk(terms: Sequence[str], rng: Random) -> tuple[list[str], list[bool]]:
    """The terms one by one, with slips, and whether all is right so far.

    Who slips says a term twice, and stays behind from then on.

    Example:
        >>> walk(["3", "4", "2"], Random(0)), walk(["3", "4", "2"], Random(1))
        ((['3', '4', '2'], [True, True, True]), (['3', '3', '4'], [True, False, False]))
    """
    steps, at = [terms[0]], 0
    for _ in terms[1:]:
        at += rng.random() >= CARELESS
        steps.append(terms[at])
    return steps, [steps[: k + 1] == [*terms[: k + 1]] for k in range(len(terms))]


def _walks(*, seed: int) -> Iterator[tuple[str, str, list[str], list[bool]]]:
    """(question, answer, steps, labels) over training questions of ``calculate``."""
    rng = Random(seed)
    for question in dict.fromkeys(t.text for t in taskset(CALCULATE).train):
        terms = re.findall(r"\d+", question)
        yield question, "\n".join(terms), *walk(terms, rng)


def write_inputs(inputs: Path, *, seed: int) -> None:
    """Every file that a situation here may name."""
    pairs = preference_pairs(PRODUCTS, seed=seed, count=1000)
    write_rows(inputs / PAIRS.path, pairs)
    write_rows(inputs / LABELLED.path, labelled_rows(pairs))
    walks = list(_walks(seed=seed))
    write_rows(inputs / "tasks.jsonl", ({"prompt": [_user(q)], "answer": a} for q, a, *_ in walks))
    # The last questions are held out, and no demonstration shows them. The others come again and
    # again with other slips, which would else be learnt by heart.
    shown = [w for n in range(TIMES) for w in list(_walks(seed=seed + 1000 * n))[:-64]]
    write_rows(
        inputs / WALKED.path,
        (
            {"prompt": [_user(q)], "completion": [{"role": "assistant", "content": "\n".join(s)}]}
            for q, _, s, _ in shown
        ),
    )
    write_rows(
        inputs / STEPPED.path,
        ({"prompt": [_user(q)], "completions": s, "labels": v} for q, _, s, v in shown),
    )


def _user(question: str) -> Mapping[str, str]:
    return {"role": "user", "content": question}


def stage(
    name: str, method: Method, *, steps: int, groups: int, lr: float = 3e-4, init: str = "previous"
) -> Stage:
    """A stage whose learning rate falls."""
    return Stage(
        name=name,
        method=method,
        init=init,
        budget=Budget(steps=steps),
        groups_per_step=groups,
        optimizer=Optimizer(lr=lr, schedule="linear"),
    )


def asking(judge: Signal, *, tasks: str, longest: int, init: str) -> Stage:
    """GRPO that hears of the verifier only through its judge."""
    grpo = Grpo(tasks=(tasks,), max_new_tokens=longest, rewards=(judge,))
    return stage("asking", grpo, steps=40, groups=16, init=init)


_CAREFUL = JsonlTasks(path="tasks.jsonl", reward="exact", held_out=32)
_WALKER = stage("walker", Sft(data=WALKED), steps=200, groups=64, lr=1e-3)
_AS_PROBABILITY = RewardModel(model="judge", squash="sigmoid")
_ON_PRODUCTS = asking(_AS_PROBABILITY, tasks=PRODUCTS.name, longest=ANSWER, init="base")
_ON_WALKS = asking(ProcessReward(model="judge"), tasks=WALKS, longest=WALK, init="walker")
_OWN = OrmOnRollouts(tasks=(PRODUCTS.name,), max_new_tokens=ANSWER)
_SHEPHERD = MathShepherd(tasks=(WALKS,), max_new_tokens=WALK, group_size=2, labels="hard")


def _of(task: str, spec: TaskSetSpec, *stages: Stage) -> Callable[[Path, int], Recipe]:
    def situation(inputs: Path, seed: int) -> Recipe:
        write_inputs(inputs, seed=seed)
        return Recipe(
            name="judges",
            model=str(BASE),
            seed=seed,
            threads=1,
            tasks={task: spec},
            measure=Measure(samples=32, max_new_tokens=WALK, seed=7),
            stages=stages,
        )

    return situation


def _products(judge: Stage) -> Callable[[Path, int], Recipe]:
    return _of(PRODUCTS.name, PRODUCTS.tasks, judge, _ON_PRODUCTS)


def _steps(judge: Stage) -> Callable[[Path, int], Recipe]:
    return _of(WALKS, _CAREFUL, _WALKER, judge, _ON_WALKS)


SITUATIONS: Mapping[str, Callable[[Path, int], Recipe]] = MappingProxyType(
    {
        "bradley_terry": _products(
            stage("judge", method("bradley_terry", data=PAIRS), steps=40, groups=32)
        ),
        "orm": _products(stage("judge", Orm(data=LABELLED), steps=60, groups=32)),
        "orm_on_rollouts": _products(stage("judge", _OWN, steps=60, groups=16)),
        "prm": _steps(stage("judge", Prm(data=STEPPED), steps=100, groups=64, lr=3e-3)),
        "math_shepherd": _steps(stage("judge", _SHEPHERD, steps=200, groups=64, lr=3e-3)),
    }
)
"""A recipe per judge, from a folder for its inputs and a seed."""
