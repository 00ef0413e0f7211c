"""From the specifications in ``composition/teaching.py`` to signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from posttrain.composition.teaching import (
    DeltaAdvantage,
    ForeignTeacher,
    SpanAdvantage,
    TeacherAdvantage,
    TeachingSpec,
    teachers_of,
)
from posttrain.core.protocols import Policy, Signal
from posttrain.core.task import Task
from posttrain.signals.foreign import ForeignTeacherSignal, SpanAdvantageSignal
from posttrain.signals.memory import Memory
from posttrain.signals.scoring import TeacherSignal
from posttrain.signals.teacher_credit import DeltaAdvantageSignal, TeacherAdvantageSignal


def teaching_signal(
    spec: TeachingSpec,
    *,
    live: Policy,
    judge: Callable[[str], Policy],
    stranger: Callable[[str], Policy],
    tasks: Mapping[str, Task],
    memory: Memory | None = None,
    heads: Mapping[str, int] | None = None,
) -> Signal:
    """The code behind a specification.

    Args:
        spec: which signal.
        live: the learner's policy.
        judge: a policy by reference, whose token ids are the learner's.
        stranger: a frozen policy by reference, whatever its tokens.
        tasks: those that the stage may draw, by key.
        memory: of what teachers said, where trajectories come again.
        heads: by reference the numbers of teachers whose heads the loss has.
    """
    match spec:
        case TeacherAdvantage():
            return TeacherAdvantageSignal(spec)
        case DeltaAdvantage():
            return DeltaAdvantageSignal(spec, live, judge(spec.teacher), judge(spec.base))
        case ForeignTeacher():
            return ForeignTeacherSignal(spec, stranger(spec.teacher), live.renderer, tasks)
        case SpanAdvantage():
            return SpanAdvantageSignal(spec, stranger(spec.teacher), live.renderer, tasks)
    teachers = {ref: judge(ref) for ref in teachers_of(spec)}
    return TeacherSignal(spec, teachers, tasks, memory, heads or {})
