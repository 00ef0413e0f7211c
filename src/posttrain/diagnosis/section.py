"""The rounds of a treatment as a section of its run's report: finding, stage and outcome.

treat.json, diagnoses/*.json, shards ──▶ Look per diagnosis ──rounds.html.j2──▶ Section
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from posttrain.diagnosis.card import Diagnosis, Prescription
from posttrain.diagnosis.page import FILTERS, strip
from posttrain.diagnosis.rounds import Round, TreatmentLog
from posttrain.diagnosis.spending import Spent, spent
from posttrain.pages.template import Section, fill
from posttrain.run.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A diagnosis of a treatment, and the round that followed from it where one did."""

    number: int
    card: Diagnosis
    round: Round | None
    cost: Spent  # of this diagnosis and of its round

    @property
    def action(self) -> Prescription | None:
        """The prescription that the round follows."""
        done = self.round
        if done is None:
            return None
        return next(
            (
                p
                for p in self.card.prescriptions
                if p.treatment == done.treatment and p.tasks == done.tasks
            ),
            None,
        )

    @property
    def title(self) -> str:
        """The stage that was run, in one line; empty where there was none."""
        if self.round is None:
            return ""
        return self.action.title if self.action else self.round.treatment

    @property
    def why(self) -> str:
        """The reason for its first choice."""
        return self.action.choices[0].why if self.action and self.action.choices else ""

    @property
    def strips(self) -> tuple[Markup, ...]:
        """A bar for each task set; none where pass@1 was not read."""
        return tuple(
            strip(task.evidence, ident=f"round-{self.number}-{i}") or Markup("")
            for i, task in enumerate(self.card.tasks)
        )


def treatment_section(folder: RunFolder) -> Section | None:
    """The rounds of a treatment, finished or not; None for a run folder of any other kind.

    Raises:
        DataError: ``treat.json`` or a diagnosis is damaged.
    """
    log = folder.treatment(TreatmentLog)
    if log is None:
        return None
    html = fill(
        "posttrain.diagnosis",
        "rounds.html.j2",
        filters=FILTERS,
        log=log,
        spent=spent(folder, looks=folder.measured(), diagnoses=folder.diagnoses()).total,
        looks=looks(folder),
    )
    # Every value in it was escaped by the template.
    return Section(ident="treatment", title="Treatment", html=Markup(html))


def looks(folder: RunFolder) -> tuple[Look, ...]:
    """Every diagnosis of a treatment in order, with its round."""
    log = folder.treatment(TreatmentLog)
    followed = {r.number - 1: r for r in log.rounds} if log else {}
    return tuple(_look(folder, number, followed.get(number)) for number in folder.diagnoses())


def _look(folder: RunFolder, number: int, done: Round | None) -> Look:
    name = done.stage.name if done else ""
    card = folder.diagnosis(number)
    return Look(
        number=number + 1,
        card=Diagnosis.from_json(card),
        round=done,
        cost=spent(
            folder,
            looks=[name] if name in folder.measured() else [],
            diagnoses=[number],
            stages=folder.stages(name) if done else [],
        ),
    )
