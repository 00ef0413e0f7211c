"""Teachers as signals: what a frozen policy, or the learner with more to read, says of a text.

    teacher ─┬─ teacher_distribution ──TEACHER_IDS, TEACHER_LOGPROBS──▶ terms of distillation.py
             ├─ teacher_logprobs ─────TEACHER_LOGPROB──▶ teacher_advantage ──ADVANTAGE──▶ policy
             ├─ delta_advantage ──────ADVANTAGE──▶ policy gradients                    gradients
             ├─ span_advantage ───────ADVANTAGE──▶ policy gradients
             └─ foreign_teacher ──────TEACHER_SORTED, TEACHER_ALIGNED──▶ teacher_sorted_l1

The code is in ``signals/scoring.py``, ``teacher_credit.py`` and ``foreign.py``.
"""

from __future__ import annotations

import string
from typing import ClassVar, Literal

from posttrain.composition.base import PolicyRef
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError
from posttrain.core.trajectory import Column

Columns = frozenset[Column]


class TeacherDistribution(Config, tag="teacher_distribution", tag_field="type"):
    """A teacher's next-token distribution at every written token.

    ``routes`` chooses the teacher by task set; ``"*"`` is the default. ``top_k`` keeps the
    teacher's K most likely tokens (not the learner's); null keeps the full vocabulary.

    ``context`` is what the teacher reads in place of the question: a template with ``{question}``
    and, if the teacher is to know it, ``{answer}`` of the task. The completion's tokens are the
    same; only what stands before them differs. With a context the teacher may be the ``learner``
    itself: what it says when it knows more (SDFT 2601.19897, OPSD 2601.18734; context
    distillation 2209.15189).

    ``{success}`` stands for the first *other* answer of the group with a reward of at least
    ``success`` (SDPO 2601.20802). An answer without such a sibling is discarded.
    """

    routes: dict[str, PolicyRef]
    top_k: int | None = None
    context: str | None = None
    success: float = 1.0

    @property
    def shows_success(self) -> bool:
        """True when the teacher reads another answer of the group."""
        return "success" in _fields(self.context)

    @property
    def min_group(self) -> int:
        """Members that a group must have."""
        return 2 if self.shows_success else 1

    @property
    def needs(self) -> Columns:
        """Rewards, if successful answers are shown."""
        return frozenset({Column.REWARD} if self.shows_success else ())

    @property
    def provides(self) -> Columns:
        """The distribution, and which answers have a sibling to learn from."""
        verdict = {Column.DISCARD} if self.shows_success else set()
        return frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS} | verdict)

    def __post_init__(self) -> None:
        _check_routes(self.routes)
        check_context(self.context, self.routes, shown=("answer", "success"))
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}", expected="at least 1, or null")


class TeacherLogprobs(Config, tag="teacher_logprobs", tag_field="type"):
    """A teacher's log-prob of every written token: what a sample costs, not a distribution.

    ``routes`` and ``context`` as in ``teacher_distribution``.
    """

    routes: dict[str, PolicyRef]
    context: str | None = None
    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.TEACHER_LOGPROB})

    def __post_init__(self) -> None:
        _check_routes(self.routes)
        check_context(self.context, self.routes)


class TeacherAdvantage(Config, tag="teacher_advantage", tag_field="type"):
    """The log-ratio of teacher and policy as credit, u_t = log π_T(y_t) − log π(y_t).

    | ``credit`` | A_t | its expected policy gradient |
    |---|---|---|
    | ``token`` | u_t | Σ_t of the next-token reverse KL, prefixes held fixed (OPD) |
    | ``to_go`` | Σ_{s≥t} u_s | the reverse KL between whole sequences |
    | ``future_mean`` | mean of u_s over s > t | MiniLLM's long part, by length (2306.08543) |

    log π is that of the distribution sampled, from the record. ``extrapolation`` λ ≠ 1 makes u
    λ (log π_T − log π_ref) − (log π − log π_ref), which goes on where the teacher stopped
    (G-OPD, 2602.12125). ``early`` γ multiplies A_t by 1 + γ (1 − Σ_{s<t} |A_s| / Σ_s |A_s|)
    (IW-OPD, 2606.22600).
    """

    credit: Literal["token", "to_go", "future_mean"] = "token"
    extrapolation: float = 1.0
    early: float = 0.0
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if self.extrapolation <= 0 or self.early < 0:
            raise ConfigError(
                f"teacher_advantage with extrapolation={self.extrapolation}, early={self.early}",
                expected="extrapolation above 0 (1 is the teacher itself), early 0 or more",
            )

    @property
    def needs(self) -> Columns:
        """Log-probs of the teacher and the policy, and of a reference to extrapolate from."""
        extra = {Column.REFERENCE_LOGPROB} if self.extrapolation != 1 else set()
        return frozenset({Column.TEACHER_LOGPROB, Column.BEHAVIOUR_LOGPROB} | extra)


