"""What a run did and said."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec


def export_digest(folder: Path) -> tuple[str | None, dict[str, float]]:
    """Digest of a model folder's weights and template, and ``experts`` if an adapter has some."""
    from safetensors import safe_open

    digest, found = hashlib.sha256(), dict[str, float]()
    adapters = [*folder.glob("adapter_model.safetensors"), *folder.glob("adapter/*.safetensors")]
    for path in adapters:
        with safe_open(path, "np") as file:
            if any("experts" in name for name in file.keys()):  # noqa: SIM118  # no mapping
                found["experts"] = 1.0
    weights = [p for p in (folder / "model.safetensors", *adapters) if p.is_file()][:1]
    if not weights:
        return None, found
    for path in (*weights, folder / "chat_template.jinja"):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest(), found


class Result(msgspec.Struct, kw_only=True):
    """One run, from the outside.

    ``before`` are the steps of an earlier process, where a run is stopped and goes on.
    """

    end: Literal["finished", "error", "hung"]
    steps: int = 0
    before: int = 0
    words: str = ""  # of the error
    traceback: bool = False
    said: list[str] = []  # lines on the screen
    alarms: list[tuple[int, str]] = []  # step, words
    rewards: list[float] = []  # mean of every step
    first: dict[str, float] = {}  # metrics of the first step
    trained: list[str] = []  # trained tokens of the first rows as text, special tokens by name
    whole: list[list[int]] = []  # all token ids of the first rows
    ids: list[int] = []  # every token id that was trained on
    weights: str | None = None  # digest of the exported weights and template
    seconds: float = 0.0
