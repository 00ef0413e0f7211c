"""The token ids of a model folder, from its tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.errors import ModelError
from posttrain.models.entries import plain_file, read_json
from posttrain.models.files import TOKENIZER

TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Tokens by id, as far as ``tokenizer.json`` names them; empty for other tokenizers."""

    by_id: Mapping[int, str]
    special: frozenset[int]
    template: str  # the chat templates of the folder, as text
    id_of_end: int | None

    @property
    def size(self) -> int | None:
        """1 + the largest id; None when it is not known."""
        return max(self.by_id) + 1 if self.by_id else None

    def check(self, rows: int, *, folder: Path) -> None:
        """Every token has a row in the embeddings, or cannot occur.

        A special token without a row, which families of several media have in their text
        models, is allowed where no template writes it.

        Raises:
            ModelError: a token of the vocabulary or of a template without a row.
        """
        beyond = {i: text for i, text in sorted(self.by_id.items()) if i >= rows}
        real = [
            text for i, text in beyond.items() if i not in self.special or text in self.template
        ]
        if real:
            raise ModelError(
                f"{folder}: the tokenizer has {len(beyond)} tokens beyond the {rows:,} rows of "
                f"the embeddings: {', '.join(map(repr, real[:4]))}",
                expected="a row for every token",
                fix="model.resize_token_embeddings(len(tokenizer)) and save_pretrained, or the "
                "tokenizer files that belong to the model",
            )


def read_tokens(folder: Path) -> Tokens:
    """The tokens of a folder.

    Raises:
        ModelError: ``tokenizer.json`` is not what the tokenizers library writes.
    """
    settings = _settings(folder)
    template = "\n".join([*_texts(settings.get("chat_template")), *_template_files(folder)])
    if not (folder / TOKENIZER).exists():
        return Tokens({}, frozenset(), template, None)
    content = read_json(folder / TOKENIZER)
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict):
        raise _odd(folder, "model is not an object")
    by_id = _vocabulary(model.get("vocab"), folder)
    special = set[int]()
    for token in added if isinstance(added, list) else []:
        if not isinstance(token, dict) or type(token.get("id")) is not int:
            raise _odd(folder, f"an added token {token!r:.60}")
        by_id[token["id"]] = str(token.get("content"))
        if token.get("special") is True:
            special.add(token["id"])
    end = settings.get("eos_token")
    words = end.get("content") if isinstance(end, dict) else end
    ids = (i for i, text in by_id.items() if text == words)
    return Tokens(by_id, frozenset(special), template, next(ids, None))


def _settings(folder: Path) -> Mapping[str, object]:
    path = folder / TOKENIZER_CONFIG
    return read_json(path) if path.exists() else {}


def _vocabulary(vocab: object, folder: Path) -> dict[int, str]:
    """Ids of a vocabulary: {token: id}, or Unigram's list of [token, score]."""
    if vocab is None:
        return {}
    if isinstance(vocab, list):
        return {i: str(e[0]) for i, e in enumerate(vocab) if isinstance(e, list) and e}
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise _odd(folder, "the vocabulary does not map tokens to ids")
    return {i: token for token, i in vocab.items()}


def _template_files(folder: Path) -> list[str]:
    paths = [
        folder / "chat_template.jinja",
        *(folder / "additional_chat_templates").glob("*.jinja"),
    ]
    found = [plain_file(p) for p in paths if p.exists()]
    return [p.read_text(encoding="utf-8", errors="replace") for p in found]


def _texts(template: object) -> Sequence[str]:
    """A template, or named ones, as texts."""
    return [] if template is None else [json.dumps(template, ensure_ascii=False)]


def _odd(folder: Path, words: str) -> ModelError:
    return ModelError(
        f"{folder / TOKENIZER}: {words}",
        expected="a file of the tokenizers library",
        fix="save the tokenizer again with save_pretrained",
    )
