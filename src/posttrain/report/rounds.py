"""From a treatment's folder to its rounds: what was found, what was done, and whether it helped.

RunFolder ──▶ record of the treatment, diagnoses, shards ──▶ TreatmentView
"""

from __future__ import annotations

from posttrain.diagnosis.card import Diagnosis, TaskDiagnosis
from posttrain.diagnosis.spending import spent
from posttrain.diagnosis.treat import Chart, Round
from posttrain.measure.reading import Reading
from posttrain.measure.registry import plain_words
from posttrain.report.view import UNMEASURED, Estimate, FoundView, RoundView, TreatmentView
from posttrain.run.folder import RunFolder


def treatment(out: RunFolder) -> TreatmentView | None:
    """The rounds of a treatment, finished or not; None for a run of any other kind."""
    chart = out.treatment(Chart)
    if chart is None:
        return None
    numbers = out.diagnoses()
    begun = {r.number - 1: r for r in chart.rounds}
    return TreatmentView(
        budget=chart.budget,
        spent=spent(out, looks=out.measured(), diagnoses=numbers).total,
        ended=chart.ended or "",
        rounds=tuple(_round(out, number, begun.get(number)) for number in numbers),
    )


def _round(out: RunFolder, number: int, done: Round | None) -> RoundView:
    """One look, and the stage that followed from it where one did."""
    found = Diagnosis.from_json(out.diagnosis_file(number).read_text(encoding="utf-8"))
    name = done.stage.name if done else ""
    looks = [name] if name in out.measured() else []
    stages = out.stages(name) if done else ()
    cost = spent(out, looks=looks, diagnoses=[number], stages=stages)
    action = next((p for p in found.prescriptions if done and p.treatment == done.treatment
                   and p.tasks == done.tasks), None)  # fmt: skip
    return RoundView(
        number=number + 1,
        page=out.diagnosis_page(number).relative_to(out.path).as_posix(),
        found=tuple(_found(t) for t in found.tasks),
        stage=name,
        start=done.stage.init if done else "",
        steps=(done.stage.budget.steps or 0) if done else 0,
        tasks=done.tasks if done else (),
        title=(action.title if action else done.treatment) if done else "",
        why=action.choices[0].why if action and action.choices else "",
        decision=done.words if done else "",
        helped=done.helped if done else None,
        kept=done.kept if done else None,
        looking=cost.looking,
        sampled=cost.sampled,
        trained=cost.trained,
    )


def _found(task: TaskDiagnosis) -> FoundView:
    many = [r for r in task.evidence.readings if r.name.startswith("pass@")]
    widest = max(many, key=_tries, default=None)
    return FoundView(
        task=task.task,
        bottleneck=str(task.acted_on),
        shown=task.leaning is None,
        words=plain_words(task.headline),
        because=tuple(plain_words(b) for f in task.findings[:1] for b in f.because),
        first=_estimate(task.evidence.get("pass@1")),
        reach=_estimate(widest),
        tries=_tries(widest) if widest else 0,
    )


def _tries(reading: Reading) -> int:
    return int(reading.name.partition("@")[2])


def _estimate(reading: Reading | None) -> Estimate:
    if reading is None:
        return UNMEASURED
    return Estimate(value=reading.value, low=reading.low, high=reading.high)
