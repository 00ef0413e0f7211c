"""Every method and every part, explained from what its class says and what it composes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from msgspec import structs

from posttrain import parts
from posttrain.catalogue.example import datasets_of, legal_example, recipe_of
from posttrain.catalogue.words import Option, default_of, flow, options, written_types
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.learner import ScalarHead
from posttrain.parts.composition import Composition, Method
from posttrain.parts.registry import find, known, package_of, tag_of

COMMON = "common"
READ_FIRST = ("supervised", "preference", "policy")
FOLDERS = frozenset(m.name for m in pkgutil.iter_modules(parts.__path__) if m.ispkg)
Role = Literal["source", "signal", "term", "head", "options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedPart:
    """A source, signal, term or scalar head in a composition, or a group of options of one."""

    role: Role
    tag: str
    family: str
    facts: str  # what it needs, provides, reads, in one line
    doc: str

    @property
    def unconfirmed(self) -> str:
        """What its documentation says that nobody could confirm against a paper, or nothing."""
        return unconfirmed(self.doc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A method, explained."""

    name: str
    family: str  # folder of ``parts`` it stands in, or the package it comes from
    doc: str
    provenance: str
    interface: str
    tendency: str
    formula: str
    paper: str
    options: tuple[Option, ...]
    parts: tuple[ExplainedPart, ...]
    variants: tuple[str, ...]  # what other values of its options add or replace
    asks: tuple[str, ...]  # what the user must bring
    recipe: str  # YAML

    @property
    def summary(self) -> str:
        """The first sentence of its documentation."""
        return self.doc.split("\n\n")[0].replace("\n", " ")

    @property
    def unconfirmed(self) -> str:
        """What its documentation says that nobody could confirm against a paper, or nothing."""
        return unconfirmed(self.doc)


