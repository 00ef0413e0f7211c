"""A composition, and the methods that make one.

    method: {name: dpo, data: ..., beta: 0.2} ──compose()──▶ Composition: source, signals, terms

A method is the short name of a composition with its paper's defaults. Most are classes of a few
lines next to the parts that they use. Where one paper *is* the term, the term's class is the method
too: ``@part(method=SHAPE)`` makes it from a shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, Union

import msgspec

from posttrain.core.config import Config, ConfigMeta, convert
from posttrain.core.learner import MovingReference, ScalarHead
from posttrain.parts import unions
from posttrain.parts.base import Part, PolicyRef, Source, Term
from posttrain.parts.registry import find, known, part, tag_of


class Composition(Config):
    """A method written out: its source, its signals and its loss terms.

    ``moving`` adds a reference that follows the learner, for parts that name policy ``moving``.
    ``scalar_head`` is set exactly when a term reads one.
    """

    source: unions.AnySource
    terms: tuple[unions.AnyTerm, ...]
    signals: tuple[unions.AnySignal, ...] = ()
    moving: MovingReference | None = None
    scalar_head: ScalarHead | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Source, signals and terms, including those inside the source."""
        source: Source = self.source
        inner = tuple(leaf for leaf in source.leaves if leaf is not source)
        return (source, *inner, *source.judged_by, *self.signals, *self.terms)

    def references(self) -> tuple[PolicyRef, ...]:
        """Every policy that a part names, or that a critic starts from, without duplicates."""
        head = () if self.scalar_head is None else (self.scalar_head.start,)
        named = (ref for p in self.parts for ref in p.references())
        return tuple(dict.fromkeys((*head, *named)))


class Method(Part, tag_field="name"):
    """A named composition.

    Class variables are its row in ``posttrain methods``: ``provenance`` (``on-policy``,
    ``off-policy``, ``mixed``), ``interface`` (the supervision: token targets, preferences, rewards)
    and ``tendency`` (the intended role; the actual role is measured). ``example`` has values of
    options that an example of the method cannot derive from their types.
    """

    role: ClassVar[str] = "method"
    declares: ClassVar[tuple[str, ...]] = (
        *("provenance", "interface", "tendency", "formula"),
        "compose",
    )
    provenance: ClassVar[str]
    interface: ClassVar[str]
    tendency: ClassVar[str]
    example: ClassVar[Mapping[str, object]] = MappingProxyType({})
    spelt_out: ClassVar[bool] = False  # its options are the parts themselves

    def compose(self) -> Composition:
        """The composition of these options."""
        raise NotImplementedError


COMMON = frozenset(Term.__struct_fields__)
"""Options of every term. A method that is one term leaves them at their defaults."""


class TermMethod(Method):
    """A shape of methods that are one term with its data.

    A shape has the options of the data, and ``around`` composes them with the term. :meth:`of`
    makes the method of a term: the options of both under the term's name.
    """

    term: ClassVar[type[Term]]

    def around(self, term: Term) -> Composition:
        """The term with its data and the signals it needs."""
        raise NotImplementedError

    def compose(self) -> Composition:
        """The term with its own options, on its data."""
        own = {n: getattr(self, n) for n in _own_options(self.term)}
        return self.around(self.term(**own))

    @classmethod
    def of(cls, term: type[Term]) -> type[TermMethod]:
        """The method that consists of one term."""
        written = _annotations(term)
        fields = {n: d for n, d in _own_options(term).items() if n not in cls.__struct_fields__}
        namespace: dict[str, Any] = {
            "__module__": term.__module__,
            "__qualname__": term.__name__,
            "__doc__": term.__doc__,
            "__annotations__": {name: written[name] for name in fields},
            "term": term,
            "formula": term.formula,
            "paper": term.paper,
            **{n: d for n, d in fields.items() if d is not msgspec.NODEFAULT},
        }
        made = ConfigMeta(term.__name__, (cls,), namespace, tag=tag_of(term))
        assert issubclass(made, TermMethod)
        return made


def _own_options(term: type[Term]) -> dict[str, Any]:
    """Defaults by name; types are not resolved before a recipe is read."""
    names, defaults = term.__struct_fields__, term.__struct_defaults__
    required = [msgspec.NODEFAULT] * (len(names) - len(defaults))
    every = zip(names, (*required, *defaults), strict=True)
    return {name: default for name, default in every if name not in COMMON}


def _annotations(term: type[Term]) -> dict[str, Any]:
    """Types by name: strings for classes of the term's module, evaluated for any other.

    A string annotation is resolved in the module of its class, and the method's class belongs to
    the term's module.
    """
    found: dict[str, Any] = {}
    for base in reversed(term.__mro__):
        found |= inspect.get_annotations(base, eval_str=base.__module__ != term.__module__)
    return found


def method(name: str, **options: Any) -> Method:
    """The method of that name, as in a recipe.

    Args:
        name: as in ``method: {name: ...}``.
        options: of the method.

    Raises:
        ConfigError: no such method or option, or an ill-typed value; names the nearest.

    Example:
        >>> from posttrain import Dataset
        >>> dpo = method("dpo", data=Dataset(path="pairs.jsonl"), beta=0.2)
        >>> [type(term).__name__ for term in dpo.compose().terms]
        ['Dpo']
    """
    found = find("method", name)
    made: Method = convert({"name": name, **options}, found, origin=f"method {name}")
    return made


@part
class Compose(Method):
    """Any legal composition, written out."""

    source: unions.AnySource
    terms: tuple[unions.AnyTerm, ...]
    signals: tuple[unions.AnySignal, ...] = ()
    moving: MovingReference | None = None
    scalar_head: ScalarHead | None = None

    spelt_out: ClassVar[bool] = True
    example: ClassVar[Mapping[str, object]] = MappingProxyType(
        {
            "source": {"type": "rollouts", "tasks": ["sums"]},
            "signals": [{"type": "verify"}, {"type": "group_advantage", "scale": "none"}],
            "terms": [{"type": "clipped_policy_gradient", "clip_high": 0.28}],
        }
    )
    provenance: ClassVar[str] = "as composed"
    interface: ClassVar[str] = "as composed"
    tendency: ClassVar[str] = "measure it"
    formula: ClassVar[str] = "the weighted sum of the terms"

    def compose(self) -> Composition:
        """Itself."""
        return Composition(
            source=self.source,
            signals=self.signals,
            terms=self.terms,
            moving=self.moving,
            scalar_head=self.scalar_head,
        )


if TYPE_CHECKING:
    AnyMethod: TypeAlias = Method
else:

    def __getattr__(name: str) -> object:
        """``AnyMethod``: the union of all methods, ours and those of installed packages."""
        if name != "AnyMethod":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return Union[tuple(known("method").values())]  # noqa: UP007
