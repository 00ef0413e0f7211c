"""Finding what the modules of this folder register: metrics and the raw data that they need."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

HERE = __package__ or "posttrain.measure"


@cache
def import_every_module() -> None:
    """Import each module of this folder, once, so that a new file needs no entry elsewhere."""
    for module in pkgutil.iter_modules(import_module(HERE).__path__):
        import_module(f"{HERE}.{module.name}")
