"""The option ``--trust-code`` of every command that runs a recipe's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

C = TypeVar("C", bound=Callable[..., Any])

_KEY = "posttrain.trust_code"


def _keep(context: click.Context, option: click.Parameter, value: bool) -> None:
    context.meta[_KEY] = value


def trusting(command: C) -> C:
    """Give a command the option; :func:`is_trusted` tells its value."""
    return click.option(
        "--trust-code",
        is_flag=True,
        expose_value=False,
        callback=_keep,
        help="Allow code from outside the recipe's folder.",
    )(command)


def is_trusted() -> bool:
    """Whether the running command was given the option."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_KEY, False))
