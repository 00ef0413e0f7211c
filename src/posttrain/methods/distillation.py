"""Distillation methods."""

from __future__ import annotations

from typing import ClassVar

from posttrain.composition import (
    Aggregate,
    Composition,
    PolicyRef,
    Rollouts,
    SamplingSpec,
    TeacherDistribution,
    TeacherReverseKL,
)
from posttrain.config import Config


class Opd(Config, frozen=True, kw_only=True, tag="opd", tag_field="name"):
    """On-policy distillation: the teacher grades every token of the learner's own rollouts."""

    tasks: tuple[str, ...]
    teachers: dict[str, PolicyRef]
    group_size: int = 1
    max_new_tokens: int = 64
    sampling: SamplingSpec = SamplingSpec()
    top_k: int | None = None
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "on-policy"
    interface: ClassVar[str] = "teacher targets"
    tendency: ClassVar[str] = "reshaping or consolidation"
    formula: ClassVar[str] = "KL(pi || pi_teacher) per token, on samples of pi"
    paper: ClassVar[str] = "2306.13649"

    def compose(self) -> Composition:
        """Live rollouts; teacher distributions routed by task set; reverse KL."""
        return Composition(
            source=Rollouts(
                tasks=self.tasks,
                group_size=self.group_size,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
            ),
            signals=(TeacherDistribution(routes=self.teachers, top_k=self.top_k),),
            terms=(TeacherReverseKL(aggregate=self.aggregate),),
        )


DistillationMethod = Opd
