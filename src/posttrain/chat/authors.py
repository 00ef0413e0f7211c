"""Who wrote each token of a rendered text, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.chat.places import Place, Stretch
from posttrain.core.provenance import Kind, Producer, Role, Span
from posttrain.core.task import Message

Author = tuple[Role, Producer]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
_Ints = npt.NDArray[np.int64]


def authors_of(
    offsets: Sequence[Stretch],
    messages: Sequence[Message],
    places: Sequence[Place | None],
    *,
    producer: Producer,
    template: Producer,
    tail: Role,
) -> list[Author]:
    """The author of each token. A token with any character of a message has the message's
    author; a template token has the role of the message after it, ``tail`` after the last.
    """
    starts, ends = _edges(offsets)
    pairs = zip(places, messages, strict=True)
    found = sorted((p.start, p.end, m.role) for p, m in pairs if p is not None)
    following = np.searchsorted([start for start, _, _ in found], starts, side="right")
    roles = [role for _, _, role in found] + [tail]
    authors: list[Author] = [(roles[i], template) for i in following]
    for start, end, role in found:
        for t in np.flatnonzero((starts < end) & (ends > start)):
            authors[t] = (role, producer)
    return authors


def trained_by(
    producer: Producer, authors: Sequence[Author], mask: Mask, *, prompt_length: int
) -> list[Author]:
    """The authors, with the producer at the assistant's tokens that are trained.

    Answers after the prompt that the mask excludes are the environment's: as the producer's they
    would be trained.
    """
    unread = Producer(kind=Kind.ENVIRONMENT, name=producer.name, digest=producer.digest)
    out = list(authors)
    for t, (role, author) in enumerate(authors):
        if mask[t]:
            out[t] = (Role.ASSISTANT, producer)
        elif t >= prompt_length and role is Role.ASSISTANT and author == producer:
            out[t] = (role, unread)
    return out


def _edges(offsets: Sequence[Stretch]) -> tuple[_Ints, _Ints]:
    """Start and end of each token in characters; no token is empty, no start goes back."""
    starts = np.maximum.accumulate(np.array([s for s, _ in offsets], np.int64))
    return starts, np.maximum(np.array([e for _, e in offsets], np.int64), starts + 1)


def mask_of(
    offsets: Sequence[Stretch], stretches: Sequence[Stretch], *, start: int
) -> tuple[Mask, int]:
    """[T] the tokens in the stretches, and the number of tokens before ``start``."""
    starts, ends = _edges(offsets)
    mask = np.zeros(len(offsets), np.bool_)
    for a, b in stretches:
        mask |= (starts < b) & (ends > a)
    return mask, int((starts < start).sum())


def spans_of(authors: Sequence[Author]) -> tuple[Span, ...]:
    """Runs of equal role and author."""
    cuts = [t for t, (a, b) in enumerate(pairwise(authors), start=1) if a != b]
    edges = [0, *cuts, len(authors)] if authors else []
    return tuple(
        Span(length=end - start, role=authors[start][0], producer=authors[start][1])
        for start, end in pairwise(edges)
    )
