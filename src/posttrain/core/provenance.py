"""Who wrote a run of tokens, and from which distribution.

Provenance decides the regime: a token sampled from the live learner is *on-policy*, any other is
*off-policy* (arXiv 2604.07941, section 3.1). It is recorded per span, with the tokens, and never
changes afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import DataError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


class Kind(StrEnum):
    """The kind of author of a span.

    Code branches on *liveness* only (``kind is Kind.LEARNER``: sampled from the model being
    trained). The other kinds serve accounting and a term's ``where``.
    """

    HUMAN = "human"
    EXTERNAL = "external"  # a data set whose individual authors are unknown
    TEACHER = "teacher"  # a frozen policy, an earlier checkpoint of the learner included
    LEARNER = "learner"
    ENVIRONMENT = "environment"  # tools, retrieved text, a task's question
    TEMPLATE = "template"  # tokens that the chat template adds


class Regime(StrEnum):
    """Whether the training data were sampled from the model being trained."""

    OFF = "off-policy"
    ON = "on-policy"
    MIXED = "mixed"


class Role(StrEnum):
    """The chat role of the turn that a span belongs to."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """The author of a span. Hashable, so it can key metrics, gates and ledger rows.

    ``digest`` identifies the author's content: the hash of a data file or of a frozen
    checkpoint. A live learner has none, since its weights change; its spans have versions.

    Example:
        >>> Producer(kind=Kind.EXTERNAL, name="openai/gsm8k").kind
        <Kind.EXTERNAL: 'external'>
    """

    kind: Kind
    name: str
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The exact distribution a completion was drawn from.

    Truncation (``top_k``, ``top_p``, ``min_p``) is applied after the temperature, in that order,
    and the log-probs of a span are those of the truncated, renormalised distribution.

    A completion ends after the token that completes one of the ``stop`` strings; the string stays
    in its text. Stop strings are part of the record and do not change any token's log-prob.

    Example:
        >>> Sampling(temperature=0.7).is_truncated, Sampling(top_p=0.9).is_truncated
        (False, True)
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise DataError(f"temperature {self.temperature}", expected="0 (greedy) or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise DataError(
                f"top_k={self.top_k} top_p={self.top_p} min_p={self.min_p}",
                expected="top_k >= 0, 0 < top_p <= 1, 0 <= min_p < 1",
            )
        if isinstance(self.stop, str) or "" in self.stop:
            raise DataError(f"stop={self.stop!r}", expected="a tuple of strings, none empty")

    @property
    def is_truncated(self) -> bool:
        """True when truncation gave probability 0 to tokens that the model gives more than 0."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """A run of tokens from one producer in one turn. A change of either starts a new span.

    ``versions`` is the (first, last) learner version that wrote it, for learner spans only.
    ``logprobs`` is float32 [length], in nats, under ``producer`` and ``sampling``. ``None`` means
    unknown, which is not zero.

    Example:
        >>> me = Producer(kind=Kind.LEARNER, name="run-7f3a")
        >>> Span(length=2, role=Role.ASSISTANT, producer=me, versions=(7, 7)).length
        2
    """

    length: int
    role: Role
    producer: Producer
    versions: tuple[int, int] | None = None
    sampling: Sampling | None = None
    logprobs: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DataError(f"a span of {self.length} tokens", expected="at least 1")
        if self.is_live != (self.versions is not None):
            raise DataError(
                f"a {self.producer.kind} span with versions={self.versions}",
                expected="learner versions on learner spans, and on no others",
            )
        if self.logprobs is not None and self.logprobs.shape != (self.length,):
            raise DataError(
                f"log-probs of shape {self.logprobs.shape} on a span of {self.length} tokens",
                expected=f"shape ({self.length},)",
            )

    @property
    def is_live(self) -> bool:
        """True when the model being trained wrote this span."""
        return self.producer.kind is Kind.LEARNER

    @property
    def is_authored(self) -> bool:
        """True for an assistant span that neither a template nor an environment wrote."""
        mechanical = (Kind.TEMPLATE, Kind.ENVIRONMENT)
        return self.role is Role.ASSISTANT and self.producer.kind not in mechanical
