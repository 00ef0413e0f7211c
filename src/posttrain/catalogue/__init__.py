"""The map of methods: everything that the code says about itself, gathered for reading.

    python -m posttrain.catalogue > docs/methods.md

Nothing here knows a method by name. What a method asks for, composes and accepts is read off its
class, off the composition that it makes with its defaults, and off what its options change. A
method that registers appears by itself.
"""

from posttrain.catalogue.entries import (
    Entry,
    ExplainedPart,
    entries,
    entry,
    families,
    known_groups,
    known_methods,
    known_parts,
    mentions,
)
from posttrain.catalogue.page import page, paper_words, prose
from posttrain.catalogue.words import Option, options

__all__ = [
    "Entry",
    "ExplainedPart",
    "Option",
    "entries",
    "entry",
    "families",
    "known_groups",
    "known_methods",
    "known_parts",
    "mentions",
    "options",
    "page",
    "paper_words",
    "prose",
]
