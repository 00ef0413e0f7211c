"""Where the messages stand in a rendered text, and what the template did to them.

skeleton    the template's text for stand-ins: [before, number, between, number, …, after]
place       the characters of the text that are a message, found by the skeleton or by search
change      a difference between a message and its place
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from posttrain.core.rendering import Change, DifferenceKind
from posttrain.core.task import Message

Stretch = tuple[int, int]  # [start, end) in characters

_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
MIN_PART = 8
"""Characters of a message that must be left for a part of it to be recognised."""


@dataclass(frozen=True, slots=True)
class Place:
    """A message in the text, and what is different about it."""

    start: int
    end: int
    changes: tuple[tuple[DifferenceKind, str], ...] = ()


def places_of(messages: Sequence[Message], skeleton: list[str], text: str) -> list[Place | None]:
    """The place of each message; None where nothing of it can be found."""
    return _fit(messages, skeleton, text) or _search(messages, skeleton, text)


def changes_of(
    messages: Sequence[Message], places: Sequence[Place | None], *, trained: Sequence[bool]
) -> Iterator[Change]:
    """What the template cut out of the messages, or changed in them."""
    for number, (message, place) in enumerate(zip(messages, places, strict=True)):
        if place is not None:
            for kind, words in place.changes:
                yield Change(kind, number + 1, trained[number], words)
        elif message.content.strip():
            yield Change(DifferenceKind.CUT, number + 1, trained[number], message.content)
        elif message.content:
            yield Change(DifferenceKind.TRIM, number + 1, trained[number], message.content)


def _fit(messages: Sequence[Message], skeleton: list[str], text: str) -> list[Place | None]:
    """Places from matching the skeleton to the text. Empty unless it matches completely."""
    places: list[Place | None] = [None] * len(messages)
    if not skeleton or not text.startswith(skeleton[0]):
        return []
    at = len(skeleton[0])
    for number, after in zip(skeleton[1::2], skeleton[2::2], strict=True):
        content = messages[int(number)].content
        fitting = (t for trim in _TRIMS if text.startswith(t := trim(content), at))
        left = next((t for t in fitting if text.startswith(after, at + len(t))), None)
        if left is None:
            return []
        places[int(number)] = Place(at, at + len(left), _trimmed(content, left))
        at += len(left) + len(after)
    return places if at == len(text) else []


def _trimmed(content: str, left: str) -> tuple[tuple[DifferenceKind, str], ...]:
    """What trimming a message to ``left`` cut at its ends."""
    if len(left) == len(content):
        return ()
    start = content.find(left) if left else len(content)
    ends = (
        (DifferenceKind.TRIM, content[:start]),
        (DifferenceKind.TRIM_END, content[start + len(left) :]),
    )
    return tuple((kind, cut) for kind, cut in ends if cut)


def _search(messages: Sequence[Message], skeleton: list[str], text: str) -> list[Place | None]:
    """Places of the contents in order, each the first match after the previous one."""
    after = dict(zip(skeleton[1::2], skeleton[2::2], strict=True))
    places: list[Place | None] = []
    at = 0
    for number, message in enumerate(messages):
        place = _find(message.content, text, at, after=after.get(str(number), "")[:MIN_PART])
        places.append(place)
        at = place.end if place else at
    return places


def _find(content: str, text: str, at: int, *, after: str) -> Place | None:
    for trim in _TRIMS:
        left = trim(content)
        if left and (start := text.find(left, at)) >= 0:
            return Place(start, start + len(left), _trimmed(content, left))
    if not content.strip():
        return None
    return _find_spaced(content, text, at) or _find_part(content, text, at, after=after)


def _find_spaced(content: str, text: str, at: int) -> Place | None:
    """A message of which only the whitespace is another."""
    letters = [n for n in range(at, len(text)) if not text[n].isspace()]
    wanted = "".join(content.split())
    found = "".join(text[n] for n in letters).find(wanted)
    if found < 0:
        return None
    start, end = letters[found], letters[found + len(wanted) - 1] + 1
    return Place(start, end, ((DifferenceKind.SPACED, content),))


def _find_part(content: str, text: str, at: int, *, after: str) -> Place | None:
    """A message of which a part was cut: its longest end that the template's text follows, or
    its longest beginning."""
    rest = text[at:]
    first = _smallest(len(content), lambda i: content[i:] + after in rest)
    left = content[first:]
    if left.strip() and (after or len(left) >= MIN_PART):
        start = at + rest.find(left + after)
        cut = content[:first]
        kind = DifferenceKind.CUT if cut.strip() else DifferenceKind.TRIM
        return Place(start, start + len(left), ((kind, cut),))
    last = len(content) - _smallest(len(content), lambda i: content[: len(content) - i] in rest)
    if last < MIN_PART:
        return None
    start = at + rest.find(content[:last])
    return Place(start, start + last, ((DifferenceKind.CUT, content[last:]),))


def _smallest(high: int, holds: Callable[[int], bool]) -> int:
    """The smallest i in [0, high] at which a monotone condition holds; ``high`` if none does."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
