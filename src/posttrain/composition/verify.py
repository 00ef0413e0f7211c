"""The verifier: the first judge of every rollout."""

from __future__ import annotations

from typing import ClassVar

from posttrain.core.config import Config
from posttrain.core.trajectory import Column


class Verify(Config, tag="verify", tag_field="type"):
    """The task set's own scorer, or the user's reward function: one reward per trajectory."""

    needs: ClassVar[frozenset[Column]] = frozenset()
    provides: ClassVar[frozenset[Column]] = frozenset({Column.REWARD})
