"""A small situation in the lab for every preference method.

    inputs folder, seed ──▶ pairs or labelled answers, and a recipe of one stage

The task is ``chains``: the base model answers one in eight rightly and otherwise drops the last
term. Pairs prefer the right answer to the dropped one. What is preferred is within reach, so every
method has something to choose from, and nothing to be taught. ``apo_down`` has pairs of its own,
whose chosen answers are worse than what the model could say: that is what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from posttrain.core.learner import Optimizer
from posttrain.lab.corpus import preference_pairs, write_rows
from posttrain.lab.settings import CHAINS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.composition import Method, method
from posttrain.parts.preference.presets import Alphapo, Cpo, Irpo, IterativeDpo, OnlineDpo, Orpo
from posttrain.parts.preference.self_play import Spin, TrDpo, Xpo
from posttrain.parts.registry import tag_of
from posttrain.parts.sources.dataset import Dataset
from posttrain.recipe import Budget, Recipe, Stage

Row = Mapping[str, object]
PAIRS = Dataset(path="chains-pairs.jsonl", name="lab-chains-pairs", licence="CC0-1.0")
POOR = Dataset(path="chains-poor.jsonl", name="lab-chains-poor", licence="CC0-1.0")
LABELLED = Dataset(path="chains-labelled.jsonl", name="lab-chains-labelled", licence="CC0-1.0")
STEPS = 40


def labelled_rows(pairs: Iterable[Row]) -> list[Row]:
    """One answer of every pair, good and bad in turn: no prompt has both.

    Example:
        >>> rows = labelled_rows([{"prompt": i, "chosen": "+", "rejected": "-"} for i in (1, 2)])
        >>> [(r["prompt"], r["completion"], r["label"]) for r in rows]
        [(1, '+', True), (2, '-', False)]
    """
    return [
        {
            "prompt": p["prompt"],
            "completion": p["rejected" if i % 2 else "chosen"],
            "label": not i % 2,
        }
        for i, p in enumerate(pairs)
    ]


def poor_pairs(pairs: Iterable[Row]) -> list[Row]:
    """The wrong answer of every pair, preferred to one that is further off.

    Example:
        >>> answer = lambda text: [{"role": "assistant", "content": text}]
        >>> (row,) = poor_pairs([{"prompt": 1, "chosen": answer("4"), "rejected": answer("7")}])
        >>> row["chosen"][0]["content"], row["rejected"][0]["content"]
        ('7', '57')
    """
    return [
        {"prompt": p["prompt"], "chosen": p["rejected"], "rejected": _further_off(p["rejected"])}
        for p in pairs
    ]


def _further_off(answer: object) -> object:
    assert isinstance(answer, list)
    return [{**turn, "content": str(int(turn["content"]) + 50)} for turn in answer]


def situation(method: Method, inputs: Path, *, seed: int, lr: float, groups: int) -> Recipe:
    """A recipe of one stage, its data files written into ``inputs``."""
    pairs = preference_pairs(CHAINS, seed=seed, count=STEPS * 64)
    write_rows(inputs / PAIRS.path, pairs)
    write_rows(inputs / LABELLED.path, labelled_rows(pairs))
    write_rows(inputs / POOR.path, poor_pairs(pairs))
    name = tag_of(method)
    return Recipe(
        name=f"preference-{name}",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={CHAINS.name: CHAINS.tasks},
        measure=Measure(samples=32, max_new_tokens=ANSWER, seed=7),
        stages=(
            Stage(
                name=name,
                intends="reshaping",
                method=method,
                budget=Budget(steps=STEPS),
                groups_per_step=groups,
                optimizer=Optimizer(lr=lr, warmup_steps=5, schedule="linear"),
            ),
        ),
    )


def _of(method: Method, *, lr: float = 5e-4, groups: int = 32) -> Callable[[Path, int], Recipe]:
    return lambda inputs, seed: situation(method, inputs, seed=seed, lr=lr, groups=groups)


_TASKS = (CHAINS.name,)
SITUATIONS: Mapping[str, Callable[[Path, int], Recipe]] = MappingProxyType(
    {
        "dpo": _of(method("dpo", data=PAIRS)),
        "tr_dpo": _of(TrDpo(data=PAIRS, every=10)),
        "aot": _of(method("aot", data=PAIRS, beta=0.1)),
        "aot_unpaired": _of(method("aot_unpaired", data=PAIRS, beta=0.1)),
        "spin": _of(Spin(tasks=_TASKS, max_new_tokens=ANSWER)),
        "spin_twice": _of(Spin(tasks=_TASKS, max_new_tokens=ANSWER, every=STEPS // 2)),
        "xpo": _of(Xpo(tasks=_TASKS, group_size=8, max_new_tokens=ANSWER)),
        "cdpo": _of(method("dpo", data=PAIRS, label_smoothing=0.1)),
        "robust_dpo": _of(method("robust_dpo", data=PAIRS)),
        "ipo": _of(method("ipo", data=PAIRS)),
        "hinge": _of(method("hinge", data=PAIRS)),
        "exo": _of(method("exo", data=PAIRS)),
        "nca": _of(method("nca", data=PAIRS)),
        "sppo": _of(method("sppo", data=PAIRS)),
        "apo": _of(method("apo", data=PAIRS)),
        "apo_down": _of(method("apo", data=POOR, direction="down")),
        "f_dpo": _of(method("f_dpo", data=PAIRS)),
        "f_dpo_forward": _of(method("f_dpo", data=PAIRS, divergence="forward_kl")),
        "f_dpo_alpha": _of(method("f_dpo", data=PAIRS, divergence="alpha", alpha=0.5)),
        "ln_dpo": _of(method("ln_dpo", data=PAIRS)),
        "ld_dpo": _of(method("ld_dpo", data=PAIRS)),
        "wpo": _of(method("wpo", data=PAIRS)),
        "discopop": _of(method("discopop", data=PAIRS, tau=0.2)),
        "irpo": _of(Irpo(data=PAIRS)),
        "orpo": _of(Orpo(data=PAIRS)),
        "cpo": _of(Cpo(data=PAIRS)),
        "simpo": _of(method("simpo", data=PAIRS)),
        "alphapo": _of(Alphapo(data=PAIRS)),
        "kto": _of(method("kto", data=LABELLED), groups=64),
        "kto_on_pairs": _of(method("kto", data=PAIRS)),
        "bco": _of(method("bco", data=LABELLED), groups=64),
        "online_dpo": _of(OnlineDpo(tasks=_TASKS, group_size=8, max_new_tokens=ANSWER)),
        "iterative_dpo": _of(IterativeDpo(tasks=_TASKS, group_size=8, max_new_tokens=ANSWER)),
    }
)
"""A recipe per method, from a folder for its inputs and a seed.

DiscoPOP has a larger tau than its paper's: from its own reference the paper's leads the wrong way.
"""
