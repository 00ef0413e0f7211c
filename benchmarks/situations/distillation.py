"""A small situation in the lab for every method of distillation, and for mixes with others.

    taught    base ──SFT on right answers──▶ teacher;  base ──the method──▶ learner
    hinted    base ──SFT on questions that carry a hint──▶ reader ──the method──▶ learner
    chord     base ──the method──▶ learner

``products`` is answered rightly about one time in ten, by a habit otherwise. The teacher knows the
right answers. A reader knows what to do with a hint, and has to do the same without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from posttrain.core.learner import Optimizer
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import with_context
from posttrain.lab.corpus import demonstrations, taskset, write_rows
from posttrain.lab.settings import PRODUCTS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.composition import Method
from posttrain.parts.distillation.policy_presets import (
    GOpd,
    IwOpd,
    Minillm,
    Opd2,
    OpdSampled,
    SpanOpd,
)
from posttrain.parts.distillation.presets import (
    ContextDistillation,
    Distillm,
    Distillm2,
    EntropyAwareOpd,
    Gkd,
    Kd,
    Opd,
    Opsd,
    Sdft,
    Sdpo,
    SeqKd,
    TvDistillation,
    Uld,
)
from posttrain.parts.guided.hybrid import Chord, ChordPhi
from posttrain.parts.registry import tag_of
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Sft
from posttrain.parts.supervised.rejection import Star
from posttrain.recipe import Budget, Recipe, Stage

STEPS, GROUPS = 40, 64
TASKS, TEACHERS = (PRODUCTS.name,), {"*": "teacher"}
HINT = "{answer} {question}"
INSTRUCTION = "Multiply! {question}"
SIBLING = "{success} {question}"
DATA = Dataset(path="demonstrations.jsonl", name="lab-demonstrations", licence="CC0-1.0")


def taught(method: Callable[[], Method], lr: float, inputs: Path, seed: int) -> Recipe:
    """A teacher made from right answers, and a learner that starts where the teacher did."""
    teacher = _stage("teacher", Sft(data=DATA), lr=1e-3)
    return _recipe(inputs, seed, teacher, _stage("student", method(), lr=lr, init="base"))


def hinted(
    method: Callable[[], Method],
    hint: str,
    lr: float,
    inputs: Path,
    seed: int,
    *,
    groups: int = GROUPS,
) -> Recipe:
    """A policy that can read a hint, and then learns to do without."""
    rows = (
        {
            "messages": [
                {"role": "user", "content": with_context(task, hint).text},
                {"role": "assistant", "content": str(task.answer)},
            ]
        }
        for task in {t.key: t for t in taskset(PRODUCTS).train}.values()
    )
    write_rows(inputs / "hinted.jsonl", rows)
    data = Dataset(path="hinted.jsonl", name="lab-hinted", licence="CC0-1.0")
    reader = _stage("reader", Sft(data=data), lr=1e-3)
    return _recipe(inputs, seed, reader, _stage("student", method(), lr=lr, groups=groups))


def alone(method: Callable[[], Method], lr: float, inputs: Path, seed: int) -> Recipe:
    """One stage from the base."""
    return _recipe(inputs, seed, _stage("student", method(), lr=lr))


def _stage(
    name: str, method: Method, *, lr: float, init: str = "previous", groups: int = GROUPS
) -> Stage:
    return Stage(
        name=name,
        method=method,
        init=init,
        budget=Budget(steps=STEPS),
        groups_per_step=groups,
        optimizer=Optimizer(lr=lr, warmup_steps=4),
    )


def _recipe(inputs: Path, seed: int, *stages: Stage) -> Recipe:
    rows = (d.row for d in demonstrations(PRODUCTS, seed=seed, count=1000))
    write_rows(inputs / DATA.path, rows)
    return Recipe(
        name=f"catalogue-{tag_of(stages[-1].method)}",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={PRODUCTS.name: PRODUCTS.tasks},
        measure=Measure(samples=32, max_new_tokens=ANSWER, seed=7),
        stages=stages,
    )


def _dense(method: Callable[..., Method], **options: object) -> Callable[[Path, int], Recipe]:
    make = partial(method, tasks=TASKS, max_new_tokens=ANSWER, **options)
    return partial(taught, make, 1e-3)


def _sampled(method: Callable[..., Method], **options: object) -> Callable[[Path, int], Recipe]:
    make = partial(method, tasks=TASKS, max_new_tokens=ANSWER, **options)
    return partial(taught, make, 3e-4)


def _hinted(
    method: Callable[..., Method], *, context: str = HINT, lr: float = 3e-4
) -> Callable[[Path, int], Recipe]:
    make = partial(method, tasks=TASKS, max_new_tokens=ANSWER, context=context)
    return partial(hinted, make, context, lr)


_MIXED = {"teachers": TEACHERS, "data": DATA}
_COOL = SamplingSpec(temperature=0.7)
_STAR = partial(Star, tasks=TASKS, hint=HINT, max_new_tokens=ANSWER)
_SDPO = partial(Sdpo, tasks=TASKS, group_size=8, max_new_tokens=ANSWER, context=SIBLING, top_k=None)

SITUATIONS: Mapping[str, Callable[[Path, int], Recipe]] = MappingProxyType(
    {
        "seq_kd": _dense(SeqKd, teacher="teacher"),
        "kd": partial(taught, lambda: Kd(data=DATA, teachers=TEACHERS, temperature=2.0), 1e-3),
        "opd": _dense(Opd, teachers=TEACHERS),
        "opd_top_k": _dense(Opd, teachers=TEACHERS, top_k=4),
        "entropy_aware_opd": _dense(EntropyAwareOpd, teachers=TEACHERS),
        "tv_distillation": _dense(TvDistillation, teachers=TEACHERS),
        "gkd": _dense(Gkd, **_MIXED),
        "distillm": _dense(Distillm, **_MIXED),
        "distillm2": _dense(Distillm2, teacher="teacher"),
        "uld": _dense(Uld, teacher="teacher", data=DATA),
        "opd_sampled": _sampled(OpdSampled, teachers=TEACHERS),
        "iw_opd": _sampled(IwOpd, teachers=TEACHERS),
        "g_opd": _sampled(GOpd, teachers=TEACHERS),
        "opd2": _sampled(Opd2, teacher="teacher", teacher_base="base", sampling=_COOL, scale=1.0),
        "span_opd": _sampled(SpanOpd, teacher="teacher"),  # with one tokenizer: opd_sampled
        "minillm": _sampled(Minillm, teachers=TEACHERS),
        "opsd": _hinted(Opsd),
        # At 3e-4 a teacher that moves with the learner is pulled along, and both get worse.
        "sdft": _hinted(Sdft),
        "sdft_live_teacher": _hinted(partial(Sdft, teacher="learner"), lr=1e-4),
        "sdpo": partial(hinted, _SDPO, HINT, 3e-4, groups=GROUPS // 4),
        "star_rationalised": partial(hinted, _STAR, HINT, 1e-3),
        "context_distillation": _hinted(ContextDistillation, context=INSTRUCTION),
        "chord": partial(
            alone,
            lambda: Chord(data=DATA, tasks=TASKS, expert=0.25, max_new_tokens=ANSWER),
            3e-4,
        ),
        "chord_phi": partial(
            alone,
            lambda: ChordPhi(data=DATA, tasks=TASKS, expert=0.25, max_new_tokens=ANSWER),
            3e-4,
        ),
    }
)
"""By the name of the method, or of one and its option."""
