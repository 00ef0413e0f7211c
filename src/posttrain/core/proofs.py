"""What a run compared with what it claims to be, before anything relied on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Subject(StrEnum):
    """What is proved."""

    LOAD = "load"  # weights: all there, none random, all finite
    SAMPLER = "sampler"  # packed and cached computation: the model's own
    RENDERING = "rendering"  # tokens of a row: the text that was written
    DATA = "data"  # rows: all read, or named
    REWARDS = "rewards"  # answer, with a finite number
    STEP = "step"  # a stage takes a step
    EXPORT = "export"  # reloaded, it is the trained policy
    DIGESTS = "digests"  # files: what the ledger says


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One comparison that held. One that does not hold is an error, and no proof.

    Example:
        >>> Proof(subject=Subject.LOAD, of="base", words="146 tensors, none missing").words
        '146 tensors, none missing'
    """

    subject: Subject
    of: str  # the model, stage, file or task set
    words: str  # what was compared and what came out, in a few words
    seconds: float = 0.0  # what the comparison cost
    figures: Mapping[str, float] = field(default_factory=dict)
