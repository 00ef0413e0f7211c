"""PyTorch for modules that must not load it before a loss is computed.

    from posttrain.core.lazy import F, torch

The classes that compute the losses also serve to plan recipes and to list methods. They use these
two names like the real modules; the first attribute access loads PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
else:

    class _Later:
        """A module that is imported at the first attribute access."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> object:
            found = getattr(import_module(self._name), attribute)
            self.__dict__[attribute] = found  # cached: a loss is computed thousands of times
            return found

    torch = _Later("torch")
    F = _Later("torch.nn.functional")

__all__ = ["F", "torch"]
