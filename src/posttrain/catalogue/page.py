"""The catalogue as a Markdown page."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from posttrain.catalogue.entries import Entry, ExplainedPart, entries, known_groups, known_parts
from posttrain.catalogue.words import Option

HEAD = """# Methods

<!-- Written by `python -m posttrain.catalogue > docs/methods.md`: change the classes instead. -->

Every method is a composition: a source draws trajectories, signals write columns beside them,
weighted terms make the loss. This page is read off the code. The role is a tendency: what a stage
really did is measured. `posttrain methods NAME` shows the same in a terminal, with the methods of
installed packages. NAME may also be a part, a group of options, or another word such as cDPO: then
it says who speaks of it.

In formulas pi is the learner, y an answer and y_t its token t, r = pi(y_t) / pi_old(y_t) against
the policy that sampled, A an advantage, R a reward, s(x) or sigmoid(x) the logistic function, and
sg(x) a constant through which no gradient flows. pi_T or pi_teacher is a teacher, pi_ref a
reference, rho = log pi(y) - log pi_ref(y) over a whole answer, w or chosen the preferred answer and
l or rejected the other one, n and m their lengths in tokens.

Every recipe below is complete but for the model and the files that it names.
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
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")


def page() -> str:
    """The whole page. Methods of installed packages are left out."""
    every = entries(packages=False)
    families = [(f, list(es)) for f, es in itertools.groupby(every, key=lambda e: e.family)]
    lines = [HEAD]
    for family, members in families:
        lines += [f"**{family}**", "", *_overview(members), ""]
    for family, members in families:
        lines += [f"## {family}", ""]
        for member in members:
            lines += _section(member)
    lines += [PARTS]
    used = {t: [e.name for e in every if t in (p.tag for p in e.parts)] for t in _tags(every)}
    for part, options in known_parts(packages=False):
        lines += _part_section(part, options, used.get(part.tag, []))
    lines += [GROUPS]
    for group, options in known_groups(packages=False):
        lines += [f"### options {group.tag}", "", prose(group.doc), "", *_options(options), ""]
    lines += [UNCONFIRMED, *_unconfirmed(every)]
    return "\n".join(lines).rstrip("\n") + "\n"


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


def _tags(every: Sequence[Entry]) -> set[str]:
    return {p.tag for e in every for p in e.parts}


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
        told = " | ".join(_cell(c) for c in cells)
        yield f"| [{e.name}](#{e.name}) | {told} | {paper} |"


def _section(e: Entry) -> Iterator[str]:
    yield f"### {e.name}"
    yield ""
    yield prose(e.doc)
    yield ""
    yield f"* **minimises** {_code(e.formula)}, paper {paper_words(e.paper, link=True)}"
    yield f"* **{e.provenance}**, {e.interface}; tends to {e.tendency}"
    chain = [f"[{p.tag}](#{p.role}-{p.tag})" for p in e.parts]
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
            yield f"* [{e.name}](#{e.name}): {prose(e.unconfirmed)}"
    for part, _ in known_parts(packages=False):
        if part.unconfirmed:
            name = f"{part.role}-{part.tag}"
            yield f"* [{part.tag}](#{name}): {prose(part.unconfirmed)}"


def _part_section(
    part: ExplainedPart, options: Sequence[Option], users: Sequence[str]
) -> Iterator[str]:
    yield f"### {part.role} {part.tag}"
    yield ""
    yield prose(part.doc)
    yield ""
    if part.facts:
        yield f"* {part.facts}"
    yield f"* used by {', '.join(users) or 'no named method'}"
    told = [f"`{o.name}` {o.default}" for o in options]
    yield f"* options: {'; '.join(told) or 'none'}"
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
