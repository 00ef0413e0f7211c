"""Every number that an option holds has a range, and every range is kept from YAML and Python."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Iterator

import msgspec
import pytest
from msgspec import inspect

import posttrain
from posttrain.core import bounds
from posttrain.core.config import Config, convert
from posttrain.core.errors import ConfigError
from posttrain.core.learner import Optimizer
from posttrain.core.sampling import SamplingSpec
from posttrain.parts.composition import method
from posttrain.parts.registry import load
from posttrain.recipe import Recipe

HEAVY = ("engines", "lab", "testing", "training", "api", "__main__", "numerics")
RANGES = {
    name: kind
    for name, kind in vars(bounds).items()
    if isinstance(kind, type(bounds.Number)) and name[0].isupper()
}


def every_config() -> list[type[Config]]:
    """Our configuration classes, those of recipes, parts, rules and records of decisions."""
    load()
    for module in pkgutil.walk_packages(posttrain.__path__, "posttrain."):
        if module.name.split(".")[1] not in HEAVY and not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def below(cls: type[Config]) -> Iterator[type[Config]]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    ours = {c for c in below(Config) if c.__module__.startswith("posttrain.")}
    return sorted(ours, key=lambda c: (c.__module__, c.__name__))


def unbounded(kind: inspect.Type) -> Iterator[str]:
    """Numbers inside a type, not inside the configurations that it holds, without both limits."""
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        low, high = (kind.ge, kind.gt), (kind.le, kind.lt)
        if low == (None, None) or high == (None, None):
            yield type(kind).__name__
    elif isinstance(kind, inspect.UnionType):
        for member in kind.types:
            yield from unbounded(member)
    elif isinstance(kind, inspect.TupleType):
        for member in kind.item_types:
            yield from unbounded(member)
    elif isinstance(kind, inspect.CollectionType):
        yield from unbounded(kind.item_type)
    elif isinstance(kind, inspect.DictType):
        yield from unbounded(kind.value_type)


def test_every_number_of_every_configuration_has_a_range():
    classes = every_config()
    assert len(classes) > 200
    bare = [
        f"{cls.__module__}.{cls.__name__}.{field.name}"
        for cls in classes
        for field in inspect.type_info(cls).fields
        if list(unbounded(field.type))
    ]
    assert bare == [], "give these a type of core/bounds.py"


def test_a_bare_number_is_seen():
    class Bare(Config):
        width: tuple[float, ...] = ()
        pairs: dict[str, int | None] = msgspec.field(default_factory=dict)
        bounded: bounds.Share = 0.5

    found = [f.name for f in inspect.type_info(Bare).fields if list(unbounded(f.type))]
    assert found == ["width", "pairs"]


def test_defaults_are_in_their_ranges():
    for cls in every_config():
        fields = msgspec.structs.fields(cls)
        if fields and not any(f.required for f in fields):
            try:
                made = cls()
            except ConfigError:  # one of its options is asked for, whichever
                continue
            assert convert(msgspec.to_builtins(made), cls, origin=cls.__name__) == made


@pytest.mark.parametrize("name", sorted(RANGES))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, -(10**400), 2.0**200])
def test_no_range_holds_what_is_not_finite_or_sane(name, value):
    class Holds(Config):
        x: RANGES[name]

    Holds.__annotations__["x"] = RANGES[name]
    with pytest.raises(ConfigError):
        convert({"x": value}, Holds, origin="r.yaml")
    with pytest.raises(ConfigError):
        Holds(x=value)


def test_the_message_has_path_value_and_range():
    written = {"name": "r", "model": "m", "threads": 0}
    with pytest.raises(ConfigError) as error:
        convert(written, Recipe, origin="r.yaml")
    assert error.value.found == "r.yaml: threads is 0"
    assert error.value.expected == "a whole number, 1 or more, or null"
    with pytest.raises(ConfigError, match="from 0 to 9,223,372,036,854,775,807"):
        Recipe(name="r", model="m", seed=2**70)


def test_not_finite_is_refused_where_no_type_looks():
    tasks = {"t": {"type": "reasoning_gym", "dataset": "x", "config": {"a": [1, math.inf]}}}
    with pytest.raises(ConfigError, match=r"tasks\.t\.config\.a\[1\] is inf"):
        convert({"name": "r", "model": "m", "tasks": tasks}, Recipe, origin="r.yaml")


@pytest.mark.parametrize(
    "build",
    [
        lambda: method(3),
        lambda: method("dpo", data=object()),
        lambda: method("dpo", data=b"bytes"),
        lambda: Optimizer(lr="fast"),
        lambda: Optimizer(0.1, 0.2, lr=0.1),
        lambda: Optimizer(*range(20)),
        lambda: SamplingSpec(temperature=1e-9),
        lambda: SamplingSpec(stop=("",)),
        lambda: SamplingSpec(stop={"a": object}),
        lambda: Recipe(name="\ud800", model="m"),
        lambda: Recipe(name=["r"], model=type),
    ],
)
def test_what_python_builds_is_checked(build):
    with pytest.raises(ConfigError):
        build()


def test_python_and_yaml_build_the_same():
    assert Optimizer(lr=1).lr == 1.0
    assert isinstance(Optimizer(lr=1).lr, float)
    assert Optimizer(betas=[0, 0.5]).betas == (0.0, 0.5)
