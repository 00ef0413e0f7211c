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
    if fitting := _fit(messages, skeleton, text):
        return fitting
    # A message that the template cut may stand whole in a later turn, or in an earlier one: the
    # direction that loses less is the right one.
    both = [_search(messages, skeleton, text, backwards=back) for back in (False, True)]
    return max(both, key=lambda places: sum(p.end - p.start for p in places if p))


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


def _search(
    messages: Sequence[Message], skeleton: list[str], text: str, *, backwards: bool
) -> list[Place | None]:
    """Places of the contents in order: each the first match after the one before it, or the last
    match before the one after it."""
    afters = dict(zip(skeleton[1::2], skeleton[2::2], strict=True))
    befores = dict(zip(skeleton[1::2], skeleton[0:-1:2], strict=True))
    numbers = range(len(messages))
    places: list[Place | None] = [None] * len(messages)
    window = _Window(text, 0, len(text), backwards)
    for n in reversed(numbers) if backwards else numbers:
        own = (befores.get(str(n), "")[-MIN_PART:], afters.get(str(n), "")[:MIN_PART])
        places[n] = place = _find(messages[n].content, window, own=own)
        if place is not None:
            window = window.beyond(place)
    return places


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of the text in which a message is looked for."""

    text: str
    start: int
    end: int
    backwards: bool  # the last match is wanted, not the first

    def beyond(self, place: Place) -> _Window:
        """The part that is left for the next message."""
        edges = (self.start, place.start) if self.backwards else (place.end, self.end)
        return _Window(self.text, *edges, self.backwards)

    def find(self, part: str, after: str = "") -> int:
        """Where a part stands that ``after`` follows; -1 when it does not."""
        end = min(self.end + len(after), len(self.text))
        look = self.text.rfind if self.backwards else self.text.find
        return look(part + after, self.start, end)


def _find(content: str, window: _Window, *, own: tuple[str, str]) -> Place | None:
    """The place of a message. ``own``: the template's text right before and after it."""
    for trim in _TRIMS:
        left = trim(content)
        if left and (start := window.find(left)) >= 0:
            return Place(start, start + len(left), _trimmed(content, left))
    if not content.strip():
        return None
    return _find_spaced(content, window) or _find_part(content, window, own=own)


def _find_spaced(content: str, window: _Window) -> Place | None:
    """A message of which only the whitespace is another."""
    letters = [n for n in range(window.start, window.end) if not window.text[n].isspace()]
    wanted = "".join(content.split())
    found = _Window("".join(window.text[n] for n in letters), 0, len(letters), window.backwards)
    if (at := found.find(wanted)) < 0:
        return None
    start, end = letters[at], letters[at + len(wanted) - 1] + 1
    return Place(start, end, ((DifferenceKind.SPACED, content),))


def _find_part(content: str, window: _Window, *, own: tuple[str, str]) -> Place | None:
    """A message of which a part was cut: its longest end that the template's text follows, or
    its longest beginning."""
    before, after = own
    first = _smallest(len(content), lambda i: window.find(content[i:], after) >= 0)
    left = content[first:]
    if left.strip() and (after or len(left) >= MIN_PART):
        start = window.find(left, after)
        end = start + len(left)
        # The cut text may end like the template's own text before the message.
        header = window.text.find(before, max(start - len(before) + 1, 0), end) if before else -1
        start = start if header < 0 else header + len(before)
        cut = content[: len(content) - (end - start)]
        kind = DifferenceKind.CUT if cut.strip() else DifferenceKind.TRIM
        return Place(start, end, ((kind, cut),))
    length = len(content)
    last = length - _smallest(length, lambda i: window.find(content[: length - i]) >= 0)
    if last < MIN_PART:
        return None
    start = window.find(content[:last])
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
