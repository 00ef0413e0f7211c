"""The smallest legal example of a method, found by the types of its options."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from msgspec import structs

from posttrain.catalogue.words import flow, written_types
from posttrain.core.config import convert
from posttrain.core.errors import ConfigError, LegalityError, PosttrainError
from posttrain.parts.base import Source
from posttrain.parts.composition import Composition, Method
from posttrain.parts.legality import check_composition

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
"""What an example calls a data file, by the columns that it must have."""

PLAIN: Mapping[Any, object] = {int: 32, float: 0.5, str: "Think step by step. {question}"}
"""Numbers and texts that a method has no default for."""

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
    written = written_types(kind)
    for with_data, columns in itertools.product((False, True), NAMED_COLUMNS):
        given = {
            f.name: kind.example.get(f.name) or _example(f, written[f.name], columns)
            for f in structs.fields(kind)
            if f.required or f.name in kind.example or (with_data and _is_data(f.type))
        }
        try:
            method = convert({"name": name, **given}, kind, origin=f"the example of {name}")
            check_composition(method.compose(), stage=name)
        except (ConfigError, LegalityError) as error:
            refusal = refusal or error
            continue
        for data in datasets_of(method.compose()):
            for option in given.values():
                if isinstance(option, dict) and option.get("path") in data.files:
                    option["path"] = FILES[data.row_columns]
        return given, method
    assert refusal is not None
    raise refusal


def _example(option: structs.FieldInfo, written: str, columns: Mapping[str, object]) -> object:
    """A value for a required option, by its type.

    Raises:
        ConfigError: the type says too little.
    """
    if _is_data(option.type):
        return {"path": f"{option.name}.jsonl", **columns}
    if "PolicyRef" in written:
        return f"path:org/{option.name}" if option.type is str else {"*": TEACHER}
    if option.type == tuple[str, ...]:
        return [TASKS]
    kind = get_args(option.type)[0] if get_origin(option.type) is Annotated else option.type
    if kind in PLAIN:
        return PLAIN[kind]
    raise ConfigError(
        f"option {option.name} is required, and nothing says what an example would be",
        expected="a data set, a PolicyRef, a tuple of task sets, a number or a text; or a default",
        fix="give it a default, or a value in the `example` of the class",
    )


def _is_data(kind: Any) -> bool:
    """True for the type of an option that is a data set, or may be one."""
    return any(
        isinstance(k, type) and issubclass(k, Source) and k.has_end for k in (kind, *get_args(kind))
    )


def datasets_of(composition: Composition) -> list[Source]:
    """The sources that read files."""
    return [leaf for leaf in composition.source.leaves if leaf.files]


def recipe_of(name: str, given: Mapping[str, object], composition: Composition) -> str:
    """A recipe that runs as soon as its model and files are there."""
    budget = "epochs: 1" if composition.source.has_end else "steps: 100"
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
