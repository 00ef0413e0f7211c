"""Conversations: rendered to tokens with authors, compared with their messages, and decoded.

messages ──chat template──▶ text ──tokenizer──▶ tokens + spans
    └──── compared ──────────┘└─ author of each character ─▲

The text of a message belongs to its author; the author of every other token of a rendered
conversation is the chat template. This module imports neither torch nor transformers: callers
pass a tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from posttrain.chat.authors import Author, authors_of, mask_of, spans_of, trained_by
from posttrain.chat.comparing import check_known, compare
from posttrain.chat.tokenizer import Encoder, Tokenizer
from posttrain.core.errors import DataError, ModelError
from posttrain.core.provenance import IntArray, Kind, Producer, Role
from posttrain.core.rendering import STRICT, Change, DifferenceKind, Rules
from posttrain.core.task import Message, Task
from posttrain.core.trajectory import Trajectory
from posttrain.protocols import Prompt

if TYPE_CHECKING:
    from posttrain.chat.texts import AnswerSpan, RenderedText, TextRenderer

AssistantMask = Literal["template", "prefix"]

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@final
class ChatRenderer:
    """Renders tasks and conversations to tokens with authors, and decodes tokens to text.

    Args:
        tokenizer: a fast tokenizer (it must map characters to tokens).
        end_tokens: additional ids that end a turn, from the model's generation config.

    Raises:
        ModelError: the tokenizer is a slow one, has no end-of-turn token, or a chat template that
            cannot be used.
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
        self._encoder = Encoder(tokenizer, ends=self._ends)
        self._opening = self._tokens_put_in_front()
        self._template = Producer(kind=Kind.TEMPLATE, name="tokenizer")
        self._marks_assistant = False
        self._ends_checked = False
        self._texts: TextRenderer | None = None
        if self.has_template:
            # Imported here: planning and listing methods do without Jinja.
            from posttrain.chat.loading import load_template
            from posttrain.chat.texts import TextRenderer

            template = load_template(tokenizer)
            digest = hashlib.sha256(template.source.encode()).hexdigest()
            self._template = Producer(kind=Kind.TEMPLATE, name="chat-template", digest=digest)
            self._marks_assistant = _GENERATION_BLOCK.search(template.source) is not None
            self._texts = TextRenderer(
                template,
                ends=map(self.token_text, self._ends),
                controls=self._encoder.controls_pattern,
            )

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

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides how text becomes tokens: equal digests render alike."""
        from posttrain.chat.loading import variables_of

        tokens = self._tokenizer.backend_tokenizer.to_str()
        parts = (tokens, self._template.digest, variables_of(self._tokenizer), sorted(self._ends))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the template adds to every conversation, in words."""
        return () if self._texts is None else self._texts.remarks

    def prompt(self, task: Task) -> Prompt:
        """Render a task up to the start of the answer.

        A conversation goes through the chat template; plain text is tokenised without changes,
        with a start token only if the tokenizer itself adds one. Control tokens inside messages
        are text.

        Raises:
            ModelError: a conversation, and the tokenizer has no chat template, or one that ends
                turns with a token that ends nothing.
            DataError: the template rejects the conversation.
        """
        author = Producer(kind=Kind.ENVIRONMENT, name=task.taskset)
        if isinstance(task.prompt, str):
            tokens, authors = self._plain(task.prompt, author, rules=STRICT)
        else:
            texts = self._checked_texts()
            rendered = texts.render(task.prompt, generation=True)
            tokens, offsets = self._encoder.encode(rendered.text, as_text=rendered.stretches)
            authors = authors_of(
                offsets,
                task.prompt,
                rendered.places,
                producer=author,
                template=self._template,
                tail=Role.ASSISTANT,
            )
        return Prompt(tokens=np.array(tokens, np.int32), spans=spans_of(authors))

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        producer: Producer,
        task: str,
        assistant_mask: AssistantMask = "template",
        num_prompt: int | None = None,
        rules: Rules = STRICT,
    ) -> Trajectory:
        """A whole conversation written by ``producer``, whose assistant turns are trained.

        ``trainable`` is the assistant mask: the template's ``{% generation %}`` blocks, or with
        ``prefix`` each answer from where generation would start it, up to and with the token
        that ends its turn. No token reaches across the start of an answer, since none does when
        a model is sampled.

        Args:
            messages: the turns.
            producer: author of all tokens but the template's.
            task: key of the task or row.
            assistant_mask: where the mask comes from.
            num_prompt: number of leading messages that are the prompt and are not trained; the
                prompt then ends where generation would start. None: every assistant turn is
                trained, and the prompt ends at the first trained token.
            rules: which differences between the messages and their text are accepted.

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template has no generation block, rejects the conversation, renders
                its first messages differently when more follow, or cuts text that is trained.
        """
        texts = self._checked_texts()
        self._check_marks(assistant_mask)
        rendered = texts.render(messages)
        first = num_prompt or 0
        start = 0
        if num_prompt is not None:
            start = self._end_of_prompt(messages, rendered, num_prompt)
        answers = self._answers(messages, rendered, first) if assistant_mask == "prefix" else []
        stretches = [(a.start, a.end) for a in answers]
        if assistant_mask == "template":
            stretches = [(max(a, start), b) for a, b in rendered.blocks if b > start]
        compare(
            messages,
            rendered,
            stretches,
            first=first,
            answers=answers,
            encoder=self._encoder,
            rules=rules,
        )
        tokens, offsets = self._encoder.encode(
            rendered.text,
            as_text=rendered.stretches if rules.control_tokens == "text" else (),
            cuts=(start, *(a for a, _ in stretches)),
        )
        unknown = self._tokenizer.unk_token_id
        check_known(rendered, tokens, offsets, stretches, unknown=unknown, rules=rules)
        mask, prompt_length = mask_of(offsets, stretches, start=start)
        if num_prompt is None:
            prompt_length = int(mask.argmax()) if mask.any() else len(tokens)
        authors = authors_of(
            offsets,
            messages,
            rendered.places,
            producer=producer,
            template=self._template,
            tail=messages[-1].role,
        )
        authors = trained_by(producer, authors, mask, prompt_length=prompt_length)
        return Trajectory(
            task=task,
            tokens=np.array(tokens, np.int32),
            prompt_length=prompt_length,
            spans=spans_of(authors),
        )

    def completion(
        self,
        prompt: str,
        completion: str,
        *,
        producer: Producer,
        task: str,
        rules: Rules = STRICT,
    ) -> Trajectory:
        """Plain text and its continuation, no template. The end token is added, and trained.

        Prompt and completion are tokenised separately, as when the model is sampled. An end token
        that a completion ends with is that token, and no other is added.

        Raises:
            DataError: a text begins or ends with a control token: a template was applied to it
                already, and its tokens would be text here.
        """
        tokens, authors = self._plain(prompt, producer, rules=rules)
        body, end = self._split_end(completion)
        written = self._plain_tokens(body, rules=rules)
        if not prompt and self._is_opened(written):
            written = written[len(self._opening) :]
        if not written or written[-1] not in self._ends:
            written = [*written, end]
        return Trajectory(
            task=task,
            tokens=np.array([*tokens, *written], np.int32),
            prompt_length=len(tokens),
            spans=spans_of([*authors, *[(Role.ASSISTANT, producer)] * len(written)]),
        )

    def answer(self, task: Task, text: str, *, rules: Rules = STRICT) -> IntArray:
        """The tokens of an answer with this text, up to and with its end-of-turn token.

        Raises:
            DataError: the template renders the prompt differently when an answer follows.
        """
        author = Producer(kind=Kind.EXTERNAL, name=task.taskset)
        if isinstance(task.prompt, str):
            whole = self.completion(task.prompt, text, producer=author, task=task.key, rules=rules)
            return whole.tokens[whole.prompt_length :]
        turns = (*task.prompt, Message(role=Role.ASSISTANT, content=text))
        whole = self.conversation(
            turns,
            producer=author,
            task=task.key,
            assistant_mask="prefix",
            num_prompt=len(task.prompt),
            rules=rules,
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

    # --- conversations -----------------------------------------------------------------------

    def _checked_texts(self) -> TextRenderer:
        """The template as text.

        Raises:
            ModelError: there is none, or its turns end with a token that ends nothing.
        """
        if self._texts is None:
            raise ModelError(
                "a conversation, but the tokenizer has no chat template",
                expected="a chat_template in the model folder",
                fix="use a chat model, add a template, or write prompts as plain text",
            )
        if not self._ends_checked:
            from posttrain.chat.loading import check_end_of_turn

            check_end_of_turn(self._texts, self._encoder, map(self.token_text, self._ends))
            self._ends_checked = True
        return self._texts

    def _end_of_prompt(
        self, messages: Sequence[Message], rendered: RenderedText, num_prompt: int
    ) -> int:
        """Where generation would start the first answer, in characters."""
        texts = self._checked_texts()
        answer = texts.answer(messages, rendered, number=num_prompt)
        if answer is None:
            raise DataError(
                f"nothing of message {num_prompt + 1} is left in the text of the template",
                expected="the answer that the prompt asks for",
            )
        texts.check_prompt(messages, rendered, answer)
        return answer.start

    def _answers(
        self, messages: Sequence[Message], rendered: RenderedText, first: int
    ) -> list[AnswerSpan]:
        """Where the assistant's turns are trained."""
        texts = self._checked_texts()
        numbers = [n for n, m in enumerate(messages) if m.role is Role.ASSISTANT and n >= first]
        found = (texts.answer(messages, rendered, number=n) for n in numbers)
        return [answer for answer in found if answer is not None]

    def _check_marks(self, assistant_mask: AssistantMask) -> None:
        if assistant_mask == "template" and not self._marks_assistant:
            raise DataError(
                "the chat template does not mark what the assistant writes, so nothing would be "
                "trained",
                expected="a {% generation %} … {% endgeneration %} block around each answer and "
                "its end-of-turn token",
                fix="add the block to the template, or set `assistant_mask: prefix`",
            )

    # --- tokens ------------------------------------------------------------------------------

    def _tokens_put_in_front(self) -> list[int]:
        """Tokens that the tokenizer itself adds before any text, such as a start token. Those
        that some add after it are left out: an end token would close the prompt."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return list(full[: next(starts, 0)])

    def _plain(
        self, text: str, author: Producer, *, rules: Rules
    ) -> tuple[list[int], list[Author]]:
        body = self._plain_tokens(text, rules=rules)
        put = [] if self._is_opened(body) else self._opening
        opening = (Role.USER, Producer(kind=Kind.TEMPLATE, name="tokenizer"))
        return [*put, *body], [opening] * len(put) + [(Role.USER, author)] * len(body)

    def _split_end(self, text: str) -> tuple[str, int]:
        """A text without the end token that it was given, and the token that ends it."""
        found = self._encoder.controls_in(text)[-1:]
        for start, end, token in found:
            if end == len(text) and self._encoder.controls[token] in self._ends:
                return text[:start], self._encoder.controls[token]
        return text, self._eos

    def _is_opened(self, tokens: Sequence[int]) -> bool:
        """Whether tokens begin with what the tokenizer itself would put in front."""
        return bool(self._opening) and list(tokens[: len(self._opening)]) == self._opening

    def _plain_tokens(self, text: str, *, rules: Rules) -> list[int]:
        """The tokens of plain text."""
        found = self._encoder.controls_in(text)
        if not found or rules.control_tokens == "parse":
            return self._encoder.encode(text)[0]
        start, end, token = found[0] if not text[: found[0][0]].strip() else found[-1]
        if not text[:start].strip() or not text[end:].strip():
            raise DataError(
                f"plain text that begins or ends with the control token {token}: {text[:60]!r}",
                expected="text without control tokens: a chat template seems to be applied already",
                fix="give messages, or set `control_tokens: parse` on the data set",
            )
        rules.seen(Change(DifferenceKind.CONTROL, 1, True, token))
        return self._encoder.encode(text, as_text=[(0, len(text))])[0]
