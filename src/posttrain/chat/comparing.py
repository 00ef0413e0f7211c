"""A rendered conversation against its messages: what was lost, added or changed."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.chat.places import Place, Stretch, changes_of
from posttrain.chat.texts import AnswerSpan, RenderedText
from posttrain.chat.tokenizer import Encoder
from posttrain.core.errors import DataError
from posttrain.core.provenance import Role
from posttrain.core.rendering import LOSSES, Change, DifferenceKind, Rules
from posttrain.core.task import Message


def compare(
    messages: Sequence[Message],
    rendered: RenderedText,
    stretches: Sequence[Stretch],
    *,
    first: int,
    answers: Sequence[AnswerSpan],
    encoder: Encoder,
    rules: Rules,
) -> None:
    """Report what the template did to the messages.

    Args:
        messages: the conversation.
        rendered: what the template made of it.
        stretches: the characters that are trained.
        first: number of the first message that may be trained, from 0.
        answers: where the answers are trained, when the template does not say.
        encoder: of the tokenizer, which knows the control tokens.
        rules: which differences are accepted.

    Raises:
        DataError: trained text is lost.
    """
    trained = [
        m.role is Role.ASSISTANT and n >= first and (p is None or _meets(p, stretches))
        for n, (m, p) in enumerate(zip(messages, rendered.places, strict=True))
    ]
    for change in changes_of(messages, rendered.places, trained=trained):
        accept(change, rules)
    for answer in answers:
        if answer.added.strip():
            rules.seen(Change(DifferenceKind.ADDED, answer.number + 1, True, answer.added))
        if answer.unopened.strip():
            rules.seen(Change(DifferenceKind.UNOPENED, answer.number + 1, True, answer.unopened))
    if rules.control_tokens == "parse":
        return
    for n, (message, place) in enumerate(zip(messages, rendered.places, strict=True)):
        for _, _, token in encoder.controls_in(message.content)[:1]:
            if place is None:
                raise _misplaced(n)
            rules.seen(Change(DifferenceKind.CONTROL, n + 1, trained[n], token))


def check_known(
    rendered: RenderedText,
    tokens: Sequence[int],
    offsets: Sequence[Stretch],
    stretches: Sequence[Stretch],
    *,
    unknown: int | None,
    rules: Rules,
) -> None:
    """Report characters of messages that the tokenizer does not know (token ``unknown``).

    Raises:
        DataError: they are trained.
    """
    if unknown is None or unknown not in tokens:
        return
    for token, (start, end) in zip(tokens, offsets, strict=True):
        if token != unknown:
            continue
        for n, place in enumerate(rendered.places):
            if place is not None and place.start <= start < place.end:
                trained = any(a <= start < b for a, b in stretches)
                text = rendered.text[start:end]
                accept(Change(DifferenceKind.UNKNOWN, n + 1, trained, text), rules)


def accept(change: Change, rules: Rules) -> None:
    """Report a change, or refuse it when it takes trained text away."""
    if change.trained and change.kind in LOSSES and change.kind not in rules.allow:
        raise DataError(
            f"{change.words}, which is trained",
            expected="answers that are trained as they are written",
            fix="mend the row, or give each answer a row of its own (prompt and completion); "
            f"`allow: [{change.kind}]` on the data set trains what is left",
        )
    rules.seen(change)


def _meets(place: Place, stretches: Sequence[Stretch]) -> bool:
    return any(place.start < b and a < max(place.end, place.start + 1) for a, b in stretches)


def _misplaced(number: int) -> DataError:
    return DataError(
        f"message {number + 1} holds control tokens, and the template rewrites it",
        expected="a message whose text can be found, to keep them text",
        fix="take them out, or set `control_tokens: parse` on the data set",
    )
