"""What is asked of a tokenizer, and how text becomes tokens when some of it must stay text.

    text ─────────────────────────────────────────────▶ tokenizer ──▶ ids, characters of each
    text with control tokens in a message, or a cut ──▶ twin ───────▶ the same

The twin is the tokenizer with its control tokens renamed to names that no text holds. In its text
the template's own control tokens are written by these names, so every other one is plain text. A
further token, which is dropped again, keeps tokens from reaching across a cut.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, final

from posttrain.core.errors import DataError

Stretch = tuple[int, int]  # [start, end) in characters

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text that is exchanged holds them
_CUT = f"{_OPEN}cut{_CLOSE}"


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
    def unk_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> object: ...

    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    @property
    def backend_tokenizer(self) -> Any: ...

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
class Encoder:
    """Encodes text in which some control tokens are text, and some tokens may not merge.

    Args:
        tokenizer: a fast tokenizer.
        ends: ids that end a turn; they are control tokens whatever the tokenizer calls them.
    """

    def __init__(self, tokenizer: Tokenizer, *, ends: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        wanted = set(ends)
        self.controls: Mapping[str, int] = {
            str(token.content): i
            for i, token in tokenizer.added_tokens_decoder.items()
            if (token.special or i in wanted) and str(token.content)
        }
        longest_first = sorted(self.controls, key=len, reverse=True)
        self.controls_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def controls_in(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, token) of the control tokens that the tokenizer would see in a text."""
        return [(m.start(), m.end(), m[0]) for m in self.controls_pattern.finditer(text)]

    def encode(
        self, text: str, *, as_text: Sequence[Stretch] = (), cuts: Sequence[int] = ()
    ) -> tuple[list[int], list[Stretch]]:
        """Ids and the characters of each. Special tokens in the text are the tokens themselves,
        but inside ``as_text`` they are text. No token reaches across a cut.

        Raises:
            DataError: the text holds a character that is reserved for this.
        """
        if not as_text or not any(_within(a, b, as_text) for a, b, _ in self.controls_in(text)):
            coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            offsets = list(coded["offset_mapping"])
            if not any(_straddled(offsets, cut) for cut in cuts):
                return list(coded["input_ids"]), offsets
        return self._by_twin(text, as_text=as_text, cuts=cuts)

    def _by_twin(
        self, text: str, *, as_text: Sequence[Stretch], cuts: Sequence[int]
    ) -> tuple[list[int], list[Stretch]]:
        if _OPEN in text or _CLOSE in text:
            raise DataError(
                "the text holds the character U+FDD0 or U+FDD1, which is no character",
                expected="text that can be exchanged",
            )
        marked, origin = self._marked(text, as_text=as_text, cuts=set(cuts))
        twin, cut = self._twin
        coded = twin.encode(marked, add_special_tokens=False)
        kept = [n for n, token in enumerate(coded.ids) if token != cut]
        offsets = [coded.offsets[n] for n in kept]
        return [coded.ids[n] for n in kept], [(origin[a], origin[b]) for a, b in offsets]

    def _marked(
        self, text: str, *, as_text: Sequence[Stretch], cuts: set[int]
    ) -> tuple[str, list[int]]:
        """The twin's text, and for each place in it the place in the text that it stands for."""
        inside = sorted(as_text)
        found = {a: (b, t) for a, b, t in self.controls_in(text) if not _within(a, b, inside)}
        parts: list[str] = []
        origin: list[int] = []
        at = 0
        for place in sorted({*found, *(c for c in cuts if 0 < c < len(text))}):
            if place < at:  # a cut inside of a control token: its own borders are cuts already
                continue
            parts.append(text[at:place])
            origin += range(at, place)
            at = place
            if place in cuts:
                parts.append(_CUT)
                origin += [place] * len(_CUT)
            if place in found:
                at, token = found[place]
                name = f"{_OPEN}{self.controls[token]}{_CLOSE}"
                parts.append(name)
                origin += [place] * len(name)
        parts.append(text[at:])
        origin += range(at, len(text) + 1)
        return "".join(parts), origin

    @cached_property
    def _twin(self) -> tuple[Any, int]:
        """The tokenizer with renamed control tokens, and the id of its cut."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Tokens

        core = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names = {token: f"{_OPEN}{i}{_CLOSE}" for token, i in self.controls.items()}
        for added in core["added_tokens"]:
            if added["content"] in names:
                added |= {"content": names[added["content"]], "normalized": False}
        model = core["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(t, t): i for t, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(t, t), score] for t, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        core |= {"post_processor": None, "truncation": None, "padding": None}
        twin = Tokens.from_str(json.dumps(core))
        twin.add_special_tokens([AddedToken(_CUT, special=True, normalized=False)])
        cut = twin.token_to_id(_CUT)
        assert cut is not None  # it was added
        return twin, cut


def _straddled(offsets: Sequence[Stretch], cut: int) -> bool:
    """Whether a token reaches across a cut. Tokens are in the order of their characters."""
    at = bisect_left(offsets, (cut, 0))
    return at > 0 and offsets[at - 1][1] > cut


def _within(start: int, end: int, stretches: Sequence[Stretch]) -> bool:
    """Whether a control token shares a character with a stretch of text."""
    return any(start < b and a < end for a, b in stretches)
