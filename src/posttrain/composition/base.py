"""What all specifications share."""

from __future__ import annotations

from typing import Literal

from posttrain.provenance import Kind

ANYONE = frozenset(Kind) - {Kind.TEMPLATE, Kind.ENVIRONMENT}
"""Every kind of producer that authors assistant turns."""

PolicyRef = str
"""``learner``; ``input`` (the policy the stage started from); ``base``; an earlier stage's name;
or ``path:<folder or hub id>``."""

Aggregate = Literal["token_mean", "sequence_mean"]
"""``token_mean``: every token counts alike. ``sequence_mean``: every sequence counts alike,
its tokens are averaged first. The choice changes the objective (survey section 5, trap 3)."""