def unconfirmed(doc: str) -> str:
    """The paragraph of a documentation that begins with ``Unconfirmed:``, on one line.

    Example:
        >>> unconfirmed("A method.\\n\\nUnconfirmed: the formula,\\nand its sign.")
        'the formula, and its sign.'
    """
    found = re.search(r"^Unconfirmed: (.+?)(?=\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def known_methods(*, packages: bool = True) -> Mapping[str, type[Method]]:
    """Methods by name: ours, and those of installed packages.

    Example:
        >>> "dpo" in known_methods()
        True
    """
    return _known("method", packages=packages)


def _known(role: str, *, packages: bool) -> Mapping[str, type[Any]]:
    return {n: k for n, k in known(role).items() if packages or package_of(k) is None}


def entries(*, packages: bool = True) -> list[Entry]:
    """Every method, families together, in the order in which they are defined."""
    named = families(packages=packages).values()
    return [entry(name) for members in named for name in members]


def families(*, packages: bool = True) -> Mapping[str, Mapping[str, type[Method]]]:
    """Methods by name, by their family."""
    found: dict[str, dict[str, type[Method]]] = {}
    for name, kind in known_methods(packages=packages).items():
        found.setdefault(family_of(kind), {})[name] = kind
    return dict(sorted(found.items(), key=lambda named: reading_order(named[0])))


def reading_order(family: str) -> tuple[bool, int]:
    """What most people look for stands first, what all families share last.

    Families of the same rank stay in the order in which they are found.

    Example:
        >>> sorted(["common", "offline", "policy", "supervised"], key=reading_order)
        ['supervised', 'policy', 'offline', 'common']
    """
    rank = READ_FIRST.index(family) if family in READ_FIRST else len(READ_FIRST)
    return family == COMMON, rank


def family_of(kind: type[Config]) -> str:
    """The folder of ``parts`` in which a class stands, or the package that it comes from.

    What several families share is ``common``.

    Example:
        >>> from posttrain.parts.registry import find
        >>> family_of(find("term", "dpo")), family_of(find("signal", "reference_logprobs"))
        ('preference', 'common')
    """
    if package := package_of(kind):
        return package
    inside = kind.__module__.removeprefix(f"{parts.__name__}.").split(".")
    return inside[0] if len(inside) > 1 and inside[0] in FOLDERS else COMMON


def family_title(family: str) -> str:
    """What a family has in common, in a line.

    Example:
        >>> family_title("offline")
        'Offline RL: logged answers with rewards, from whoever wrote them'
    """
    if family == COMMON:
        return "Common: what several families use"
    if family not in FOLDERS:
        return f"From {family}"
    doc = importlib.import_module(f"{parts.__name__}.{family}").__doc__ or ""
    return doc.splitlines()[0].rstrip(".")


def entry(name: str) -> Entry:
    """One method, explained.

    Raises:
        ConfigError: no such method, or one whose required options have no obvious example.
    """
    kind: type[Method] = find("method", name)
    given, method = legal_example(name, kind)
    composition = method.compose()
    return Entry(
        name=name,
        family=family_of(kind),
        doc=inspect.cleandoc(kind.__doc__ or ""),
        provenance=kind.provenance,
        interface=kind.interface,
        tendency=kind.tendency,
        formula=kind.formula,
        paper=kind.paper,
        options=options(kind),
        parts=tuple(_parts(composition)),
        variants=tuple(_variants(method, composition)),
        asks=tuple(_asks(kind, composition)),
        recipe=recipe_of(name, given, composition),
    )


def _parts(composition: Composition) -> Iterator[ExplainedPart]:
    source = composition.source
    facts = f"written by {_names(source.writes)}; provides {_names(source.provides)}"
    yield _part("source", source, facts)
    for signal in composition.signals:
        facts = f"needs {_names(signal.needs)}; provides {_names(signal.provides)}"
        yield _part("signal", signal, facts)
    for term in composition.terms:
        facts = (
            f"weight {term.weight:g}, per {term.unit}, {term.aggregate}; needs "
            f"{_names(term.needs)}; reads tokens of {_names(term.readable)}"
        )
        yield _part("term", term, facts)
    if (head := composition.scalar_head) is not None:
        yield _head(f"{head.trunk} trunk, starts from {head.start}")


def _head(facts: str) -> ExplainedPart:
    doc = inspect.cleandoc(ScalarHead.__doc__ or "")
    return ExplainedPart(role="head", tag="scalar_head", family=COMMON, facts=facts, doc=doc)


def _part(role: Role, spec: Config | type[Config], facts: str) -> ExplainedPart:
    kind = spec if isinstance(spec, type) else type(spec)
    doc = inspect.cleandoc(kind.__doc__ or "")
    return ExplainedPart(role=role, tag=tag_of(spec), family=family_of(kind), facts=facts, doc=doc)


def _names(values: Any) -> str:
    return ", ".join(sorted(str(v) for v in values)) or "nothing"


def _tags(composition: Composition) -> list[str]:
    parts: Sequence[Config] = (composition.source, *composition.signals, *composition.terms)
    return [tag_of(p) for p in parts]


def _variants(method: Method, composition: Composition) -> Iterator[str]:
    """Options that bring other parts in: found by trying them."""
    usual = _tags(composition)
    for option in structs.fields(type(method)):
        for value in _others(option):
            try:
                tags = _tags(structs.replace(method, **{option.name: value}).compose())
            except ConfigError:
                continue  # not a value that stands alone
            words = f"{option.name}: {flow(value) if value != 0.5 else 'above 0'}"
            if added := [t for t in tags if t not in usual]:
                gone = [t for t in usual if t not in tags]
                instead = f" instead of {', '.join(gone)}" if gone else ""
                yield f"{words} adds {', '.join(added)}{instead}"
            elif gone := [t for t in usual if t not in tags]:
                yield f"{words} drops {', '.join(gone)}"


def _others(option: structs.FieldInfo) -> Sequence[Any]:
    """Other values of an option that switches something, as far as its type names them."""
    if option.required:
        return ()
    default = default_of(option)
    if get_origin(option.type) is Literal:
        return [v for v in get_args(option.type) if v != default]
    if isinstance(default, bool):
        return [not default]
    return [0.5] if isinstance(default, float) and default == 0 else ()


def _asks(kind: type[Method], composition: Composition) -> Iterator[str]:
    """What only the user has."""
    for data in datasets_of(composition):
        yield f"a file with rows of {', '.join(data.row_columns)} (JSONL or Parquet)"
    if composition.source.draws_from:
        judged = any(s.judges and not s.references() for s in composition.signals)
        scorer = "with a scorer for its answers" if judged else "for its prompts"
        yield f"a task set, {scorer}"
    for option in structs.fields(kind):
        if option.required and "PolicyRef" in written_types(kind).get(option.name, ""):
            yield f"{option.name}: a model with the learner's vocabulary"


def known_parts(*, packages: bool = True) -> list[tuple[ExplainedPart, tuple[Option, ...]]]:
    """Every source, signal and term, with its options."""
    roles: Sequence[Role] = ("source", "signal", "term")
    found = [
        (_part(role, spec, _class_facts(role, spec)), options(spec))
        for role in roles
        for spec in _known(role, packages=packages).values()
    ]
    return [*found, (_head(""), options(ScalarHead))]


def _class_facts(role: Role, spec: Any) -> str:
    """What is true of a part whatever its options are."""
    if role == "source":
        return ""
    needs = _names(spec.needs) if isinstance(spec.needs, frozenset) else "depends on its options"
    if role == "signal":
        gives = spec.provides
        provides = _names(gives) if isinstance(gives, frozenset) else "depends on its options"
        return f"needs {needs}; provides {provides}"
    return f"per {spec.unit}; needs {needs}; may read tokens of {_names(spec.accepts)}"


def known_groups(*, packages: bool = True) -> list[tuple[ExplainedPart, tuple[Option, ...]]]:
    """Every group of options that a method or a part takes as one option, with its own options."""
    read: list[type[Config]] = [*known_methods(packages=packages).values()]
    read += [k for r in ("source", "signal", "term") for k in known(r).values()]
    explained, found = {*read, ScalarHead}, dict[type[Config], None]()
    while read:
        inside = [c for f in structs.fields(read.pop(0)) for c in _configs(f.type)]
        new = [c for c in inside if c not in explained and c not in found]
        found |= dict.fromkeys(new)
        read += new
    ordered = sorted(found, key=_group_name)
    return [(_group(kind), options(kind)) for kind in ordered]


def _configs(kind: Any) -> Iterator[type[Config]]:
    """Classes of options inside of a type."""
    if isinstance(kind, type) and issubclass(kind, Config):
        yield kind
    for inner in get_args(kind):
        yield from _configs(inner)


def _group_name(kind: type[Config]) -> str:
    return str(kind.__struct_config__.tag or kind.__name__)


def _group(kind: type[Config]) -> ExplainedPart:
    doc = inspect.cleandoc(kind.__doc__ or "")
    return ExplainedPart(
        role="options", tag=_group_name(kind), family=family_of(kind), facts="", doc=doc
    )


def mentions(word: str) -> list[str]:
    """Methods, parts and groups of options whose documentation has the word.

    Example:
        >>> mentions("IcePop")
        ['Mismatch']
    """
    exact = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])", re.IGNORECASE)
    docs = {n: f"{inspect.cleandoc(k.__doc__ or '')} {k.paper}" for n, k in known_methods().items()}
    docs |= {p.tag: p.doc for p, _ in (*known_parts(), *known_groups())}
    return [name for name, doc in docs.items() if exact.search(doc)]
