"""What a planted fault is: a known failure of the field as data.

faults ── Fault ──▶ inputs, environment  (scored: refused · alarmed · final score · never)
      └── Mutant ─▶ mutants              (reported apart: the share that the tests kill)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Kind = Literal["input", "environment"]


class Topic(StrEnum):
    """What the fault is about."""

    LOAD = "load"
    TOKENIZER = "tokenizer"
    TEMPLATE = "template"
    RENDERING = "rendering"
    DATA = "data"
    REWARD = "reward"
    CONTAMINATION = "contamination"
    ROLLOUTS = "rollouts"
    REFERENCE = "reference"
    TEACHER = "teacher"
    ADAPTER = "adapter"
    EXPORT = "export"
    DIGEST = "digest"
    IDENTITY = "identity"
    RESUME = "resume"
    OPTION = "option"
    UNTRUSTED = "untrusted content"
    SUCCESS = "success"
    OUT = "where it writes"
    FIT = "fit"


class Silent(StrEnum):
    """Where the fault shows when nobody speaks up."""

    SCORE = "final score"  # a measurement at the end is worse, and does not say why
    NEVER = "never"  # nothing is worse on paper: the number itself is wrong, or nobody looks


class Base(StrEnum):
    """The recipe that a fault is planted in."""

    SFT = "sft"
    DPO = "dpo"
    GRPO = "grpo"
    OPD = "opd"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of inputs or of the environment.

    ``planted`` and ``twin`` say in words what the planter of the same id does.
    """

    id: str
    kind: Kind
    topic: Topic
    did: str  # what the user did, or what broke
    planted: str
    twin: str  # the same, done right
    base: Base
    silent: Silent
    reports: tuple[str, ...] = ()  # project#number of an issue or a change; none: found by trying
    not_ours: str | None = None  # why it cannot be planted in posttrain
    not_trl: str | None = None  # why it cannot be planted in TRL


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """Our own code, broken in one place.

    ``before`` stands exactly once in ``module`` and is replaced by ``after``.
    """

    id: str
    broke: str
    module: str  # below src/posttrain
    before: str
    after: str
    tests: tuple[str, ...]  # below tests: what should notice
    reports: tuple[str, ...] = ()
