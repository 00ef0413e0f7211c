"""Conversations as text: what the template made of them, and where the answers start and end.

An answer starts where generation would: after the text that the generation prompt adds. It ends
with the token that ends its turn. Both are read from the template's own text around stand-ins, so
a row is rendered once, however many answers it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from posttrain.chat.places import Place, Stretch, places_of
from posttrain.chat.template import DATE, ChatTemplate
from posttrain.core.errors import DataError
from posttrain.core.provenance import Role
from posttrain.core.rendering import shortened
from posttrain.core.task import Message

# Private-use characters, which templates do not test for and real messages do not contain.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
_Roles = tuple[Role, ...]


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A conversation as the template wrote it."""

    text: str
    places: tuple[Place | None, ...]  # of the messages; None where nothing of one is left
    blocks: tuple[Stretch, ...]  # what ``{% generation %}`` blocks wrote

    @property
    def stretches(self) -> list[Stretch]:
        """The characters that are the messages'."""
        return [(p.start, p.end) for p in self.places if p is not None]


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Where an answer is trained: from where generation starts to the end of its turn."""

    number: int  # of the message, from 0
    start: int
    end: int
    added: str = ""  # text of the template's between the start and the message
    unopened: str = ""  # text of the generation prompt that is not there


@final
class TextRenderer:
    """Renders conversations to text.

    Args:
        template: the chat template.
        ends: texts of the tokens that end a turn.
        controls: matches the tokenizer's control tokens.
    """

    def __init__(
        self, template: ChatTemplate, *, ends: Iterable[str], controls: re.Pattern[str]
    ) -> None:
        self._template, self._controls = template, controls
        self._ends = re.compile("|".join(re.escape(e) for e in sorted(ends, key=len)) or "(?!)")
        self._skeletons: dict[tuple[_Roles, bool], list[str]] = {}

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> RenderedText:
        """The text of a conversation, and where its messages are.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
        """
        text, blocks = self._template.render(messages, generation=generation)
        skeleton = self._skeleton(_roles(messages), generation=generation)
        return RenderedText(text, tuple(places_of(messages, skeleton, text)), tuple(blocks))

    def answer(
        self, messages: Sequence[Message], rendered: RenderedText, *, number: int
    ) -> AnswerSpan | None:
        """Where message ``number`` is trained; None when nothing of it is left.

        Raises:
            DataError: generation would start with another text than stands before the answer.
        """
        place = rendered.places[number]
        if place is None:
            return None
        start, unopened = self._start(messages, rendered, number, place)
        return AnswerSpan(
            number=number,
            start=start,
            end=self._end(messages, rendered, number, place),
            added=rendered.text[start : place.start],
            unopened=unopened,
        )

    def check_prompt(
        self, messages: Sequence[Message], rendered: RenderedText, answer: AnswerSpan
    ) -> None:
        """Check that generation would read the text that stands before the answer.

        Raises:
            DataError: the template renders the messages before it differently when more follow.
        """
        asked, _ = self._template.render(messages[: answer.number], generation=True)
        if not asked.startswith(rendered.text[: answer.start]):
            raise _rewrites(asked, rendered.text, answer.number)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the template adds to every conversation, in words."""
        words = []
        if self._adds_system:
            words.append(f"template adds a system prompt: {shortened(self._before, 60)}")
        if self._template.reads_clock:
            words.append(f"template asks for the date and always gets {DATE:%Y-%m-%d}")
        return tuple(words)

    @cached_property
    def _before(self) -> str:
        """The template's own text before the first user message."""
        found = self._skeleton((Role.USER,), generation=True)
        return found[0] if found else ""

    @cached_property
    def _adds_system(self) -> bool:
        """Whether a conversation without a system message gets a system prompt all the same."""
        given = self._skeleton((Role.SYSTEM, Role.USER), generation=True)
        if not given or given[1] != "0" or not self._before.startswith(given[0]):
            return False
        own = self._before.removesuffix(given[2])
        words = re.findall(r"\w+", self._controls.sub(" ", own))
        return own != self._before and bool(set(words) - set(map(str, Role)))

    @cached_property
    def after_answer(self) -> str | None:
        """The template's own text after an answer; None when it cannot be determined."""
        found = self._skeleton((Role.USER, Role.ASSISTANT), generation=False)
        return found[-1] if found else None

    def ends_turn(self, text: str) -> bool:
        """Whether a token that ends a turn is in the text."""
        return self._ends.search(text) is not None

    def _start(
        self, messages: Sequence[Message], rendered: RenderedText, number: int, place: Place
    ) -> tuple[int, str]:
        """Where generation would start the answer, and what it would start with beyond that."""
        if number == 0:
            return place.start, ""
        asked = self._skeleton(_roles(messages[:number]), generation=True)
        plain = self._skeleton(_roles(messages[:number]), generation=False)
        last = rendered.places[number - 1]
        if not asked or not plain or asked[-2] != str(number - 1):
            return self._start_by_rendering(messages, rendered, number)
        header = asked[-1][_num_same(asked[-1], plain[-1]) :]
        if last is not None and last.end <= place.start:
            if rendered.text.startswith(asked[-1], last.end):
                return last.end + len(asked[-1]), ""
            between = rendered.text[last.end : place.start]
            if asked[-1].startswith(between):
                return place.start, asked[-1][len(between) :]
        found = rendered.text.rfind(header, 0, place.start) if header else -1
        if found < 0:
            whole, _ = self._template.render(messages[:number], generation=True)
            raise _rewrites(whole, rendered.text, number)
        return found + len(header), ""

    def _start_by_rendering(
        self, messages: Sequence[Message], rendered: RenderedText, number: int
    ) -> tuple[int, str]:
        asked, _ = self._template.render(messages[:number], generation=True)
        if not rendered.text.startswith(asked):
            raise _rewrites(asked, rendered.text, number)
        return len(asked), ""

    def _end(
        self, messages: Sequence[Message], rendered: RenderedText, number: int, place: Place
    ) -> int:
        """The end of the turn's end token; without one, of the message."""
        skeleton = self._skeleton(_roles(messages[: number + 1]), generation=False)
        own = skeleton[-1] if skeleton and skeleton[-2] == str(number) else ""
        if own and rendered.text.startswith(own, place.end):
            found = [place.end + m.end() for m in self._ends.finditer(own)]
            return found[-1] if found else place.end
        later = (p.start for p in rendered.places[number + 1 :] if p and p.start >= place.end)
        first = self._ends.search(rendered.text, place.end, next(later, len(rendered.text)))
        return first.end() if first else place.end

    def _skeleton(self, roles: _Roles, *, generation: bool) -> list[str]:
        """The template's own text: [before, message number, between, message number, …, after].

        Empty when it cannot be determined: some templates depend on the messages' content.
        """
        key = (roles, generation)
        if key not in self._skeletons:
            stand_ins = [Message(r, f"\ue000{i}\ue001") for i, r in enumerate(roles)]
            try:
                text, _ = self._template.render(stand_ins, generation=generation)
            except DataError:
                text = ""
            found = _STAND_IN.split(text) if text else []
            # A message that the template leaves out, or writes twice, has no single place.
            whole = sorted(map(int, found[1::2])) == list(range(len(roles)))
            self._skeletons[key] = found if whole else []
        return self._skeletons[key]


def _roles(messages: Sequence[Message]) -> _Roles:
    return tuple(m.role for m in messages)


def _num_same(a: str, b: str) -> int:
    """Number of characters with which both texts begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def _rewrites(asked: str, text: str, number: int) -> DataError:
    at = _num_same(asked, text)
    old, new = asked[at : at + 40], text[at : at + 40]
    return DataError(
        f"the template renders the first {number} messages differently when more follow: after "
        f"{at} characters, {shortened(old)} becomes {shortened(new)}",
        expected="a conversation that only grows at its end",
        fix="use `assistant_mask: template` with {% generation %} blocks, or split the row into "
        "one conversation per answer",
    )
