"""What is measured: models, what one step holds, settings of each side, and the bars to reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

Side = Literal["ours", "trl"]
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
Work = Literal["sft", "dpo", "grpo", "opd", "opd_distinct"]
WORKS: tuple[Work, ...] = ("sft", "dpo", "grpo", "opd", "opd_distinct")


class Dims(msgspec.Struct, frozen=True, kw_only=True):
    """The dimensions of a Qwen3 with tied embeddings."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    @property
    def body(self) -> int:
        """Weights in the matrices of the layers: what multiplies every token."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return self.layers * self.hidden * (2 * queries + 2 * keys + 3 * self.inner)

    @property
    def weights(self) -> int:
        """All weights, norms left out."""
        return self.body + self.vocab * self.hidden


SIZES = {
    d.name: d
    for d in (
        Dims(
            name="1m",
            layers=4,
            hidden=128,
            inner=384,
            heads=4,
            kv_heads=2,
            head_size=32,
            vocab=4096,
        ),
        Dims(
            name="7m",
            layers=6,
            hidden=256,
            inner=768,
            heads=8,
            kv_heads=4,
            head_size=32,
            vocab=8192,
        ),
        Dims(
            name="40m",
            layers=10,
            hidden=512,
            inner=1536,
            heads=8,
            kv_heads=4,
            head_size=64,
            vocab=16384,
        ),
        Dims(
            name="qwen3-0.6b",
            layers=28,
            hidden=1024,
            inner=3072,
            heads=16,
            kv_heads=8,
            head_size=128,
            vocab=151936,
        ),
        Dims(
            name="qwen3-1.7b",
            layers=28,
            hidden=2048,
            inner=6144,
            heads=16,
            kv_heads=8,
            head_size=128,
            vocab=151936,
        ),
    )
}
ON_CPU = ("1m", "7m", "40m")
"""Measured by default. The others have the shapes of real models, for a GPU."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one optimiser step holds.

    ``groups`` are prompts, pairs or documents. Prompts have ``prompt_tokens`` on average (from 7/8
    to 9/8 of it). A completion that is generated has exactly ``completion_tokens``; one that is
    given has from 3/4 to 5/4 of it. Documents have 32 to 500 tokens.
    """

    groups: int
    group_size: int = 1
    prompt_tokens: int = 128
    completion_tokens: int = 64


LOADS: dict[Work, Load] = {
    "sft": Load(groups=24),
    "dpo": Load(groups=16, group_size=2),
    "grpo": Load(groups=8, group_size=8),
    "opd": Load(groups=8, group_size=8),
    "opd_distinct": Load(groups=64, group_size=1),
}
QUICK: dict[Work, Load] = {
    "sft": Load(groups=8),
    "dpo": Load(groups=4, group_size=2, prompt_tokens=32, completion_tokens=16),
    "grpo": Load(groups=4, group_size=4, prompt_tokens=32, completion_tokens=16),
    "opd": Load(groups=4, group_size=4, prompt_tokens=32, completion_tokens=16),
    "opd_distinct": Load(groups=16, group_size=1, prompt_tokens=32, completion_tokens=16),
}


class Theirs(msgspec.Struct, frozen=True, kw_only=True):
    """How TRL runs a work. The values in :data:`THEIRS` were the fastest of those tried.

    ``rows`` go through the model together; a step accumulates as many such micro-batches as it
    needs. For SFT a row is a packed block of ``block`` tokens.
    """

    rows: int
    block: int = 0
    cache: str | None = None  # cache_implementation of generation
    continuous: bool = False  # use_transformers_continuous_batching, where the trainer has it
    checkpointing: bool = False


THEIRS: dict[Work, Theirs] = {
    "sft": Theirs(rows=1, block=512),
    "dpo": Theirs(rows=8),
    "grpo": Theirs(rows=8),
    "opd": Theirs(rows=8),
    "opd_distinct": Theirs(rows=8),
}


class Ours(msgspec.Struct, frozen=True, kw_only=True):
    """How we run a work. None is the stage's own default, which is what users get."""

    micro_batch_tokens: int | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The job of a worker process."""

    side: Side
    work: Work
    folder: str  # of the material
    load: Load
    threads: int
    device: Device = "cpu"
    dtype: Dtype = "float32"
    theirs: Theirs
    ours: Ours = Ours()
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """What a median must reach, and what we hope for. ``most``: at most instead of at least."""

    least: float
    hope: float
    most: bool = False


SPEED_BARS: dict[Work, Bar] = {
    "sft": Bar(least=3, hope=5),
    "dpo": Bar(least=4, hope=6),
    "grpo": Bar(least=4, hope=6),
    "opd": Bar(least=4, hope=6),
}
MEMORY_BAR = Bar(least=0.5, hope=0.35, most=True)
LIMIT_BAR = Bar(least=0.45, hope=0.65)
LIMIT_SIZES = ("7m", "40m")
GROUP_BAR = Bar(least=1.6, hope=1.3, most=True)
EXACT_BAR = Bar(least=1e-4, hope=1e-5, most=True)
MIN_PAIRS = 5


class Steps(Protocol):
    """Whoever watches a training loop."""

    def open(self) -> None:
        """Everything is built; the first step follows."""
        ...

    def step_done(self, parts: Mapping[str, float]) -> None:
        """A step ended; ``parts`` are seconds or counts by name. May raise ``Stopped``."""
        ...
