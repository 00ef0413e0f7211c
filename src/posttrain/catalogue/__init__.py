"""The map of methods: everything that the code says about itself, gathered for reading.

    python -m posttrain.catalogue docs

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
    family_of,
    family_title,
    known_groups,
    known_methods,
    known_parts,
    mentions,
)
from posttrain.catalogue.pages import pages, paper_words, prose
from posttrain.catalogue.words import Option, options

__all__ = [
    "Entry",
    "ExplainedPart",
    "Option",
    "entries",
    "entry",
    "families",
    "family_of",
    "family_title",
    "known_groups",
    "known_methods",
    "known_parts",
    "mentions",
    "options",
    "pages",
    "paper_words",
    "prose",
]