class DeltaAdvantage(Config, tag="delta_advantage", tag_field="type"):
    """What a teacher's own tuning added, where it agrees with plain distillation (OPD², 2607.15161).

    Δ = log π_T(y) − log π_base(y) and U = log π_T(y) − log π(y), each less its expectation under
    π; A = ``scale`` · Δ where Δ and U have one sign, else 0. ``base`` is what the teacher was
    tuned from. Expectations are exact, over the full vocabulary (the paper: over the policy's
    1024 most likely tokens).
    """  # noqa: E501

    teacher: PolicyRef
    base: PolicyRef
    scale: float = 0.1
    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})

    def __post_init__(self) -> None:
        if self.teacher == self.base or self.scale <= 0:
            raise ConfigError(
                f"delta_advantage with teacher={self.teacher}, base={self.base}, "
                f"scale={self.scale}",
                expected="two different policies, and scale above 0",
            )


class ForeignTeacher(Config, tag="foreign_teacher", tag_field="type"):
    """The sorted distribution of a teacher with another tokenizer, where both have a boundary.

    The teacher reads the task in its own template and its own tokens of the completion's text.
    Before a token that starts where one of the teacher's starts, both have read the same text,
    and their next-token distributions can be compared by rank; other tokens are not aligned.
    """

    teacher: PolicyRef
    top_k: int = 100
    needs: ClassVar[Columns] = frozenset()
    provides: ClassVar[Columns] = frozenset({Column.TEACHER_SORTED, Column.TEACHER_ALIGNED})

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}", expected="at least 1")


class SpanAdvantage(Config, tag="span_advantage", tag_field="type"):
    """The log-ratio of policy and a teacher with another tokenizer, span by span, as credit.

    A span reaches from one boundary that both tokenizers have to the next; its log-prob is the sum
    over its tokens, whichever they are. Every token of a span has A = log π_T(span) − log π(span).
    With one tokenizer every span is a token, and this is ``teacher_advantage``. The teacher reads
    the task in its own template; the end of a turn is a span too. What stands after the last common
    boundary of an answer that was cut off has no credit.

    Of all ways to write a span only those are counted that the two tokenizers take.

    Unconfirmed: spans and products of conditionals are those of GOLD, which compares distributions
    at the boundaries; the policy gradient on the spans' log-ratio is derived.
    """

    teacher: PolicyRef
    needs: ClassVar[Columns] = frozenset({Column.BEHAVIOUR_LOGPROB})
    provides: ClassVar[Columns] = frozenset({Column.ADVANTAGE})


def _check_routes(routes: dict[str, PolicyRef]) -> None:
    if not routes:
        raise ConfigError("no teacher", expected='at least one route, such as {"*": base}')


def _fields(context: str | None) -> set[str]:
    """Names in braces.

    Raises:
        ConfigError: the template cannot be read.
    """
    try:
        parts = string.Formatter().parse(context or "")
        return {name for _, name, _, _ in parts if name is not None}
    except ValueError as error:
        raise ConfigError(f"context {context!r}: {error}", fix="write {{ for a brace") from None


def check_context(
    context: str | None, routes: dict[str, PolicyRef], *, shown: tuple[str, ...] = ("answer",)
) -> None:
    """Refuse a template that says nothing new, and a learner that would teach itself nothing.

    Raises:
        ConfigError: as said.
    """
    if context is None:
        if "learner" in routes.values():
            raise ConfigError(
                "the learner as its own teacher, with nothing more to read",
                expected="a context: without one, teacher and policy are equal",
                fix='for example context: "{question} (the answer is {answer})"',
            )
        return
    fields = _fields(context)
    if "question" not in fields or not fields <= {"question", *shown}:
        more = " and ".join(f"{{{name}}}" for name in shown)
        raise ConfigError(
            f"context {context!r}",
            expected=f"a template with {{question}}, and {more} if the teacher is to know it",
        )
    if context == "{question}":
        raise ConfigError(f"context {context!r}", expected="more than the question alone")


TeachingSpec = (
    TeacherDistribution
    | TeacherLogprobs
    | TeacherAdvantage
    | DeltaAdvantage
    | SpanAdvantage
    | ForeignTeacher
)


def teachers_of(spec: TeachingSpec) -> tuple[PolicyRef, ...]:
    """The policies that a signal asks."""
    match spec:
        case TeacherDistribution() | TeacherLogprobs():
            return tuple(spec.routes.values())
        case DeltaAdvantage():
            return (spec.teacher, spec.base)
        case ForeignTeacher() | SpanAdvantage():
            return (spec.teacher,)
    return ()
