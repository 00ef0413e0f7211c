"""Every option alone at another legal value, and common ones in pairs: what plans must run."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import inspect, structs

from fuzz import world
from fuzz.frame import Trial
from fuzz.recipes import is_small, run_recipe
from posttrain.core.config import Config, convert
from posttrain.core.errors import PosttrainError
from posttrain.core.learner import Lora, Optimizer
from posttrain.core.monitors import Monitors
from posttrain.core.sampling import SamplingSpec
from posttrain.measure.spec import Measure
from posttrain.parts.registry import known
from posttrain.recipe import Recipe, Stage
from posttrain.run.preview import preview

Place = tuple[object, ...]
STAGES = next(f.encode_name for f in structs.fields(Recipe) if f.type == tuple[Stage, ...])
STAGE: Place = (STAGES, 0)
TRIED = 2
"""Methods with which a value of an option that many have is tried."""

SKIPPED = frozenset(
    {"threads", "name", "model", "device", "remote_code", "method", "path", "tasks", STAGES}
)
"""Options whose other values name things outside: models, devices, files, cores."""

GROUPS: Sequence[tuple[Place, type[Config]]] = (
    ((), Recipe),
    (("measure",), Measure),
    (("measure", "sampling"), SamplingSpec),
    (STAGE, Stage),
    ((*STAGE, "optimizer"), Optimizer),
    ((*STAGE, "monitors"), Monitors),
    ((*STAGE, "lora"), Lora),
)


def other_values(kind: inspect.Type, default: object) -> list[object]:
    """Legal values of a type other than the default, small ones first."""
    if isinstance(kind, inspect.UnionType):
        return [v for member in kind.types for v in other_values(member, default)]
    if isinstance(kind, inspect.BoolType):
        values: list[object] = [True, False]
    elif isinstance(kind, inspect.NoneType):
        values = [None]
    elif isinstance(kind, inspect.LiteralType):
        values = list(kind.values)
    elif isinstance(kind, inspect.EnumType):
        values = [member.value for member in kind.cls]
    elif isinstance(kind, inspect.IntType):
        values = [v for v in (0, 1, 2, 3) if _inside(v, kind)]
    elif isinstance(kind, inspect.FloatType):
        values = [v for v in (0.0, 0.25, 0.9, 1.0, 2.0) if _inside(v, kind)]
    elif isinstance(kind, inspect.VarTupleType):
        values = [[], *([v] for v in other_values(kind.item_type, None)[:2])]
    elif isinstance(kind, inspect.TupleType):
        inner = [other_values(item, None)[:2] for item in kind.item_types]
        values = [list(chosen) for chosen in itertools.product(*inner)][:3]
    elif isinstance(kind, inspect.StrType):
        values = ["a"]
    elif isinstance(kind, inspect.StructType):
        values = [{kind.tag_field: kind.tag} if kind.tag_field else {}]
    else:
        values = []
    return [v for v in values if v != default]


def _inside(value: float, kind: inspect.IntType | inspect.FloatType) -> bool:
    checks = (
        kind.ge is None or value >= kind.ge,
        kind.gt is None or value > kind.gt,
        kind.le is None or value <= kind.le,
        kind.lt is None or value < kind.lt,
    )
    return all(checks)


def single_changes(
    tree: world.Tree, groups: Sequence[tuple[Place, type[Config]]]
) -> Iterator[tuple[str, world.Tree]]:
    """The recipe with one option set to another value."""
    for place, kind in groups:
        info = inspect.type_info(kind)
        assert isinstance(info, inspect.StructType)
        for option in info.fields:
            if option.encode_name in SKIPPED or option.required:
                continue
            for value in other_values(option.type, option.default):
                where = (*place, option.encode_name)
                yield f"{_words(where)}={value!r}", with_value(tree, where, value)


def with_value(tree: world.Tree, place: Place, value: object) -> world.Tree:
    """A copy with a value at a place, whose parents are made where they are missing."""
    made: Any = copy.deepcopy(tree)
    at = made
    for key in place[:-1]:
        if isinstance(at, dict) and at.get(key) is None:
            at[key] = {}
        at = at[key]
    at[place[-1]] = value
    return made


def _words(place: Place) -> str:
    return ".".join(str(key) for key in place)


def trials(folder: Path, *, num: int, seed: int) -> Iterator[Trial]:
    """Options of recipes and stages for a few methods, those of every method, and pairs.

    ``num`` bounds the number of pairs; single options are all tried. ``seed`` is not used:
    nothing is drawn.
    """
    small = world.methods()
    cases: list[tuple[str, world.Tree]] = []
    for name in ("sft", "grpo"):
        cases += [(f"{name}: {w}", t) for w, t in single_changes(small[name], GROUPS)]
    tried: Counter[str] = Counter()
    for name, tree in small.items():
        kind = known("method")[name]
        for words, changed in single_changes(tree, [((*STAGE, "method"), kind)]):
            tried[words] += 1
            if tried[words] <= TRIED:
                cases.append((f"{name}: {words}", changed))
    cases += itertools.islice(pairs(small["grpo"]), num)
    for number, (words, tree) in enumerate(cases):
        yield Trial(number, words, Both(tree, folder, number))


COMMON: Mapping[Place, Sequence[object]] = {
    ("dtype",): ["bfloat16"],
    ("measure", "sampling", "stop"): [["a"]],
    (*STAGE, "updates_per_draw"): [2],
    (*STAGE, "max_age"): [1],
    (*STAGE, "micro_batch_tokens"): [16],
    (*STAGE, "activation_checkpointing"): [True],
    (*STAGE, "lora"): [{}],
    (*STAGE, "optimizer", "schedule"): ["cosine"],
    (*STAGE, "method", "sampling", "stop"): [["a"]],
    (*STAGE, "method", "sampling", "temperature"): [0.7],
    (*STAGE, "method", "kl_weight"): [0.1],
    (*STAGE, "method", "mismatch"): [{}],
}


def pairs(tree: world.Tree) -> Iterator[tuple[str, world.Tree]]:
    """The recipe with two common options at once."""
    for (one, first), (other, second) in itertools.combinations(COMMON.items(), 2):
        for a, b in itertools.product(first, second):
            made = with_value(with_value(tree, one, a), other, b)
            yield f"{_words(one)}={a!r} with {_words(other)}={b!r}", made


class Both:
    """Plan, then run: an error of the tree is right from the plan alone."""

    def __init__(self, tree: world.Tree, folder: Path, number: int) -> None:
        self._tree, self._folder, self._number = tree, folder, number

    def __call__(self) -> bool:
        recipe = convert(self._tree, Recipe, origin="recipe")
        preview(recipe, root=self._folder)
        if not is_small(recipe):
            return True
        try:
            return run_recipe(
                recipe, out=self._folder / f"options-{self._number}", root=self._folder
            )
        except PosttrainError as error:
            raise AssertionError(f"planned, and then: {error}") from error
