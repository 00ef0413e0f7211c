"""The task settings of the embedded lab, as data.

The lab's base model is pre-trained on text in which the share of right answers is set per task.
Its *support* is therefore known by construction, unlike that of real checkpoints: a diagnosis of
the lab can be compared with the ground truth in this file.

Wrong answers in the text are not noise. Each setting that has them shows one *habit*, a plausible
wrong procedure, so that the model learns a competing behaviour and post-training has two
behaviours to choose between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from posttrain.tasks.reasoning_gym import ReasoningGym

Entry = Mapping[str, Any]
Habit = Callable[[Entry], str]

HELD_OUT = 32
"""Prompts per setting that are for measuring only."""


class Support(StrEnum):
    """How probable a right answer is under the base model."""

    RELIABLE = "reliable"
    SELDOM = "seldom"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One reasoning-gym dataset in one configuration, and its share of the pre-training text.

    ``share_right`` is the share of this setting's documents with the right answer; the others
    have the habit's. ``weight`` is the setting's share of all documents.
    """

    name: str
    tasks: ReasoningGym
    habit: Habit | None = None
    share_right: float = 1.0
    weight: float
    support: Support

    def __post_init__(self) -> None:
        if self.habit is None and self.share_right != 1.0:
            raise ValueError(f"{self.name}: without a habit every document must be right")


def _terms(entry: Entry) -> list[str]:
    return str(entry["metadata"]["expression"]).split()


def add_the_factors(entry: Entry) -> str:
    """Answer a product with a sum, as if ``*`` were ``+``.

    Example:
        >>> add_the_factors({"metadata": {"expression": "3 * 4"}})
        '7'
    """
    return str(sum(int(term) for term in _terms(entry) if term != "*"))


def drop_the_last_term(entry: Entry) -> str:
    """Answer a chain of three terms as if it ended after the second.

    Example:
        >>> drop_the_last_term({"metadata": {"expression": "3 - 4 + 9"}})
        '-1'
    """
    first, operator, second, *_ = _terms(entry)
    return str(int(first) + int(second) if operator == "+" else int(first) - int(second))


def copy_the_word(entry: Entry) -> str:
    """Answer with the word itself, not reversed."""
    return str(entry["metadata"]["word"])


SUMS = Setting(
    name="sums",
    tasks=ReasoningGym(
        dataset="chain_sum",
        config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        train=2000,
        held_out=HELD_OUT,
        seed=101,
    ),
    weight=0.10,
    support=Support.RELIABLE,
)

# Three terms, always right: the skill that `chains` seldom shows, with another question text.
CALCULATE = Setting(
    name="calculate",
    tasks=ReasoningGym(
        dataset="basic_arithmetic",
        config={
            "min_terms": 3,
            "max_terms": 3,
            "min_digits": 1,
            "max_digits": 1,
            "operators": ["+", "-"],
            "allow_parentheses": False,
            "allow_negation": False,
        },
        train=4000,
        held_out=HELD_OUT,
        seed=102,
    ),
    weight=0.22,
    support=Support.RELIABLE,
)

PRODUCTS = Setting(
    name="products",
    tasks=ReasoningGym(
        dataset="products",
        config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        train=2000,
        held_out=HELD_OUT,
        seed=103,
    ),
    habit=add_the_factors,
    share_right=0.11,
    weight=0.26,
    support=Support.SELDOM,
)

CHAINS = Setting(
    name="chains",
    tasks=ReasoningGym(
        dataset="chain_sum",
        config={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        train=4000,
        held_out=HELD_OUT,
        seed=104,
    ),
    habit=drop_the_last_term,
    share_right=0.12,
    weight=0.32,
    support=Support.SELDOM,
)

REVERSE = Setting(
    name="reverse",
    tasks=ReasoningGym(
        dataset="spell_backward",
        config={"min_word_len": 4, "max_word_len": 5},
        train=4000,
        held_out=HELD_OUT,
        seed=105,
    ),
    habit=copy_the_word,
    share_right=0.0,
    weight=0.10,
    support=Support.ABSENT,
)

SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {s.name: s for s in (SUMS, CALCULATE, PRODUCTS, CHAINS, REVERSE)}
)
