"""Templates into self-contained pages: style and script inside, and nothing else is allowed in."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache

import jinja2
from markupsafe import Markup

from posttrain.report.svg import clean

Filter = Callable[..., object]


def fill(template: str, *, filters: Mapping[str, Filter], **values: object) -> str:
    """A page as HTML text. Every value is escaped unless it is Markup; a missing one is an error.

    The script's digest goes into the page's content security policy.
    """
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = _environment().overlay()
    environment.filters = {**environment.filters, **filters}
    page = environment.get_template(template)
    return clean(page.render(script=Markup(script), script_digest=digest, **values))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("posttrain.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _asset(name: str) -> str:
    loader = _environment().loader
    assert loader is not None  # set above
    return loader.get_source(_environment(), name)[0]
