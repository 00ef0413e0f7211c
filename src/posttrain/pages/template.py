"""Templates into self-contained pages: style and script inside, and nothing else is allowed in.

a unit's templates/*.j2 + what all pages share (page.css, page.js, legend.html.j2) ──fill──▶ str
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import jinja2
from markupsafe import Markup

from posttrain.pages.svg import clean

Filter = Callable[..., object]
SHARED = "posttrain.pages"
"""The package whose ``templates`` every page can include."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page that another unit has written: how its page links to it, and its HTML.

    ``html`` is one element ``<section id="...">`` with that ident. Whoever makes it has escaped
    every string in it, as :func:`fill` does.
    """

    ident: str
    title: str
    html: Markup


def fill(package: str, template: str, *, filters: Mapping[str, Filter], **values: object) -> str:
    """A page as HTML text. Every value is escaped unless it is Markup; a missing one is an error.

    The script's digest goes into the page's content security policy.

    Args:
        package: the unit whose folder ``templates`` holds the template.
        template: its file name.
        filters: functions that the template may call.
        values: what it shows.
    """
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment(package).overlay()
    page.filters = {**page.filters, **filters}
    filled = page.get_template(template)
    return clean(filled.render(script=Markup(script), script_digest=digest, **values))


@cache
def _environment(package: str) -> jinja2.Environment:
    loaders = [jinja2.PackageLoader(name, "templates") for name in dict.fromkeys([package, SHARED])]
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _script() -> str:
    environment = _environment(SHARED)
    assert environment.loader is not None  # set above
    return environment.loader.get_source(environment, "page.js")[0]
