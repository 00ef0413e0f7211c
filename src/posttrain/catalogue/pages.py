"""The catalogue as Markdown pages: a map of all methods, and a page for every family.

methods.md                  every method in a line, by family
methods/<family>.md         the family's methods, parts and groups of options, in full
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from posttrain.catalogue.entries import (
    Entry,
    ExplainedPart,
    entries,
    family_title,
    known_groups,
    known_parts,
    reading_order,
)
from posttrain.catalogue.words import Option

HEAD = """# Methods
{note}
Every method is a composition: a source draws trajectories, signals write columns beside them,
weighted terms make the loss. These pages are read off the code. The role is a tendency: what a
stage really did is measured. `posttrain methods NAME` shows the same in a terminal, with the
methods of installed packages. NAME may also be a part, a group of options, or another word such as
cDPO: then it says who speaks of it.

In formulas pi is the learner, y an answer and y_t its token t, r = pi(y_t) / pi_old(y_t) against
the policy that sampled, A an advantage, R a reward, s(x) or sigmoid(x) the logistic function, and
sg(x) a constant through which no gradient flows. pi_T or pi_teacher is a teacher, pi_ref a
reference, rho = log pi(y) - log pi_ref(y) over a whole answer, w or chosen the preferred answer and
l or rejected the other one, n and m their lengths in tokens.

A name leads to the page of its family: what it composes, what it needs from you, its options, and a
recipe that is complete but for the model and the files that it names. Parts are on the page of the
family that they belong to, and [common](methods/common.md) has those that several families use.
"""
NOTE = """
<!-- Written by `python -m posttrain.catalogue docs`: change the classes instead. -->
"""
PARTS = """## Parts

What `compose` can put together. A column that a part needs must be provided by what stands before
it. A term may read tokens of the authors it names.
"""
GROUPS = """## Groups of options

What stands in one option of a method or of a part, as a mapping.
"""
UNCONFIRMED = """## What was not confirmed

