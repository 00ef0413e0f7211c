"""Messages of a conversation from plain data."""

from __future__ import annotations

from posttrain.core.errors import DataError, nearest
from posttrain.core.provenance import Role
from posttrain.core.task import Message


def messages_from(value: object) -> tuple[Message, ...]:
    """Messages from plain data: a list of ``{"role": ..., "content": ...}``.

    Raises:
        DataError: not a list, an empty one, an unknown role, or content that is not text.

    Example:
        >>> messages_from([{"role": "user", "content": "1+1="}])
        (Message(role=<Role.USER: 'user'>, content='1+1='),)
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(f"{found} for messages", expected="a list of {role, content}")
    return tuple(_message(turn, number) for number, turn in enumerate(value, start=1))


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"message {number} is {type(turn).__name__}", expected="an object {role, content}"
        )
    used = {key for key, value in turn.items() if value is not None}
    if used != {"role", "content"}:
        raise DataError(
            f"message {number} has the keys {sorted(used)}",
            expected="exactly role and content",
            fix="other keys would be lost in training: write tool calls into the content",
        )
    role, content = turn["role"], turn["content"]
    if role not in list(Role):
        raise DataError(
            f"message {number} has the role {role!r}", fix=nearest(str(role), map(str, Role))
        )
    if not isinstance(content, str):
        raise DataError(
            f"message {number} has content of type {type(content).__name__}", expected="text"
        )
    return Message(role=Role(role), content=content)
