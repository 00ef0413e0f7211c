"""Conversations: read from files, rendered to tokens with authors, and decoded to text.

rows ──messages_from──▶ messages ──chat template──▶ text ──tokenizer──▶ tokens + spans
                                        └─ author of each character ───────────▲

The text of a message belongs to its author; the author of every other token of a rendered
conversation is the chat template. This module imports neither torch nor transformers: callers
pass a tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, final

import numpy as np

from posttrain.core.errors import DataError, ModelError, nearest
from posttrain.core.provenance import IntArray, Kind, Producer, Role, Span
from posttrain.core.task import Message, Task
from posttrain.core.trajectory import Trajectory
from posttrain.protocols import Prompt

AssistantMask = Literal["template", "prefix"]
Author = tuple[Role, Producer]
Stretch = tuple[int, int]  # [start, end) in characters

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Private-use characters, which templates do not test for and real messages do not contain.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")


# --- reading rows ----------------------------------------------------------------------------


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


# --- rendering -------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """The interface of a transformers fast tokenizer that is used here."""

    @property
    def is_fast(self) -> bool: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> object: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], /, **options: Any) -> Any: ...

    def decode(self, token_ids: list[int], /, **options: Any) -> str: ...

    def __call__(self, text: str, /, **options: Any) -> Mapping[str, Any]: ...


def token_texts(folder: Path) -> Callable[[int], str]:
    """The text of a token id, special tokens by name, from a model folder.

    Equal to :meth:`ChatRenderer.token_text`. Needs the tokenizers library only: transformers
    takes seconds to import.
    """
    from tokenizers import Tokenizer as Tokens

    tokens = Tokens.from_file(str(folder / "tokenizer.json"))
    return lambda token: str(tokens.decode([token], skip_special_tokens=False))


@final
class ChatRenderer:
    """Renders tasks and conversations to tokens with authors, and decodes tokens to text.

    Args:
        tokenizer: a fast tokenizer (it must map characters to tokens).
        end_tokens: additional ids that end a turn, from the model's generation config.

    Raises:
        ModelError: the tokenizer is a slow one, or has no end-of-turn token.
    """

    def __init__(self, tokenizer: Tokenizer, *, end_tokens: Iterable[int] = ()) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} cannot trace tokens to characters",
                expected="a fast tokenizer (a tokenizer.json in the model folder)",
            )
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._ends = frozenset((*own, *end_tokens))
        if not self._ends:
            raise ModelError(
                "the tokenizer names no end-of-sequence token",
                expected="eos_token in the tokenizer, or eos_token_id in the generation config",
                fix="without one a learner never learns to stop; set tokenizer.eos_token",
            )
        self._eos = own[0] if own else min(self._ends)
        self._unread = self._ends | {tokenizer.bos_token_id, tokenizer.pad_token_id}
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[tuple[Role, ...], bool], list[str]] = {}
        self._opening = self._tokens_put_in_front()
        self._template = Producer(kind=Kind.TEMPLATE, name="tokenizer")
        self._marks_assistant = False
        if self.has_template:
            text = tokenizer.get_chat_template()
            digest = hashlib.sha256(text.encode()).hexdigest()
            self._template = Producer(kind=Kind.TEMPLATE, name="chat-template", digest=digest)
            self._marks_assistant = _GENERATION_BLOCK.search(text) is not None

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a turn."""
        return self._ends

    @property
    def has_template(self) -> bool:
        """True when the tokenizer can render conversations."""
        return self._tokenizer.chat_template is not None

    @property
    def template(self) -> Producer:
        """The author of template tokens; its digest is the sha256 of the template's text."""
        return self._template

    def prompt(self, task: Task) -> Prompt:
        """Render a task up to the start of the answer.

        A conversation goes through the chat template; plain text is tokenised without changes,
        with a start token only if the tokenizer itself adds one.

        Raises:
            ModelError: a conversation, and the tokenizer has no chat template.
            DataError: the template rejects the conversation.
        """
        author = Producer(kind=Kind.ENVIRONMENT, name=task.taskset)
        if isinstance(task.prompt, str):
            tokens, authors = self._plain(task.prompt, author)
        else:
            tokens, offsets, text = self._rendered(task.prompt, generation=True)
            places = self._places(task.prompt, text, generation=True)
            authors = self._authors(task.prompt, offsets, places, author, tail=Role.ASSISTANT)
        return Prompt(tokens=np.array(tokens, np.int32), spans=_spans(authors))

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        producer: Producer,
        task: str,
        assistant_mask: AssistantMask = "template",
        num_prompt: int | None = None,
    ) -> Trajectory:
        """A whole conversation written by ``producer``, whose assistant turns are trained.

        ``trainable`` is the assistant mask: the template's ``{% generation %}`` blocks, or with
        ``prefix`` the tokens that each answer adds to the rendered prompt before it, up to and
        with the end-of-turn token.

        Args:
            messages: the turns.
            producer: author of all tokens but the template's.
            task: key of the task or row.
            assistant_mask: where the mask comes from.
            num_prompt: number of leading messages that are the prompt and are not trained; the
                prompt then ends where generation would start. None: every assistant turn is
                trained, and the prompt ends at the first trained token.

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template has no generation block, rejects the conversation, or renders
                its first messages differently when more follow.
        """
        tokens, offsets, text = self._rendered(messages)
        start = 0
        if num_prompt is not None:
            head = self._rendered(messages[:num_prompt], generation=True)[0]
            self._check_extends(head, tokens, turn=num_prompt)
            start = len(head)
        if assistant_mask == "prefix":
            mask = self._mask_by_prefix(messages, tokens, first=num_prompt or 0)
        else:
            mask = self._mask_by_template(messages)
        mask[:start] = False
        prompt_length = start
        if num_prompt is None:
            prompt_length = int(mask.argmax()) if mask.any() else len(tokens)
        places = self._places(messages, text, generation=False)
        authors = self._authors(messages, offsets, places, producer, tail=messages[-1].role)
        unread = Producer(
            kind=Kind.ENVIRONMENT, name=producer.name, digest=producer.digest
        )  # for answers after the prompt that the mask excludes: the producer's would be trained
        for t, (role, author) in enumerate(authors):
            if mask[t]:
                authors[t] = (Role.ASSISTANT, producer)
            elif t >= prompt_length and role is Role.ASSISTANT and author == producer:
                authors[t] = (role, unread)
        return Trajectory(
            task=task,
            tokens=np.array(tokens, np.int32),
            prompt_length=prompt_length,
            spans=_spans(authors),
        )

    def completion(
        self, prompt: str, completion: str, *, producer: Producer, task: str
    ) -> Trajectory:
        """Plain text and its continuation, no template. The end token is added, and trained.

        Prompt and completion are tokenised separately, as when the model is sampled.
        """
        tokens, authors = self._plain(prompt, producer)
        written: list[int] = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        if not written or written[-1] not in self._ends:
            written = [*written, self._eos]
        return Trajectory(
            task=task,
            tokens=np.array([*tokens, *written], np.int32),
            prompt_length=len(tokens),
            spans=_spans([*authors, *[(Role.ASSISTANT, producer)] * len(written)]),
        )

    def answer(self, task: Task, text: str) -> IntArray:
        """The tokens of an answer with this text, up to and with its end-of-turn token.

        Raises:
            DataError: the template renders the prompt differently when an answer follows.
        """
        author = Producer(kind=Kind.EXTERNAL, name=task.taskset)
        if isinstance(task.prompt, str):
            whole = self.completion(task.prompt, text, producer=author, task=task.key)
            return whole.tokens[whole.prompt_length :]
        turns = (*task.prompt, Message(role=Role.ASSISTANT, content=text))
        whole = self.conversation(
            turns,
            producer=author,
            task=task.key,
            assistant_mask="prefix",
            num_prompt=len(task.prompt),
        )
        return whole.tokens[np.flatnonzero(whole.trainable)]

    def text(self, tokens: IntArray) -> str:
        """The completion as a verifier reads it: without start, padding and end tokens.

        Every other special token is kept: many tokenizers have ``<think>`` or ``<answer>`` as one,
        and what the policy writes must not be hidden from what judges it.
        """
        kept = [int(t) for t in tokens if int(t) not in self._unread]
        return self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def token_text(self, token: int) -> str:
        """One token as text, special tokens by name. For display only: tokens that are parts of
        a character have no text."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def show(self, trajectory: Trajectory) -> str:
        """The full text with every trained run of tokens in ⟦ ⟧, to check a mask by eye."""
        runs = groupby(zip(trajectory.trainable, trajectory.tokens, strict=True), lambda p: p[0])
        parts = []
        for trained, run in runs:
            text = self._tokenizer.decode([int(t) for _, t in run], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if trained else text)
        return "".join(parts)

    def _tokens_put_in_front(self) -> list[int]:
        """Tokens that the tokenizer itself adds before any text, such as a start token. Those
        that some add after it are left out: an end token would close the prompt."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return list(full[: next(starts, 0)])

    def _plain(self, text: str, author: Producer) -> tuple[list[int], list[Author]]:
        body: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        opening = (Role.USER, Producer(kind=Kind.TEMPLATE, name="tokenizer"))
        authors = [opening] * len(self._opening) + [(Role.USER, author)] * len(body)
        return [*self._opening, *body], authors

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateError  # planning and listing methods do without it

        if not self.has_template:
            raise ModelError(
                "a conversation, but the tokenizer has no chat template",
                expected="a chat_template in the model folder",
                fix="use a chat model, add a template, or write prompts as plain text",
            )
        turns = [{"role": str(m.role), "content": m.content} for m in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, **options)
        except (TemplateError, TypeError, ValueError) as error:
            roles = [str(m.role) for m in messages]
            raise DataError(f"the chat template refuses the turns {roles}: {error}") from error

    def _rendered(
        self, messages: Sequence[Message], *, generation: bool = False
    ) -> tuple[list[int], list[Stretch], str]:
        """Token ids, the characters of each token, and the text they come from."""
        text = self._apply(messages, tokenize=False, add_generation_prompt=generation)
        # The template writes its own special tokens; adding them again would double the start.
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(coded["input_ids"]), list(coded["offset_mapping"]), text

    def _mask_by_template(self, messages: Sequence[Message]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if not self._marks_assistant:
            raise DataError(
                "the chat template does not mark what the assistant writes, so nothing would be "
                "trained",
                expected="a {% generation %} … {% endgeneration %} block around each answer and "
                "its end-of-turn token",
                fix="add the block to the template, or set `assistant_mask: prefix`",
            )
        coded = self._apply(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(coded["assistant_masks"], np.bool_)

    def _mask_by_prefix(
        self, messages: Sequence[Message], tokens: list[int], *, first: int
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        mask = np.zeros(len(tokens), np.bool_)
        for turn in range(first, len(messages)):
            if messages[turn].role is not Role.ASSISTANT:
                continue
            before = self._rendered(messages[:turn], generation=True)[0]
            after = self._rendered(messages[: turn + 1])[0]
            self._check_extends(before, after, turn=turn)
            ends = [t for t in range(len(before), len(after)) if after[t] in self._ends]
            end = ends[-1] + 1 if ends else len(after)  # a line break after the end is not written
            self._check_extends(after[:end], tokens, turn=turn + 1)
            mask[len(before) : end] = True
        return mask

    def _check_extends(self, head: list[int], whole: list[int], *, turn: int) -> None:
        if whole[: len(head)] == head:
            return
        same = zip(head, whole, strict=False)
        at = next((i for i, (a, b) in enumerate(same) if a != b), len(whole))
        old, new = (self._tokenizer.decode(ids[at : at + 8]) for ids in (head, whole))
        raise DataError(
            f"the template renders the first {turn} messages differently when more follow: "
            f"token {at} on, {old!r} becomes {new!r}",
            expected="a conversation that only grows at its end",
            fix="use `assistant_mask: template` with {% generation %} blocks, or split the row "
            "into one conversation per answer",
        )

    def _skeleton(self, messages: Sequence[Message], *, generation: bool) -> list[str]:
        """The template's own text: [before, message number, between, message number, …, after].

        Empty when it cannot be determined: some templates depend on the messages' content.
        """
        key = (tuple(m.role for m in messages), generation)
        if key not in self._skeletons:
            stand_ins = [Message(m.role, f"\ue000{i}\ue001") for i, m in enumerate(messages)]
            try:
                text = self._apply(stand_ins, tokenize=False, add_generation_prompt=generation)
            except DataError:
                text = ""
            self._skeletons[key] = _STAND_IN.split(text) if text else []
        return self._skeletons[key]

    def _places(
        self, messages: Sequence[Message], text: str, *, generation: bool
    ) -> list[Stretch | None]:
        """Where each message's content is in the rendered text; None where the template rewrote
        it (some strip the reasoning from earlier turns)."""
        skeleton = self._skeleton(messages, generation=generation)
        return _fit(messages, skeleton, text) or _search(messages, text)

    def _authors(
        self,
        messages: Sequence[Message],
        offsets: Sequence[Stretch],
        places: Sequence[Stretch | None],
        producer: Producer,
        *,
        tail: Role,
    ) -> list[Author]:
        """The author of each token. A token with any character of a message has the message's
        author; a template token has the role of the message after it, ``tail`` after the last.
        """
        starts = np.array([s for s, _ in offsets], np.int64)
        ends = np.maximum(np.array([e for _, e in offsets], np.int64), starts + 1)
        found = [(p, m.role) for p, m in zip(places, messages, strict=True) if p is not None]
        found.sort()
        following = np.searchsorted([p[0] for p, _ in found], starts, side="right")
        roles = [role for _, role in found] + [tail]
        authors: list[Author] = [(roles[i], self._template) for i in following]
        for (start, end), role in found:
            for t in np.flatnonzero((starts < end) & (ends > start)):
                authors[t] = (role, producer)
        return authors


_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)


def _fit(messages: Sequence[Message], skeleton: list[str], text: str) -> list[Stretch | None]:
    """Places from matching the skeleton to the text. Empty unless it matches completely."""
    places: list[Stretch | None] = [None] * len(messages)
    if not skeleton or not text.startswith(skeleton[0]):
        return []
    at = len(skeleton[0])
    for number, after in zip(skeleton[1::2], skeleton[2::2], strict=True):
        content = messages[int(number)].content
        sizes = [len(trim(content)) for trim in _TRIMS if text.startswith(trim(content), at)]
        size = next((n for n in sizes if text.startswith(after, at + n)), None)
        if size is None:
            return []
        places[int(number)] = (at, at + size)
        at += size + len(after)
    return places if at == len(text) else []


def _search(messages: Sequence[Message], text: str) -> list[Stretch | None]:
    """Places of the contents in order, each the first match after the previous one."""
    places: list[Stretch | None] = []
    at = 0
    for message in messages:
        content = message.content if message.content in text[at:] else message.content.strip()
        start = text.find(content, at)
        places.append(None if start < 0 else (start, start + len(content)))
        at = at if start < 0 else start + len(content)
    return places


def _spans(authors: Sequence[Author]) -> tuple[Span, ...]:
    """Runs of equal role and author."""
    cuts = [t for t, (a, b) in enumerate(pairwise(authors), start=1) if a != b]
    edges = [0, *cuts, len(authors)] if authors else []
    return tuple(
        Span(length=end - start, role=authors[start][0], producer=authors[start][1])
        for start, end in pairwise(edges)
    )