Formulas and defaults that nobody here could hold against the paper itself, and why. They are
derived or read at second hand, and tested for what they say.
"""
INDEX = "methods.md"
FAMILIES = "methods"
Explained = tuple[ExplainedPart, tuple[Option, ...]]
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")


def pages() -> Mapping[str, str]:
    """Every page by its path in the folder of documents. Installed packages are left out."""
    every = entries(packages=False)
    explained = [*known_parts(packages=False), *known_groups(packages=False)]
    named = {e.family for e in every} | {p.family for p, _ in explained}
    ordered = sorted(named, key=lambda f: (reading_order(f), f))
    found = {INDEX: _index(every, ordered)}
    for family in ordered:
        members = [e for e in every if e.family == family]
        own = [(p, options) for p, options in explained if p.family == family]
        found[_page(family)] = _family(family, members, own, every)
    return found


def stale(folder: Path) -> list[Path]:
    """Pages of families that are no more."""
    written = {folder / name for name in pages()}
    return sorted(set((folder / FAMILIES).glob("*.md")) - written)


def _page(family: str) -> str:
    return f"{FAMILIES}/{family}.md"


def _index(every: Sequence[Entry], families: Sequence[str]) -> str:
    lines = [HEAD.format(note=NOTE)]
    for family in families:
        lines += [f"## [{family_title(family)}]({_page(family)})", ""]
        if members := [e for e in every if e.family == family]:
            lines += [*_overview(members), ""]
    return _joined([*lines, UNCONFIRMED, *_unconfirmed(every)])


def _family(
    family: str, members: Sequence[Entry], own: Sequence[Explained], every: Sequence[Entry]
) -> str:
    lines = [f"# {family_title(family)}", NOTE, "All methods: [the map](../methods.md).", ""]
    if members:
        lines += ["## Methods", ""]
    for member in members:
        lines += _section(member)
    if parts := [(p, options) for p, options in own if p.role != "options"]:
        lines += [PARTS]
    for part, options in parts:
        lines += _part_section(part, options, [e for e in every if part.tag in _tags(e)])
    if groups := [(p, options) for p, options in own if p.role == "options"]:
        lines += [GROUPS]
    for group, options in groups:
        lines += [f"### options {group.tag}", "", prose(group.doc), "", *_options(options), ""]
    return _joined(lines)


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _link(name: str, anchor: str, *, family: str, on: str) -> str:
    """A name that leads to its section, from the page of the family ``on``; "" is the index."""
    page = "" if family == on else f"{family}.md" if on else _page(family)
    return f"[{name}]({page}#{anchor})"


def paper_words(paper: str, *, link: bool) -> str:
    """A paper as a link, or in words.

    Example:
        >>> paper_words("2305.18290", link=False), paper_words("-", link=True)
        ('arXiv 2305.18290', '–')
    """
    if paper in ("-", "–", ""):
        return "–"
    if link:
        return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", paper)
    return f"arXiv {paper}" if ARXIV.fullmatch(paper) else paper


def _tags(entry: Entry) -> set[str]:
    return {p.tag for p in entry.parts}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return "`" + text.replace("`", "") + "`"


def _overview(members: Sequence[Entry]) -> Iterator[str]:
    yield "| method | provenance | interface | tends to | minimises | paper |"
    yield "|---|---|---|---|---|---|"
    for e in members:
        cells = (e.provenance, e.interface, e.tendency, _code(e.formula))
        paper = paper_words(e.paper, link=True)
        row = " | ".join(_cell(c) for c in cells)
        yield f"| {_link(e.name, e.name, family=e.family, on='')} | {row} | {paper} |"


def _section(e: Entry) -> Iterator[str]:
    yield f"### {e.name}"
    yield ""
    yield prose(e.doc)
    yield ""
    yield f"* **minimises** {_code(e.formula)}, paper {paper_words(e.paper, link=True)}"
    yield f"* **{e.provenance}**, {e.interface}; tends to {e.tendency}"
    chain = [_link(p.tag, _anchor(p), family=p.family, on=e.family) for p in e.parts]
    yield f"* **composes** {' → '.join(chain)}"
    for p in e.parts:
        yield f"  * {p.role} {p.tag}: {p.facts}"
    for variant in e.variants:
        yield f"* option {variant}"
    yield f"* **needs from you** {'; '.join(e.asks)}"
    yield ""
    yield from _options(e.options)
    yield ""
    yield "```yaml recipe"
    yield e.recipe.rstrip("\n")
    yield "```"
    yield ""


def _options(options: Sequence[Option]) -> Iterator[str]:
    yield "| option | type | default |"
    yield "|---|---|---|"
    for o in options:
        yield f"| `{o.name}` | {_cell(o.kind)} | {_cell(o.default)} |"


def _unconfirmed(every: Sequence[Entry]) -> Iterator[str]:
    """A line for every method and every part that says so of itself."""
    for e in every:
        if e.unconfirmed:
            link = _link(e.name, e.name, family=e.family, on="")
            yield f"* {link}: {prose(e.unconfirmed)}"
    for part, _ in known_parts(packages=False):
        if part.unconfirmed:
            link = _link(part.tag, _anchor(part), family=part.family, on="")
            yield f"* {link}: {prose(part.unconfirmed)}"


def _anchor(part: ExplainedPart) -> str:
    """GitHub's name of the heading of a part."""
    return f"{part.role}-{part.tag}"


def _part_section(
    part: ExplainedPart, options: Sequence[Option], users: Sequence[Entry]
) -> Iterator[str]:
    yield f"### {part.role} {part.tag}"
    yield ""
    yield prose(part.doc)
    yield ""
    if part.facts:
        yield f"* {part.facts}"
    links = [_link(e.name, e.name, family=e.family, on=part.family) for e in users]
    yield f"* used by {', '.join(links) or 'no named method'}"
    defaults = [f"`{o.name}` {o.default}" for o in options]
    yield f"* options: {'; '.join(defaults) or 'none'}"
    yield ""


def prose(doc: str) -> str:
    """A docstring as Markdown: no examples, single backquotes, no roles.

    Example:
        >>> prose("Uses ``x`` of :class:`~a.B`.\\n\\nExample:\\n    >>> 1\\n    1")
        'Uses `x` of `a.B`.'
    """
    text = doc.split("\n\nExample:")[0]
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")
