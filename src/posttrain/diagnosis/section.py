"""The rounds of a treatment as a section of its run's report: found, done, and whether it helped.

treat.json, diagnoses/*.json, shards ──▶ Look per diagnosis ──rounds.html.j2──▶ Section
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from posttrain.diagnosis.card import Diagnosis, Prescription
from posttrain.diagnosis.page import FILTERS, strip
from posttrain.diagnosis.rounds import Round, read_chart
from posttrain.diagnosis.spending import Spent, spent
from posttrain.pages.template import Section, fill


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A diagnosis of a treatment, and the round that followed from it where one did."""

    number: int
    card: Diagnosis
    round: Round | None
    cost: Spent  # of this look and of its round

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
        """What was done, in one line; empty where nothing was."""
        if self.round is None:
            return ""
        return self.action.title if self.action else self.round.treatment

    @property
    def why(self) -> str:
        """The reason for the first of its choices."""
        return self.action.choices[0].why if self.action and self.action.choices else ""

    @property
    def strips(self) -> tuple[Markup, ...]:
        """A bar for each task set; nothing where pass@1 was not read."""
        return tuple(
            strip(task.evidence, ident=f"round-{self.number}-{i}") or Markup("")
            for i, task in enumerate(self.card.tasks)
        )


def treatment_section(out: Path) -> Section | None:
    """The rounds of a treatment, finished or not; None for a run folder of any other kind.

    Raises:
        DataError: ``treat.json`` or a diagnosis is damaged.
    """
    chart = read_chart(out)
    if chart is None:
        return None
    cards = _cards(out)
    policies = [p.stem for p in sorted((out / "measurements").glob("*.json"))]
    html = fill(
        "posttrain.diagnosis",
        "rounds.html.j2",
        filters=FILTERS,
        chart=chart,
        spent=spent(out, looks=policies, diagnoses=cards).total,
        looks=looks(out),
    )
    # Every value in it was escaped by the template.
    return Section(ident="treatment", title="Treatment", html=Markup(html))


def looks(out: Path) -> tuple[Look, ...]:
    """Every diagnosis of a treatment in turn, with what came of it."""
    chart = read_chart(out)
    begun = {r.number - 1: r for r in chart.rounds} if chart else {}
    return tuple(_look(out, path, begun.get(int(path.stem))) for path in _cards(out))


def _cards(out: Path) -> list[Path]:
    return sorted((out / "diagnoses").glob("*.json"), key=lambda p: int(p.stem))


def _look(out: Path, path: Path, done: Round | None) -> Look:
    name = done.stage.name if done else ""
    measured = (out / "measurements" / f"{name}.json").is_file()
    return Look(
        number=int(path.stem) + 1,
        card=Diagnosis.from_json(path.read_text(encoding="utf-8")),
        round=done,
        cost=spent(
            out,
            looks=[name] if measured else [],
            diagnoses=[path],
            stages=f"{name}-*" if done else "",
        ),
    )
