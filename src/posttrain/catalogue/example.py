"""The smallest legal example of a method, found by the types of its options."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from msgspec import structs

from posttrain.catalogue.words import flow, written_types
from posttrain.composition import Composition, Dataset, parts_of
from posttrain.core.config import convert
from posttrain.core.errors import ConfigError, LegalityError, PosttrainError
from posttrain.legality import check_composition
from posttrain.methods import Method

MODEL, TEACHER, TASKS = "org/model", "path:org/teacher", "sums"
"""What the examples call the things that only a user has."""


FILES: Mapping[tuple[str, ...], str] = defaultdict(
    lambda: "answers.jsonl",
    {
        ("prompt", "completion"): "demonstrations.jsonl",
        ("prompt", "chosen", "rejected"): "pairs.jsonl",
        ("prompt", "completion", "label"): "labelled.jsonl",
        ("prompt", "completions", "labels"): "steps.jsonl",
    },
)


PLAIN: Mapping[Any, object] = {int: 32, float: 0.5, str: "Think step by step. {question}"}
"""Numbers and texts that a method has no default for."""


COMPOSED: Mapping[str, object] = {
    "source": {"type": "rollouts", "tasks": [TASKS]},
    "signals": [{"type": "verify"}, {"type": "group_advantage", "scale": "none"}],
    "terms": [{"type": "clipped_policy_gradient", "clip_high": 0.28}],
}
"""Options whose type is a union of specifications, for the method that spells them out."""


NAMED_COLUMNS: Sequence[Mapping[str, object]] = (
    {},
    {"reward": "reward"},
    {"weight": "weight"},
    {"reward": "reward", "weight": "weight"},
)
"""Columns of numbers that a method may want named in its data set."""


def legal_example(name: str, kind: type[Method]) -> tuple[dict[str, object], Method]:
    """The fewest options with which the method is legal, and the method with them.

    Raises:
        PosttrainError: a required option without an obvious value, or no legal example.
    """
    refusal: PosttrainError | None = None
    for with_data, columns in itertools.product((False, True), NAMED_COLUMNS):
        given = {
            f.name: _example(f, written_types(kind).get(f.name, ""), columns)
            for f in structs.fields(kind)
            if f.required or f.name in COMPOSED or (with_data and Dataset in get_args(f.type))
        }
        try:
            method = convert({"name": name, **given}, kind, origin=f"the example of {name}")
            check_composition(method.compose(), stage=name)
        except (ConfigError, LegalityError) as error:
            refusal = refusal or error
            continue
        for data in datasets_of(method.compose()):
            for option in given.values():
                if isinstance(option, dict) and option.get("path") == data.path:
                    option["path"] = FILES[rows_of(data)]
        return given, method
    assert refusal is not None
    raise refusal


def _example(option: structs.FieldInfo, written: str, columns: Mapping[str, object]) -> object:
    """A value for a required option, by its type.

    Raises:
        ConfigError: the type says too little.
    """
    if option.name in COMPOSED:
        return COMPOSED[option.name]
    if option.type is Dataset or Dataset in get_args(option.type):
        return {"path": f"{option.name}.jsonl", **columns}
    if "PolicyRef" in written:
        return f"path:org/{option.name}" if option.type is str else {"*": TEACHER}
    if option.type == tuple[str, ...]:
        return [TASKS]
    if option.type in PLAIN:
        return PLAIN[option.type]
    raise ConfigError(
        f"option {option.name} is required, and nothing says what an example would be",
        expected="a Dataset, a PolicyRef, a tuple of task sets, a number or a text; or a default",
        fix="give it a default, or teach posttrain.catalogue the type",
    )


def datasets_of(composition: Composition) -> list[Dataset]:
    return [p for p in parts_of(composition.source) if isinstance(p, Dataset)]


def rows_of(data: Dataset) -> tuple[str, ...]:
    """Columns that a file must have."""
    if data.steps:
        return ("prompt", "completions", "labels")
    if data.preference:
        return ("prompt", "chosen", "rejected")
    if data.unpaired:
        return ("prompt", "completion", "label")
    numbers = [name for name in (data.reward, data.weight) if name is not None]
    return ("prompt", "completion", *numbers)


def recipe_of(name: str, given: Mapping[str, object], composition: Composition) -> str:
    """A recipe that runs as soon as its model and files are there."""
    budget = "epochs: 1" if isinstance(composition.source, Dataset) else "steps: 100"
    return "\n".join(
        [
            f"name: try-{name.replace('_', '-')}",
            f"model: {MODEL}",
            f"tasks: {{{TASKS}: {{type: reasoning_gym, dataset: chain_sum}}}}",
            "stages:",
            f"  - name: {name}",
            f"    method: {flow({'name': name, **given})}",
            f"    budget: {{{budget}}}",
            "",
        ]
    )
